//! The first connection of a process. It migrates the tables to this version while no other dispatcher writes.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use mayfly_common::sql_session;
use tokio_postgres::error::SqlState;
use tracing::warn;

use super::{ANSWER_TIMEOUT, Inner, Postgres, Url, failed};
use crate::store::health::Cause;
use crate::store::sql::SqlError;
use crate::store::{Role, migrations, turn};

/// The cause of a failed migration. `Some`: another try may succeed, because somebody holds a table that is to be
/// changed.
fn of_migration(error: &refinery_core::Error) -> Option<Cause> {
    let refinery_core::error::Kind::Connection(_, source) = error.kind() else {
        return None;
    };
    let state = source.downcast_ref::<tokio_postgres::Error>()?.code()?;
    (*state == SqlState::LOCK_NOT_AVAILABLE).then_some(Cause::Away)
}

impl Postgres {
    /// Connects, and migrates the tables to this version.
    ///
    /// # Errors
    /// A message for the log, without the password.
    pub(in crate::store) fn open(url: Url, offset: Arc<AtomicI64>) -> Result<Self, SqlError> {
        // Two dispatchers may start at once on an empty database. A migration commits its own transaction, so
        // another connection holds the turn.
        let mut turn = Inner::new(Role::Alone, url.clone(), offset.clone())?;
        turn.take_turn_to_migrate()?;
        let mut inner = Inner::new(Role::Alone, url, offset)?;
        inner.connect()?;
        let Inner {
            runtime, session, ..
        } = &mut inner;
        let client = &mut session.as_mut().ok_or(SqlError::Lost)?.client;
        // During an upgrade a dispatcher of the previous version may start on the tables of this version: migrations
        // of one version only add.
        let migrated = runtime.block_on(async {
            // Migrations name their tables without a schema, as those of SQLite do. PostgreSQL still searches
            // `pg_catalog` first, and each call matches one of its functions exactly. Dispatchers of the previous
            // version wait for their turn during a migration. So if a dump holds a table, the wait is short, and the
            // start tries again.
            let path =
                client.batch_execute("SET search_path = public, pg_temp; SET lock_timeout = '2s'");
            path.await.map_err(|error| failed(&error))?;
            let runner = migrations::postgres()
                .map_err(|error| SqlError::Postgres(error.to_string(), None))?
                .set_abort_missing(false);
            if let Err(error) = runner.run_async(client).await {
                return Err(match client.is_closed() {
                    true => SqlError::Lost,
                    false => SqlError::Postgres(error.to_string(), of_migration(&error)),
                });
            }
            let path = format!("{}SET lock_timeout = '15s'", sql_session::SET_PATH);
            let path = client.batch_execute(&path);
            path.await.map_err(|error| failed(&error))
        });
        migrated?;
        turn.run(async |client| client.batch_execute("COMMIT").await)?;
        Ok(Self(RefCell::new(inner)))
    }
}

impl Inner {
    /// Connects, makes the table of the turn if it does not exist, and takes the turn until the connection ends.
    fn take_turn_to_migrate(&mut self) -> Result<(), SqlError> {
        self.connect()?;
        while self.cells(turn::KIND)?.is_empty() {
            // Another dispatcher may make the table at the same time.
            let made = self.run(async |client| client.batch_execute(turn::MAKE).await);
            if let Err(error) = made
                && self.cells(turn::KIND)?.is_empty()
            {
                return Err(error);
            }
        }
        self.batch(&format!(
            "SET idle_in_transaction_session_timeout = '10min'; {}WRITE; {}",
            sql_session::BEGIN,
            turn::take(),
        ))?;
        self.wait_for_older(&turn::take_from_older(), ANSWER_TIMEOUT)?;
        self.split_turn()
    }

    /// Makes slots if the store has none. If another session's statement keeps the table locked, jobs about one
    /// lease continue to take turns until the next start.
    fn split_turn(&mut self) -> Result<(), SqlError> {
        if self.cells(turn::KIND)?.first().map(String::as_str) != Some("r") {
            return Ok(());
        }
        self.batch("SAVEPOINT split; SET LOCAL lock_timeout = '3s'")?;
        match self.batch(&turn::split()) {
            Ok(()) => self.batch("RELEASE split; SET LOCAL lock_timeout = '15s'"),
            Err(error) => {
                warn!(%error, "leases are recorded one after another, not side by side, until the next start");
                self.batch("ROLLBACK TO split")
            }
        }
    }
}
