//! What this engine knows of each database server, whoever's credentials are used there: whether it
//! answers, and how much is under way. It keeps a sick server from holding places that tasks for
//! others need.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_common::target::Target;
use mayfly_common::task::{Failure, FailureCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{info, warn};

use super::breaker::{Away, Breaker, Found, Pass};
use super::budget::{Budget, Connections};

/// Requests worked on at a time.
const REQUESTS: usize = 8;
/// Batches of revocations worked on at a time.
const BATCHES: usize = 4;
/// Revocations worked on one by one at a time, since each would hold up its batch.
const HARD: usize = 4;
/// Revocations under way while it is not known whether the server answers.
const SCOUTS: usize = 32;
/// For so long after an answer a server is taken to be well.
const WELL_FOR: Duration = Duration::from_secs(3);
/// How often who waits looks whether the server is still well.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The state of one server.
pub(crate) struct Door {
    place: String,
    /// The engine's connections there.
    pub(super) budget: Budget,
    breaker: Mutex<Breaker>,
    /// The last answer, and the last reason why there was none.
    heard: Mutex<Heard>,
    requests: Arc<Semaphore>,
    batches: Arc<Semaphore>,
    hard: Arc<Semaphore>,
    scouts: Arc<Semaphore>,
}

#[derive(Default)]
struct Heard {
    answer: Option<Instant>,
    failure: String,
    /// Since when no connection slot was free, at each try.
    full: Option<Instant>,
}

/// A place in a server's limits; free again when dropped.
pub(crate) type Place = OwnedSemaphorePermit;

/// Leave to connect. Dropped before its end, it came to nothing.
pub(crate) struct Try<'d> {
    door: &'d Door,
    pass: Pass,
    is_over: bool,
}

impl Door {
    /// A server nothing is known of.
    pub(crate) fn new(target: &Target, connections: Connections) -> Self {
        Self {
            place: place(target),
            budget: Budget::new(connections),
            breaker: Mutex::default(),
            heard: Mutex::default(),
            requests: Arc::new(Semaphore::new(REQUESTS)),
            batches: Arc::new(Semaphore::new(BATCHES)),
            hard: Arc::new(Semaphore::new(HARD)),
            scouts: Arc::new(Semaphore::new(SCOUTS)),
        }
    }

    /// The same for all who reach the server in the same way.
    pub(crate) fn key(target: &Target) -> String {
        format!("{}|{}", target.host, target.port)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for leave to connect.
    ///
    /// # Errors
    /// `database_unreachable`: the breaker is open; it says since when, and until when.
    pub(crate) fn ask(&self, asked: bool) -> Result<Try<'_>, Failure> {
        match self.breaker().ask(Instant::now(), asked) {
            Ok(pass) => Ok(Try {
                door: self,
                pass,
                is_over: false,
            }),
            Err(away) => Err(self.away(away)),
        }
    }

    fn away(&self, away: Away) -> Failure {
        let again = if away.again.is_zero() {
            "it is being tried now".to_owned()
        } else {
            format!("it is tried again in {} s", away.again.as_secs() + 1)
        };
        Failure::new(
            FailureCode::DatabaseUnreachable,
            format!(
                "{} has been away for {} s, {again}; last seen: {}",
                self.place,
                away.since.as_secs().max(1),
                self.heard().failure
            ),
        )
    }

    /// The server said something.
    pub(crate) fn answered(&self) {
        self.heard().answer = Some(Instant::now());
    }

    /// A connection was refused for want of a free slot.
    pub(crate) fn is_full(&self) {
        self.heard().full.get_or_insert_with(Instant::now);
    }

    /// Why a task of this engine has no connection.
    pub(super) fn all_in_use(&self, waited: Duration) -> String {
        format!(
            "{}: this engine's connections to the server have all been in use for {} s: it has {} at most (engine.connections_per_server), and fewer where a limit of the server, the database or the admin leaves no room",
            self.place,
            waited.as_secs(),
            self.budget.most()
        )
    }

    /// It is taken for away, and tried now and then.
    pub(crate) fn is_away(&self) -> bool {
        self.breaker().is_open()
    }

