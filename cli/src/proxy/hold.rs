//! `--hold`: a session gets the next account while its client keeps its connection. The proxy opens a session of the
//! server with the new account. When the client's session is idle, its state is made in the new session, which then
//! replaces the old one. A session with something that cannot be made again stays, and is cut at its end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::cancels::AtServer;
use super::carried::{self, Obstacle};
use super::frames::{Frames, message};
use super::notes::Notes;
use super::site::{Site, Use};
use super::startup::Startup;
use super::stream::Stream;
use super::talk::Unnamed;
use super::upstream::LoggedIn;
use super::vanished::Ends;

/// Pauses between tries: the first, doubled up to the last.
const AGAIN_FIRST: Duration = Duration::from_millis(500);
const AGAIN_LAST: Duration = Duration::from_secs(8);
/// Pause if too many other sessions are being carried over.
const CROWDED: Duration = Duration::from_millis(20);
/// Time in which a server answers a question about an idle session. The client waits.
const ANSWER: Duration = Duration::from_secs(5);
/// A login gives its place to another login after this time. Clients can make their logins slow (`post_auth_delay`),
/// and the sessions of others would wait for them up to the end of their lease.
const PLACE: Duration = Duration::from_secs(2);
/// Parameters of a greeting beyond this number, or these bytes in all, are not remembered: a hostile server sends tens
/// of thousands. PostgreSQL 18 reports 15.
const PARAMETERS_MAX: usize = 64;
const PARAMETERS_BYTES: usize = 8 * 1024;
/// Time for the end of a session that its client has left.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

type Login = Result<(Use, LoggedIn), Vec<u8>>;

/// What is needed to give a client's session another account.
pub(super) struct Hold {
    site: Arc<Site>,
    startup: Arc<Startup>,
    /// Bodies of the ParameterStatus messages that the client knows.
    parameters: Vec<Vec<u8>>,
    login: Option<AbortOnDropHandle<Login>>,
    spare: Option<(Use, LoggedIn)>,
    /// The next try is not made before this time.
    again: Instant,
    pause: Duration,
    /// Why the session cannot have another account, and the start of the idle time in which the server reported this.
    obstacle: Option<(Obstacle, Option<Instant>)>,
}

/// A session of the server that replaces the session before it.
pub(super) struct Swapped {
    pub(super) usage: Use,
    pub(super) at_server: AtServer,
    pub(super) ends: Option<Ends>,
    pub(super) from: ReadHalf<Stream>,
    pub(super) to: WriteHalf<Stream>,
}

impl Hold {
    /// The state for a session with this greeting.
    pub(super) fn new(site: Arc<Site>, startup: Startup, greeting: &[u8]) -> Self {
        Self {
            site,
            startup: Arc::new(startup),
            parameters: parameters(greeting),
            login: None,
            spare: None,
            again: Instant::now(),
            pause: AGAIN_FIRST,
            obstacle: None,
        }
    }

    /// Looks at a session that should leave its account and has been idle since `idle_since`. `None`: another
    /// session of the server is ready. Otherwise it returns when to look again; look again after [`Hold::logged_in`]
    /// too.
    pub(super) fn next(
        &mut self,
        now: Instant,
        idle_since: Instant,
        has_set: bool,
    ) -> Option<Instant> {
        let far = now + Duration::from_secs(86_400);
        if has_set {
            // The server does not list settings whose names the program has made up, such as app.tenant.
            self.obstacle = Some(("used SET".to_owned(), None));
            return Some(far);
        }
        self.obstacle = self.obstacle.take().filter(|(_, since)| since.is_some());
        if self.spare.is_some() {
            return (now < self.again).then_some(self.again);
        }
        // Nothing has changed since the server was asked.
        if matches!(self.obstacle, Some((_, Some(then))) if then == idle_since) {
            return Some(far);
        }
        if now < self.again {
            return Some(self.again);
        }
        if self.login.is_none() {
            let (site, startup) = (self.site.clone(), self.startup.clone());
            let login = async move {
                let place = site.swapping.acquire().await.map_err(|_| Vec::new())?;
                let mut login = Box::pin(site.log_in(&startup));
                match timeout(PLACE, &mut login).await {
                    Ok(done) => done,
                    Err(_) => {
                        drop(place);
                        login.await
                    }
                }
            };
            self.login = Some(AbortOnDropHandle::new(tokio::spawn(login)));
        }
        Some(far)
    }

    /// Waits for the login in progress. Without a login in progress it never returns.
    pub(super) async fn logged_in(&mut self) {
        let Some(login) = &mut self.login else {
            return std::future::pending().await;
        };
        let result = login.await;
        self.login = None;
        match result {
            // What comes behind the greeting could be half a message.
            Ok(Ok((usage, session))) if session.rest.is_empty() => {
                self.spare = Some((usage, session));
            }
            _ => self.later(),
        }
    }

    /// Tries again after a pause.
    fn later(&mut self) {
        self.again = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(AGAIN_LAST);
    }

    /// Why the session cannot get another account, as the end of "the session …".
    pub(super) fn obstacle(&self) -> Option<&str> {
        self.obstacle
            .as_ref()
            .map(|(obstacle, _)| obstacle.as_str())
    }

