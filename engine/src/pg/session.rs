//! One connection to PostgreSQL in use: transactions under the engine's own settings, and their answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mayfly_common::sql_session::{self, Access, Limits};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Endpoint;
use mayfly_protocol::task::Failure;
use tokio_postgres::types::{ToSql, Type};

use super::answer::{ANSWER_GRACE, run, run_each};
use super::connect::Connected;
use super::facts::Facts;
use super::kept::Lent;
use super::limits::ServerLimits;
use super::row::{Row, Rows};
use super::servers::Servers;
use super::sharing::Resting;
use super::slot::Slot;
use super::sql;
use super::sql_error::SqlError;
use super::target_key::Key;
use super::time_guard::Clock;

/// The server's time limit for one statement, including its wait for locks.
pub(crate) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of tries of one transaction if other sessions write the same rows, and the pause between two.
pub(super) const TRIES: u32 = 5;
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Maximum number of idle connections for one database of a target.
const IDLE_MAX: usize = 8;
/// If the admin or the database has a connection limit, a connection is replaced after this time. The next connection
/// shows whether other clients have room.
const LIMITED_KEEP: Duration = Duration::from_secs(2);

/// A connection in use. [`Session::release`] returns it. Dropping it closes it, which rolls back an open
/// transaction.
pub(crate) struct Session<'s> {
    connected: Connected,
    key: Key,
    servers: &'s Servers,
    limits: Arc<ServerLimits>,
    fresh: bool,
    /// Whether it must not be used again: it is lost, or a transaction may still be open.
    unsound: AtomicBool,
    /// Whether a transaction of this engine is open.
    begun: AtomicBool,
    /// `Some`: it is the connection that is kept for revocations, and is returned there.
    lent: Option<Lent>,
    /// Maximum wait of a statement for a lock.
    lock: Duration,
    /// Whether commits do not wait for standbys.
    local: bool,
    /// Its place among the engine's connections to the server. `None`: it is the kept connection.
    slot: Option<Slot>,
}

/// The tries of one transaction while others write the same rows: at most [`TRIES`], [`RETRY_PAUSE`] apart.
#[derive(Default)]
pub(super) struct Tries(u32);

impl Tries {
    /// Counts a failed try. Returns whether another try follows. After a wait for a lock that ended at its time limit
    /// none follows.
    pub(super) fn take_another(&mut self, error: &SqlError) -> bool {
        self.0 += 1;
        error.is_worth_retrying() && self.0 < TRIES
    }
}

/// Whether statements may be sent: they begin a transaction of the engine, or one is open. Otherwise they would run
/// under settings that the database's owner may have planted.
fn is_guarded(statements: &str, begun: bool) -> bool {
    begun || statements.starts_with(sql_session::BEGIN) || statements == COMMIT
}

const COMMIT: &str = "COMMIT";

impl<'s> Session<'s> {
    /// A connection in use. `slot` is its place among the engine's connections to the server.
    pub(super) fn new(
        servers: &'s Servers,
        connected: Connected,
        key: Key,
        limits: Arc<ServerLimits>,
        fresh: bool,
        slot: Option<Slot>,
    ) -> Self {
        Self {
            connected,
            key,
            servers,
            limits,
            fresh,
            unsound: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            lent: None,
            lock: LOCK_TIMEOUT,
            local: false,
            slot,
        }
    }

    /// Marks it as the kept connection, which is returned there.
    pub(super) fn lent(self, lent: Lent) -> Self {
        Self {
            lent: Some(lent),
            ..self
        }
    }