    /// How long every connection has been refused for want of a free slot.
    pub(crate) fn full_for(&self) -> Duration {
        self.heard()
            .full
            .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// It said something a moment ago.
    pub(crate) fn is_well(&self) -> bool {
        self.heard()
            .answer
            .is_some_and(|at| at.elapsed() < WELL_FOR)
    }

    /// Nobody needs to remember it.
    pub(crate) fn is_forgettable(&self) -> bool {
        let mut breaker = self.breaker();
        breaker.forget(Instant::now());
        breaker.is_untouched() && !self.is_well()
    }

    /// A place for a request. Waited for as long as the server is well, and else so long.
    ///
    /// # Errors
    /// `database_unreachable`: those before it hang there.
    pub(crate) async fn request(&self, patience: Duration) -> Result<Place, Failure> {
        let place = self.place_in(&self.requests, patience).await;
        place.ok_or_else(|| {
            Failure::new(
                FailureCode::DatabaseUnreachable,
                format!(
                    "{} has answered nothing for {} s to the {REQUESTS} requests before this one",
                    self.place,
                    patience.as_secs()
                ),
            )
        })
    }

    /// A place for a batch of revocations, likewise.
    pub(crate) async fn batch(&self, patience: Duration) -> Option<Place> {
        self.place_in(&self.batches, patience).await
    }

    /// A place for a revocation that would hold up others, waited for no longer than this.
    pub(crate) async fn hard(&self, patience: Duration) -> Option<Place> {
        let place = self.hard.clone().acquire_owned();
        tokio::time::timeout(patience, place).await.ok()?.ok()
    }

    /// Places for up to so many revocations whose server is not known to be well.
    pub(crate) fn scouts(&self, wanted: usize) -> Option<Place> {
        let number = wanted.min(self.scouts.available_permits());
        if number == 0 {
            return None;
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        self.scouts.clone().try_acquire_many_owned(number).ok()
    }

    /// Waits until the server is well, but no longer than this. Whether it is.
    pub(crate) async fn becomes_well(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while !self.is_well() {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(LOOK_EVERY / 10).await;
        }
        true
    }

    async fn place_in(&self, places: &Arc<Semaphore>, patience: Duration) -> Option<Place> {
        let until = Instant::now() + patience;
        let place = places.clone().acquire_owned();
        tokio::pin!(place);
        loop {
            tokio::select! {
                place = &mut place => return place.ok(),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            if !self.is_well() && Instant::now() >= until {
                return None;
            }
        }
    }
}

impl Try<'_> {
    /// Tells what came of it.
    pub(crate) fn ended(mut self, found: Found, failure: Option<&Failure>) {
        self.is_over = true;
        if let Some(failure) = failure {
            self.door.heard().failure.clone_from(&failure.message);
        }
        if found == Found::There {
            self.door.answered();
        }
        if failure.is_none_or(|failure| !failure.full) {
            self.door.heard().full = None;
        }
        let (was_open, is_open) = {
            let mut breaker = self.door.breaker();
            let was_open = breaker.is_open();
            breaker.ended(Instant::now(), self.pass, found);
            (was_open, breaker.is_open())
        };
        let place = &self.door.place;
        match (was_open, is_open) {
            (false, true) => {
                warn!(place, "a database server is away; it is tried now and then")
            }
            (true, false) => info!(place, "a database server is back"),
            _ => {}
        }
    }
}

impl Drop for Try<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.door
                .breaker()
                .ended(Instant::now(), self.pass, Found::Nothing);
        }
    }
}

/// Where a target is, for messages.
pub(crate) fn place(target: &Target) -> String {
    match target.endpoints() {
        Ok(endpoints) => endpoints
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(","),
        Err(_) => format!("{}:{}", target.host, target.port),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_common::secret::Secret;
    use mayfly_common::target::SslMode;

    fn door() -> Door {
        let target = Target {
            host: "db1,db2:5433".into(),
            port: 5432,
            database: "d".into(),
            username: "u".into(),
            password: Secret::new("p"),
            sslmode: SslMode::Disable,
            auth: Default::default(),
            channel_binding: None,
            sslrootcert: None,
            sslcert: None,
            sslkey: None,
        };
        Door::new(&target, Connections::default())
    }

    #[tokio::test]
    async fn who_waits_at_a_server_that_hangs_is_told_so() {
        let door = door();
        let patience = Duration::from_millis(50);
        let mut places = Vec::new();
        for _ in 0..REQUESTS {
            places.push(door.request(patience).await.unwrap());
        }
        let refused = door.request(patience).await.unwrap_err();
        assert_eq!(refused.code, FailureCode::DatabaseUnreachable);
        assert!(refused.message.contains("db1:5432,db2:5433"), "{refused}");
        // At one that answers, the turn is waited for.
        door.answered();
        let free = async {
            tokio::time::sleep(Duration::from_millis(400)).await;
            places.clear();
        };
        let (place, ()) = tokio::join!(door.request(patience), free);
        assert!(place.is_ok());
    }

    #[tokio::test]
    async fn only_some_scouts_go_until_there_is_an_answer() {
        let door = door();
        let first = door.scouts(SCOUTS - 2).unwrap();
        let second = door.scouts(10).unwrap();
        assert_eq!((first.num_permits(), second.num_permits()), (SCOUTS - 2, 2));
        assert!(door.scouts(1).is_none());
        assert!(!door.becomes_well(Duration::from_millis(20)).await);
        door.answered();
        assert!(door.becomes_well(Duration::ZERO).await);
        drop(first);
        assert_eq!(door.scouts(5).unwrap().num_permits(), 5);
    }

    #[test]
    fn a_try_that_is_given_up_leaves_room_for_the_next() {
        let door = door();
        let away = Failure::new(FailureCode::DatabaseUnreachable, "nothing there");
        for _ in 0..3 {
            door.ask(false).unwrap().ended(Found::Away, Some(&away));
        }
        let Err(told) = door.ask(false) else {
            panic!("the breaker is not open")
        };
        assert!(told.message.contains("nothing there"), "{told}");
        std::thread::sleep(Duration::from_millis(1050));
        let probe = door.ask(false).unwrap();
        assert!(door.ask(false).is_err(), "one probe at a time");
        drop(probe);
        let probe = door.ask(false).unwrap();
        assert!(!door.is_forgettable());
        probe.ended(Found::There, None);
        assert!(door.ask(false).is_ok() && door.is_well());
    }
}
