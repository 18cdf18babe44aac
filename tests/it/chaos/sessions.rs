//! Applications that use a session for longer than the life of their account.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_tests::seconds;

use super::tally::Wrong;
use super::world::{Held, World};

/// Between two queries of a session.
const PAUSE: Duration = Duration::from_millis(250);

impl World {
    /// Opens a session and uses it until it is ended. This must not happen before the account's end, and must happen
    /// soon after it.
    pub(super) async fn keep_session(self: Arc<Self>, role: String) {
        let crashes = self.crashes.load(Ordering::Relaxed);
        let Some(mut held) = self.held_as(&role) else {
            return;
        };
        let opening = tokio::time::timeout(seconds(5), held.credential.login());
        // Other tests check that a login works.
        let Ok(Ok(session)) = opening.await else {
            return;
        };
        let mut seen = Timestamp::now();
        let failed = loop {
            if let Err(error) = session.batch_execute("SELECT count(*) FROM items").await {
                break error;
            }
            seen = Timestamp::now();
            held = self.held_as(&role).unwrap_or(held);
            tokio::time::sleep(PAUSE).await;
        };
        let now = Timestamp::now();
        held = self.held_as(&role).unwrap_or(held);
        if crashes != self.crashes.load(Ordering::Relaxed) {
            // The server ended the session before the account's end.
            return;
        }
        let mut tally = self.tally.lock().unwrap();
        let lease = &held.credential.lease;
        // An administrator ended the session, or it was found closed.
        let is_ended = failed.code().is_none_or(|code| code.code() == "57P01");
        if !is_ended {
            let words = format!("session of {role}, lease {lease}: {failed:?}");
            tally.wrong(Wrong::LateSession, words);
        } else if !held.revoked.load(Ordering::Relaxed) {
            let end = held.end;
            if now < end - SignedDuration::from_secs(1) {
                let words = format!("session of {role}, lease {lease}, ends {end}: {failed:?}");
                tally.wrong(Wrong::EarlyDeath, words);
            } else if !held.unsure {
                tally.ended(|tally| &mut tally.sessions, held.life(), seen, now);
                if tally.is_too_late(held.life(), seen) {
                    let words = format!("session of {role}, lease {lease}, ended {end}");
                    tally.wrong(Wrong::LateSession, words);
                }
            }
        }
    }

    fn held_as(&self, role: &str) -> Option<Held> {
        self.held.lock().unwrap().get(role).cloned()
    }
}