    /// The host and port it leads to.
    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.connected.endpoint
    }

    /// The facts about the server.
    pub(crate) fn facts(&self) -> Arc<Facts> {
        self.connected.facts.clone()
    }

    /// The last reading of the server's clock on this connection, if it is recent.
    pub(super) fn clock(&self) -> Option<Clock> {
        self.connected.clock.filter(Clock::is_recent)
    }

    /// Stores a reading for the connection's next use.
    pub(super) fn put_clock(&mut self, clock: Clock) {
        self.connected.clock = Some(clock);
    }

    /// Whether this connection was made for this use.
    pub(crate) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Makes commits not wait for standbys. An end must not wait for a standby that is unreachable. If an end is
    /// lost in a failover, the sweep finds it.
    pub(super) fn for_ends(mut self) -> Self {
        self.local = true;
        self
    }

    /// Limits the wait of each later statement for a lock.
    pub(super) fn wait_for_locks(&mut self, limit: Duration) {
        self.lock = limit;
    }

    /// Begins a transaction that writes, under the engine's settings: see [`sql_session::begin`].
    pub(crate) fn begin(&self) -> String {
        self.begin_with(STATEMENT_TIMEOUT, self.lock)
    }

    /// Like [`Session::begin`], with other time-outs.
    pub(crate) fn begin_with(&self, statement: Duration, lock: Duration) -> String {
        let limits = Limits {
            statement,
            lock,
            idle_in_transaction: STATEMENT_TIMEOUT,
        };
        let Facts {
            version, superuser, ..
        } = *self.connected.facts;
        let access = match self.connected.facts.standby {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let mut begin =
            sql_session::begin(access, &limits) + &sql_session::newer(version, superuser);
        if self.local {
            begin.push_str("SET LOCAL synchronous_commit = local; ");
        }
        begin
    }

    /// Whether the connection can no longer be used.
    pub(crate) fn is_lost(&self) -> bool {
        self.connected.client.is_closed() || self.unsound.load(Ordering::Relaxed)
    }

    /// Runs statements unchanged; inside a transaction if [`Session::begin`] is among them.
    pub(crate) async fn query(&self, statements: &str) -> Result<Rows, SqlError> {
        self.query_within(statements, STATEMENT_TIMEOUT + ANSWER_GRACE)
            .await
    }

    /// Like [`Session::query`], with a time limit for the answer.
    pub(crate) async fn query_within(
        &self,
        statements: &str,
        limit: Duration,
    ) -> Result<Rows, SqlError> {
        let answers = self.query_each(statements, limit).await;
        answers.map(|answers| answers.concat())
    }

    /// Like [`Session::query_within`], with separate rows for each statement.
    async fn query_each(&self, statements: &str, limit: Duration) -> Result<Vec<Rows>, SqlError> {
        if statements.contains(sql::NOT_UTF8) {
            return Err(SqlError::ours("a name is not UTF-8"));
        }
        if !is_guarded(statements, self.begun.load(Ordering::Relaxed)) {
            return Err(SqlError::ours("a statement outside of a transaction"));
        }
        // After an error the transaction stays open until it is rolled back.
        self.begun.store(true, Ordering::Relaxed);
        let done = run_each(&self.connected.client, statements, limit).await;
        if done.is_ok() {
            self.begun
                .store(!statements.ends_with(COMMIT), Ordering::Relaxed);
        }
        match &done {
            Err(error) if error.is_lost() => {
                if error.slow
                    && let Some(driver) = &self.connected.driver
                {
                    driver.abort();
                }
                self.unsound.store(true, Ordering::Relaxed);
                self.servers.close_idle_of(&self.key.target);
            }
            Ok(_) | Err(_) => self.limits.answered(),
        }
        done
    }

    /// Sets a setting for the rest of the transaction. The value is a parameter, so it is not in the text of a
    /// statement. Nothing else uses the extended query protocol.
    pub(super) async fn set_local(&self, name: &str, value: &Secret) -> Result<(), SqlError> {
        if !self.begun.load(Ordering::Relaxed) {
            return Err(SqlError::ours("a setting outside of a transaction"));
        }
        let value = value.expose();
        let setting = async {
            let text = "SELECT pg_catalog.set_config($1, $2, true) IS NOT NULL";
            let parameters: [(&(dyn ToSql + Sync), Type); 2] =
                [(&name, Type::TEXT), (&value, Type::TEXT)];
            self.connected.client.query_typed(text, &parameters).await
        };
        let done = match tokio::time::timeout(ANSWER_GRACE, setting).await {
            Ok(done) => done.map(drop).map_err(SqlError::from),
            Err(_) => Err(SqlError {
                state: None,
                message: "no answer in time".to_owned(),
                lost: true,
                slow: true,
            }),
        };
        if done.as_ref().is_err_and(SqlError::is_lost) {
            self.unsound.store(true, Ordering::Relaxed);
        }
        done
    }

    /// Runs statements in a transaction of their own, in one round trip. After an error the transaction is rolled
    /// back, and the session can still be used.
    pub(crate) async fn transact(&self, statements: &str) -> Result<Rows, SqlError> {
        self.transact_within(STATEMENT_TIMEOUT, LOCK_TIMEOUT, statements)
            .await
    }

    /// Like [`Session::transact`]. Returns the first row of the answer, or an empty row.
    ///
    /// # Errors
    /// The statement failed. The failure's message begins with `doing`.
    pub(super) async fn first_row(&self, doing: &str, query: &str) -> Result<Row, Failure> {
        let rows = self.transact(query).await;
        let rows = rows.map_err(|error| error.into_failure(doing))?;
        Ok(rows.into_iter().next().unwrap_or_default())
    }

    /// Like [`Session::transact`], for several queries. Returns the rows of each.
    pub(super) async fn ask(&self, questions: &[String]) -> Result<Vec<Rows>, SqlError> {
        let text = self.begin() + &questions.join("; ") + "; " + COMMIT;
        let done = self
            .query_each(&text, STATEMENT_TIMEOUT + ANSWER_GRACE)
            .await;
        if done.is_err() {
            self.rollback().await;
        }
        let mut answers = done?;
        // COMMIT has an answer of its own.
        answers.pop();
        Ok(answers.split_off(answers.len().saturating_sub(questions.len())))
    }

    /// Like [`Session::transact`]. It is repeated if other sessions write the same rows, see [`Tries`].
    pub(super) async fn transact_retrying(&self, statements: &str) -> Result<Rows, SqlError> {
        let mut tries = Tries::default();
        loop {
            let done = self.transact(statements).await;
            match &done {
                Err(error) if tries.take_another(error) => tokio::time::sleep(RETRY_PAUSE).await,
                Ok(_) | Err(_) => return done,
            }
        }
    }

    /// Like [`Session::transact`], with other time-outs.
    pub(super) async fn transact_within(
        &self,
        statement: Duration,
        lock: Duration,
        statements: &str,
    ) -> Result<Rows, SqlError> {
        let begin = self.begin_with(statement, lock);
        let done = self.query(&format!("{begin}{statements}; {COMMIT}")).await;
        if done.is_err() {
            self.rollback().await;
        }
        done
    }

    /// Rolls an open transaction back.
    pub(crate) async fn rollback(&self) {
        // If the ROLLBACK fails, the connection is not used again. This ends the transaction too.
        if run(&self.connected.client, "ROLLBACK", ANSWER_GRACE)
            .await
            .is_err()
        {
            self.unsound.store(true, Ordering::Relaxed);
        }
        self.begun.store(false, Ordering::Relaxed);
    }

    /// Rolls back, and returns a kept connection to its place. Any other connection is closed.
    pub(crate) async fn give_up(self) {
        if self.lent.is_some() {
            self.rollback().await;
            self.release();
        }
    }

    /// Takes the connection out of the session.
    pub(super) fn into_connected(self) -> Connected {
        self.connected
    }

    /// Returns the connection for other tasks. If a transaction is open, the connection is closed instead.
    pub(crate) fn release(self) {
        if self.is_lost() || self.begun.load(Ordering::Relaxed) {
            return;
        }
        if let Some(mut lent) = self.lent {
            return lent.give_back(self.connected);
        }
        let Some(mut slot) = self.slot else {
            return;
        };
        let facts = &self.connected.facts;
        let is_old = facts.slots_left.is_some() && facts.asked.elapsed() > LIMITED_KEEP;
        if slot.rest() && !is_old {
            let mut idle = self.servers.idle();
            let list = idle.entry(self.key).or_default();
            if list.len() < IDLE_MAX {
                list.push(Resting::new(self.connected, slot));
            }
        }
        self.limits.budget.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_postgres::error::SqlState;

    #[test]
    fn only_conflicts_are_retried_and_not_for_ever() {
        let error = |state: &str| SqlError {
            state: Some(SqlState::from_code(state)),
            message: String::new(),
            lost: false,
            slow: false,
        };
        for (state, expected) in [
            ("40001", TRIES),
            ("XX000", TRIES),
            ("55P03", 1),
            ("42501", 1),
        ] {
            let (mut tries, mut count) = (Tries::default(), 1);
            while tries.take_another(&error(state)) {
                count += 1;
            }
            assert_eq!(count, expected, "{state}");
        }
    }

    #[test]
    fn nothing_runs_outside_of_a_transaction() {
        let begin = format!("{}WRITE; SELECT 1; COMMIT", sql_session::BEGIN);
        for (statements, begun, may) in [
            (begin.as_str(), false, true),
            ("COMMIT", false, true),
            ("ALTER ROLE r NOLOGIN", true, true),
            ("ALTER ROLE r NOLOGIN", false, false),
            ("SELECT 1; COMMIT", false, false),
            ("BEGIN; SELECT 1; COMMIT", false, false),
            ("", false, false),
        ] {
            assert_eq!(is_guarded(statements, begun), may, "{statements}");
        }
    }
}