    /// Makes what the session has in the session of the server that is ready. `notes` is for the client, before the
    /// next answer. `None`: the session stays where it is.
    ///
    /// # Errors
    /// The connection to the present server is broken.
    pub(super) async fn swap(
        &mut self,
        from: &mut ReadHalf<Stream>,
        to: &mut WriteHalf<Stream>,
        idle_since: Instant,
        unnamed: &Unnamed,
        notes: &mut Notes,
    ) -> io::Result<Option<Swapped>> {
        let site = self.site.clone();
        let Ok(_place) = site.carrying.try_acquire() else {
            self.again = Instant::now() + CROWDED;
            return Ok(None);
        };
        let Some((usage, session)) = self.spare.take() else {
            return Ok(None);
        };
        let carried = timeout(ANSWER, carried::ask(from, to, notes)).await??;
        let carried = match carried {
            Ok(carried) => carried,
            Err(obstacle) => {
                self.stays(format!("had {obstacle}"), idle_since);
                return Ok(None);
            }
        };
        let at_server = session.at_server(&usage);
        let ends = session.stream.ends();
        let (mut new_from, mut new_to) = tokio::io::split(session.stream);
        let made = carried::make(&mut new_from, &mut new_to, &carried, unnamed, notes);
        match timeout(ANSWER, made).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(obstacle))) => {
                self.stays(format!("had {obstacle}"), idle_since);
                return Ok(None);
            }
            // The new session is broken, and the present one is not.
            Ok(Err(_)) | Err(_) => {
                self.later();
                return Ok(None);
            }
        }
        let new = parameters(&session.greeting);
        for parameter in new.iter().filter(|it| !self.parameters.contains(it)) {
            notes.add(b'S', parameter);
        }
        self.parameters = new;
        self.obstacle = None;
        self.pause = AGAIN_FIRST;
        let terminate = async {
            to.write_all(&message(b'X', b"")).await?;
            to.shutdown().await
        };
        let _ = timeout(CLOSE_LIMIT, terminate).await;
        Ok(Some(Swapped {
            usage,
            at_server,
            ends,
            from: new_from,
            to: new_to,
        }))
    }

    fn stays(&mut self, obstacle: Obstacle, idle_since: Instant) {
        self.obstacle = Some((obstacle, Some(idle_since)));
        self.later();
    }
}

/// The bodies of the first ParameterStatus messages in a greeting.
fn parameters(greeting: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut bytes = 0;
    // The greeting consists of whole messages.
    let _ = Frames::default().follow(
        greeting,
        |_| usize::MAX,
        |kind, body| {
            if kind == b'S'
                && found.len() < PARAMETERS_MAX
                && bytes + body.len() <= PARAMETERS_BYTES
            {
                bytes += body.len();
                found.push(body.to_vec());
            }
        },
    );
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::net::UnixStream;

    use super::super::startup::{First, parse};
    use super::*;

    /// A session for which another one of the server is ready. Its present server has closed the connection.
    fn ready(site: &Arc<Site>) -> (Hold, ReadHalf<Stream>, WriteHalf<Stream>) {
        let Ok(First::Session(startup)) = parse(b"\0\x03\0\0user\0u\0\0") else {
            panic!("it is a startup packet");
        };
        let session = || LoggedIn::for_tests(UnixStream::pair().unwrap().0);
        let mut hold = Hold::new(site.clone(), startup, b"");
        hold.spare = Some((Use::for_tests(), session()));
        let (from, to) = tokio::io::split(session().stream);
        (hold, from, to)
    }

    /// Each session that is carried over uses megabytes if the server is hostile, and a proxy has a thousand
    /// sessions.
    #[tokio::test]
    async fn few_are_carried_over_at_a_time() {
        let site = Arc::new(Site::for_tests());
        let (mut hold, mut from, mut to) = ready(&site);
        let now = Instant::now();
        assert_eq!(hold.next(now, now, false), None);
        let others = site.carrying.available_permits();
        let places = site.carrying.acquire_many(others.try_into().unwrap());
        let places = places.await.unwrap();
        let (none, mut notes) = (Unnamed::None, Notes::default());
        let swapped = hold.swap(&mut from, &mut to, now, &none, &mut notes).await;
        assert!(swapped.unwrap().is_none());
        // The session keeps what is ready, and tries again soon.
        let again = hold.next(Instant::now(), now, false).unwrap();
        assert!(again <= Instant::now() + CROWDED);
        drop(places);
        assert_eq!(hold.next(again, now, false), None);
        let swapped = hold.swap(&mut from, &mut to, now, &none, &mut notes).await;
        assert!(swapped.is_err(), "it asked its present server");
        assert_eq!(site.carrying.available_permits(), others);
    }

    /// Parameters are kept for each session, and compared with each other at a change of the account.
    #[test]
    fn the_parameters_of_a_hostile_server_are_not_remembered() {
        let usual = [&b"server_version\x0018\0"[..], b"TimeZone\0UTC\0"];
        let usual = usual.map(|body| message(b'S', body)).concat();
        assert_eq!(parameters(&usual).len(), 2);
        let many = message(b'S', b"").repeat(50_000);
        assert_eq!(parameters(&many).len(), PARAMETERS_MAX);
        let long = message(b'S', &[b'x'; 1000]).repeat(200);
        let kept: usize = parameters(&long).iter().map(Vec::len).sum();
        assert_eq!(kept, 8000);
    }
}
