//! The state of each database server in this engine, for all credentials together: whether it answers, and how many
//! tasks are in progress. Tasks for a server that does not answer must not use up places that tasks for other
//! servers need.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{info, warn};

use super::breaker::{Away, Breaker, Pass, Reached};
use super::budget::{Budget, Connections};

/// Maximum number of concurrent requests.
const REQUESTS: usize = 8;
/// Maximum number of concurrent batches of revocations.
const BATCHES: usize = 4;
/// Maximum number of concurrent revocations that are done alone. Each would delay its batch.
const HARD: usize = 4;
/// Maximum number of concurrent looks at grant roles that no request waits for.
const LOOKS: usize = 2;
/// Maximum number of revocations in progress while it is unknown whether the server answers.
const TRIALS: usize = 32;
/// A server counts as healthy for this time after an answer.
const HEALTHY_FOR: Duration = Duration::from_secs(3);
/// Pause between two checks whether a server has become healthy.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The state of one server.
pub(crate) struct ServerLimits {
    server: String,
    /// The engine's connections to the server.
    pub(super) budget: Budget,
    breaker: Mutex<Breaker>,
    /// The last answer of the server, and the last reason why there was none.
    heard: Mutex<Heard>,
    requests: Arc<Semaphore>,
    batches: Arc<Semaphore>,
    hard: Arc<Semaphore>,
    looks: Arc<Semaphore>,
    trial_permits: Arc<Semaphore>,
}

#[derive(Default)]
struct Heard {
    answer: Option<Instant>,
    failure: String,
    /// The time since which every try was refused for lack of a free slot.
    full: Option<Instant>,
}

/// One of the places at a server; it is freed when dropped.
pub(crate) type Permit = OwnedSemaphorePermit;

/// Permission to connect to a server. If it is dropped before its end, the attempt counts as aborted.
pub(crate) struct ConnectPermit<'d> {
    limits: &'d ServerLimits,
    pass: Pass,
    is_over: bool,
}

impl ServerLimits {
    /// The limits of a server about which nothing is known yet.
    pub(crate) fn new(target: &Target, connections: Connections) -> Self {
        Self {
            server: server_name(target),
            budget: Budget::new(connections),
            breaker: Mutex::default(),
            heard: Mutex::default(),
            requests: Arc::new(Semaphore::new(REQUESTS)),
            batches: Arc::new(Semaphore::new(BATCHES)),
            hard: Arc::new(Semaphore::new(HARD)),
            looks: Arc::new(Semaphore::new(LOOKS)),
            trial_permits: Arc::new(Semaphore::new(TRIALS)),
        }
    }

    /// The key of a server: its host list and port.
    pub(crate) fn key(target: &Target) -> String {
        format!("{}|{}", target.host, target.port)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock()
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock()
    }

