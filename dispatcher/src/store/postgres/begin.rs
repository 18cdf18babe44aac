//! Begins a transaction: with its turn or its slot, and with the queries that are sent ahead.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use jiff::Timestamp;
use mayfly_common::sql_session;

use super::cells::references;
use super::session::Session;
use super::{ANSWER_TIMEOUT, Inner};
use crate::store::health::Cause;
use crate::store::sql::{Query, Row, SqlError};
use crate::store::{Role, turn};

/// Maximum time in which the server passes the locks of a turn on.
const HANDOVER: Duration = Duration::from_millis(500);
/// Begins a transaction that only reads. All its statements see the same rows.
const READ: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

impl Inner {
    pub(super) fn begin(&mut self, ahead: &[Query]) -> Result<(), SqlError> {
        if self.is_closed() || self.is_at_former_primary() {
            self.connect_in_slot()?;
        }
        let (begin, look) = match self.role {
            Role::Alone => (turn::take(), turn::take_from_older()),
            Role::Slot => (turn::take_slot(self.slot), turn::take_beside_older()),
            Role::Reads => return self.begun(READ, None, ahead).map(drop),
        };
        let begin = format!("{}WRITE; {begin}", sql_session::BEGIN);
        let sent = Timestamp::now().as_millisecond();
        let found = self.begun(&begin, Some(&look), ahead)?;
        let heard = Timestamp::now().as_millisecond();
        let found = found.first().ok_or(SqlError::NoRow)?;
        let (has_turn, theirs): (bool, i64) = (found.get(0)?, found.get(1)?);
        // The clock was read between `sent` and `heard`. A late answer must not set the clock back, because leaders
        // and deadlines depend on it.
        let known = self.offset.load(Ordering::Relaxed);
        let (least, most) = (theirs - heard, theirs - sent);
        let offset = known.clamp(least.min(most), most.max(least));
        self.offset.store(offset, Ordering::Relaxed);
        if has_turn {
            return Ok(());
        }
        // The answers may be older than the other dispatcher's turn.
        self.ahead.clear();
        let within = match self.role {
            Role::Alone => ANSWER_TIMEOUT,
            // The server may release the lock of a slot before the lock of a dispatcher from two versions ago. The
            // writer waits longer.
            Role::Slot | Role::Reads => HANDOVER,
        };
        self.wait_for_older(&look, within)
            .inspect_err(|_| self.close())
    }

    /// Sends the statements that begin a transaction, then `look`, then the queries `ahead`, all in one round trip.
    /// Returns the rows of `look`.
    pub(super) fn begun(
        &mut self,
        begin: &str,
        look: Option<&str>,
        ahead: &[Query],
    ) -> Result<Vec<Row>, SqlError> {
        self.later.clear();
        self.ahead.clear();
        let mut statements = Vec::new();
        if let Some(look) = look {
            statements.push((self.prepare_as_is(look)?, Vec::new()));
        }
        for query in ahead {
            statements.push((self.prepare(&query.sql)?, references(&query.cells)));
        }
        let (begun, answers) = self.run(async |client| {
            // The statements are sent in this order. The queries wait for the locks of the first statements.
            let queries = statements
                .iter()
                .map(|(sql, cells)| client.query(sql, cells));
            Ok(join(client.batch_execute(begin), join_all(queries)).await)
        })?;
        let mut answers = answers.into_iter();
        let looked = self.judged(begun).and_then(|()| match look {
            Some(_) => self.rows(answers.next()),
            None => Ok(Vec::new()),
        });
        for query in ahead {
            // The job that asks for the answer gets its failure.
            match self.rows(answers.next()) {
                Err(SqlError::Lost) => return Err(SqlError::Lost),
                answer => self.ahead.push((query.clone(), answer)),
            }
        }
        // The connection may be in a failed transaction, in which no other transaction can begin.
        looked.inspect_err(|_| self.close())
    }

    /// Waits until no dispatcher from two versions ago has its turn. `look` is the query of [`turn`] for this.
    pub(super) fn wait_for_older(&mut self, look: &str, within: Duration) -> Result<(), SqlError> {
        let until = Instant::now() + within;
        loop {
            let found = self.cells(look)?;
            if found.first().is_some_and(|cell| cell == "1") {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(SqlError::Postgres(
                    "a dispatcher of an earlier version does not end its turn".to_owned(),
                    Some(Cause::Away),
                ));
            }
            std::thread::sleep(turn::LOOK_EVERY);
        }
    }

    /// Sends ROLLBACK and does not wait. Its answer is read together with that of the next BEGIN.
    pub(super) fn send_rollback(&mut self) {
        let Some(Session { client, .. }) = &self.session else {
            return;
        };
        self.runtime.block_on(async {
            let mut sent = pin!(client.batch_execute("ROLLBACK"));
            // The first poll passes the statement to the connection, whose task then writes it.
            std::future::poll_fn(|context| {
                let _ = sent.as_mut().poll(context);
                Poll::Ready(())
            })
            .await;
            tokio::task::yield_now().await;
        });
    }
}
