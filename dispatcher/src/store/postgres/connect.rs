//! Opens the connection, opens it again after a pause if it was lost, and closes it.

use std::time::{Duration, Instant};

use mayfly_common::sql_session;
use tracing::{info, warn};

use super::Inner;
use super::primary::{self, Timeline};
use super::session::{Session, is_of_settings, open};
use super::url::{CONNECT_TIMEOUT, Url};
use crate::store::health::Cause;
use crate::store::sql::SqlError;
use crate::store::{Role, turn};

/// Pause between two checks whether the store has slots.
const LOOK_FOR_SLOTS: Duration = Duration::from_secs(30);
/// Pause after a failed connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(500);

impl Inner {
    pub(super) fn is_closed(&self) -> bool {
        self.session
            .as_ref()
            .is_none_or(|session| session.client.is_closed())
    }

    pub(super) fn is_at_former_primary(&self) -> bool {
        let timeline = self.timeline.as_ref();
        timeline.is_some_and(|timeline| self.url.primary.is_newer_than(timeline))
    }

    /// Closes the connection. Its transaction is lost.
    pub(super) fn close(&mut self) {
        if let Some(session) = self.session.take() {
            session.close(&self.runtime);
        }
    }

    pub(super) fn connect_in_slot(&mut self) -> Result<(), SqlError> {
        let no_slots = || SqlError::Postgres("the store has no slots yet".to_owned(), None);
        if self.unsplit.is_some_and(|at| at.elapsed() < LOOK_FOR_SLOTS) {
            return Err(no_slots());
        }
        self.connect()?;
        if self.role != Role::Slot {
            return Ok(());
        }
        if self.cells(turn::KIND)?.first().map(String::as_str) != Some("v") {
            self.unsplit = Some(Instant::now());
            self.close();
            return Err(no_slots());
        }
        // If there are more sessions than slots, two sessions share a slot.
        let chosen = self.cells(&turn::choose())?;
        self.slot = chosen.first().and_then(|n| n.parse().ok()).unwrap_or(0);
        Ok(())
    }

    pub(super) fn connect(&mut self) -> Result<(), SqlError> {
        if self.failed.is_some_and(|at| at.elapsed() < CONNECT_PAUSE) {
            return Err(SqlError::Postgres(
                "the store's database is unreachable".to_owned(),
                Some(Cause::Away),
            ));
        }
        self.close();
        self.statements.clear();
        let place = &self.url.place;
        let opened = self.runtime.block_on(connect_to_primary(&self.url));
        match opened {
            Ok((session, timeline)) => {
                self.timeline = timeline;
                if self.failed.take().is_some() {
                    info!(place, "the store's database is back");
                }
                self.session = Some(session);
                self.was_connected = true;
                Ok(())
            }
            Err(error) => {
                if self.failed.replace(Instant::now()).is_none() && self.was_connected {
                    warn!(place, %error, "the store's database cannot be reached; trying again");
                }
                let cause = error.cause();
                Err(SqlError::Postgres(format!("{place}: {error}"), cause))
            }
        }
    }
}

/// Opens a session at a server that is not a former primary.
async fn connect_to_primary(url: &Url) -> Result<(Session, Option<Timeline>), SqlError> {
    for tried in 0..=primary::tries(url) {
        let session = match tried {
            0 => connect_in_time(url).await?,
            _ => connect_in_time(&primary::shuffled(url)).await?,
        };
        let timeline = Timeline::of(&session.client).await;
        let is_former = timeline
            .as_ref()
            .is_some_and(|timeline| !url.primary.saw(timeline));
        if !is_former {
            return Ok((session, timeline));
        }
        session.end().await;
    }
    Err(SqlError::Postgres(
        "only a former primary of the database answers; if it is the primary again, restart this dispatcher"
            .to_owned(),
        Some(Cause::Away),
    ))
}

async fn connect_in_time(url: &Url) -> Result<Session, SqlError> {
    let config = &url.config;
    let opening = async {
        let session = match open(url, None).await {
            Err(error) if is_of_settings(&error) => {
                let given = [config.get_options(), Some(sql_session::STARTUP_OPTIONS)];
                let options: Vec<&str> = given.into_iter().flatten().collect();
                open(url, Some(&options.join(" "))).await
            }
            opened => opened,
        };
        session.map_err(SqlError::from)
    };
    let hosts = u32::try_from(config.get_hosts().len()).unwrap_or(1).max(1);
    let timed = tokio::time::timeout(CONNECT_TIMEOUT * hosts, opening).await;
    let late = || SqlError::Postgres("no answer in time".to_owned(), Some(Cause::Away));
    timed.unwrap_or_else(|_| Err(late()))
}