    /// Requests permission to connect.
    ///
    /// # Errors
    /// `database_unreachable`: the breaker is open. The message says since when, and until when.
    pub(crate) fn permit_connect(&self, asked: bool) -> Result<ConnectPermit<'_>, Failure> {
        match self.breaker().pass(Instant::now(), asked) {
            Ok(pass) => Ok(ConnectPermit {
                limits: self,
                pass,
                is_over: false,
            }),
            Err(away) => Err(self.away(away)),
        }
    }

    fn away(&self, away: Away) -> Failure {
        let again = if away.again.is_zero() {
            "a task tries it now".to_owned()
        } else {
            format!("it is tried again in {} s", away.again.as_secs() + 1)
        };
        Failure::new(
            FailureCode::DatabaseUnreachable,
            format!(
                "{} has been unreachable for {} s, {again}; last error: {}",
                self.server,
                away.since.as_secs().max(1),
                self.heard().failure
            ),
        )
    }

    /// Records that the server has answered.
    pub(crate) fn answered(&self) {
        self.heard().answer = Some(Instant::now());
    }

    /// Records that a connection was refused because no slot was free.
    pub(crate) fn is_full(&self) {
        self.heard().full.get_or_insert_with(Instant::now);
    }

    /// The reason why a task gets no connection although the server has some.
    pub(super) fn all_in_use(&self, waited: Duration) -> String {
        format!(
            "{}: all connections of this engine to the server have been in use for {} s: their maximum is {} (engine.connections_per_server), or less because of a limit of the server, the database or the admin",
            self.server,
            waited.as_secs(),
            self.budget.most()
        )
    }

    /// Whether the circuit breaker is open.
    pub(crate) fn is_breaker_open(&self) -> bool {
        self.breaker().is_open()
    }

    /// How long every connection has been refused because no slot was free.
    pub(crate) fn full_for(&self) -> Duration {
        self.heard()
            .full
            .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Whether the server answered within the last 3 s.
    pub(crate) fn is_healthy(&self) -> bool {
        self.heard()
            .answer
            .is_some_and(|at| at.elapsed() < HEALTHY_FOR)
    }

    /// Whether its state need not be remembered.
    pub(crate) fn is_forgettable(&self) -> bool {
        let mut breaker = self.breaker();
        breaker.forget(Instant::now());
        breaker.is_untouched() && !self.is_healthy()
    }

    /// Waits for a place for a request. The wait has no limit while the server is healthy. Otherwise it lasts at
    /// most `patience`.
    ///
    /// # Errors
    /// `database_unreachable`: the server does not answer the requests before this one.
    pub(crate) async fn request(&self, patience: Duration) -> Result<Permit, Failure> {
        let place = self.permit_in(&self.requests, patience).await;
        place.ok_or_else(|| {
            Failure::new(
                FailureCode::DatabaseUnreachable,
                format!(
                    "{} has not answered {REQUESTS} earlier requests for {} s",
                    self.server,
                    patience.as_secs()
                ),
            )
        })
    }

    /// Waits for a place for a batch of revocations, like [`Self::request`].
    pub(crate) async fn batch(&self, patience: Duration) -> Option<Permit> {
        self.permit_in(&self.batches, patience).await
    }

    /// Waits at most `patience` for a place for a revocation that would delay others.
    pub(crate) async fn hard(&self, patience: Duration) -> Option<Permit> {
        let place = self.hard.clone().acquire_owned();
        tokio::time::timeout(patience, place).await.ok()?.ok()
    }

    /// A place for a look at a grant role that no request waits for, if one is free.
    pub(super) fn look(&self) -> Option<Permit> {
        self.looks.clone().try_acquire_owned().ok()
    }

    /// Takes trial permits for at most `wanted` revocations at a server that is not known to be healthy.
    pub(crate) fn trial_permits(&self, wanted: usize) -> Option<Permit> {
        let number = wanted.min(self.trial_permits.available_permits());
        if number == 0 {
            return None;
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        self.trial_permits
            .clone()
            .try_acquire_many_owned(number)
            .ok()
    }

    /// Waits at most `patience` until the server is healthy. Returns whether it is.
    pub(crate) async fn becomes_healthy(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while !self.is_healthy() {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(LOOK_EVERY / 10).await;
        }
        true
    }

    async fn permit_in(&self, places: &Arc<Semaphore>, patience: Duration) -> Option<Permit> {
        let until = Instant::now() + patience;
        let place = places.clone().acquire_owned();
        tokio::pin!(place);
        loop {
            tokio::select! {
                place = &mut place => return place.ok(),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            if !self.is_healthy() && Instant::now() >= until {
                return None;
            }
        }
    }
}

impl ConnectPermit<'_> {
    /// Reports the result of the attempt.
    pub(crate) fn ended(mut self, found: Reached, failure: Option<&Failure>) {
        self.is_over = true;
        if let Some(failure) = failure {
            self.limits.heard().failure.clone_from(&failure.message);
        }
        if found == Reached::Reachable {
            self.limits.answered();
        }
        if failure.is_none_or(|failure| !failure.full) {
            self.limits.heard().full = None;
        }
        let (was_open, is_open) = {
            let mut breaker = self.limits.breaker();
            let was_open = breaker.is_open();
            breaker.ended(Instant::now(), self.pass, found);
            (was_open, breaker.is_open())
        };
        let server = &self.limits.server;
        match (was_open, is_open) {
            (false, true) => {
                warn!(
                    server,
                    "a database server is unreachable; one connection at a time is tried"
                )
            }
            (true, false) => info!(server, "a database server is reachable again"),
            _ => {}
        }
    }
}

impl Drop for ConnectPermit<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.limits
                .breaker()
                .ended(Instant::now(), self.pass, Reached::Aborted);
        }
    }
}

/// Host and port of a target, for messages.
pub(crate) fn server_name(target: &Target) -> String {
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

    fn limits() -> ServerLimits {
        let target = Target {
            host: "db1,db2:5433".into(),
            port: 5432,
            ..mayfly_protocol::fixtures::target()
        };
        ServerLimits::new(&target, Connections::default())
    }

    #[tokio::test]
    async fn who_waits_at_a_server_that_hangs_is_told_so() {
        let limits = limits();
        let patience = Duration::from_millis(50);
        let mut places = Vec::new();
        for _ in 0..REQUESTS {
            places.push(limits.request(patience).await.unwrap());
        }
        let refused = limits.request(patience).await.unwrap_err();
        assert_eq!(refused.code, FailureCode::DatabaseUnreachable);
        assert!(refused.message.contains("db1:5432,db2:5433"), "{refused}");
        // A request waits for its turn at a server that answers.
        limits.answered();
        let free = async {
            tokio::time::sleep(Duration::from_millis(400)).await;
            places.clear();
        };
        let (place, ()) = tokio::join!(limits.request(patience), free);
        assert!(place.is_ok());
    }

    #[tokio::test]
    async fn only_some_scouts_go_until_there_is_an_answer() {
        let limits = limits();
        let first = limits.trial_permits(TRIALS - 2).unwrap();
        let second = limits.trial_permits(10).unwrap();
        assert_eq!((first.num_permits(), second.num_permits()), (TRIALS - 2, 2));
        assert!(limits.trial_permits(1).is_none());
        assert!(!limits.becomes_healthy(Duration::from_millis(20)).await);
        limits.answered();
        assert!(limits.becomes_healthy(Duration::ZERO).await);
        drop(first);
        assert_eq!(limits.trial_permits(5).unwrap().num_permits(), 5);
    }

    #[test]
    fn a_try_that_is_given_up_leaves_room_for_the_next() {
        let limits = limits();
        let away = Failure::new(FailureCode::DatabaseUnreachable, "nothing there");
        for _ in 0..3 {
            limits
                .permit_connect(false)
                .unwrap()
                .ended(Reached::Unreachable, Some(&away));
        }
        let Err(told) = limits.permit_connect(false) else {
            panic!("the breaker is not open")
        };
        assert!(told.message.contains("nothing there"), "{told}");
        std::thread::sleep(Duration::from_millis(1050));
        let probe = limits.permit_connect(false).unwrap();
        assert!(limits.permit_connect(false).is_err(), "one probe at a time");
        drop(probe);
        let probe = limits.permit_connect(false).unwrap();
        assert!(!limits.is_forgettable());
        probe.ended(Reached::Reachable, None);
        assert!(limits.permit_connect(false).is_ok() && limits.is_healthy());
    }
}
