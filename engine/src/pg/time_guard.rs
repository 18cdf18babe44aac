//! The guard of statements that must take effect before a timestamp or never: the database itself
//! refuses them after it.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::arrival::Arrival;
use mayfly_protocol::task::{Failure, FailureCode};
use mayfly_protocol::timing::timing;

use super::row::Row;
use super::session::Session;
use super::sql::literal;

/// SQLSTATE of this guard (PostgreSQL itself has no class `MF`).
pub(super) const TOO_LATE: &str = "MF001";

/// The question for the database's clock.
pub(super) const CLOCK: &str = "SELECT extract(epoch FROM clock_timestamp())";
const DOING: &str = "reading the database's clock";

/// The database's clock, and what was left of the task's budget after it was read. In this order: a process
/// that is stopped in between gets a guard that has passed.
pub(super) struct Clock {
    /// Seconds of the database's epoch.
    now: f64,
    left: Option<Duration>,
}

impl Clock {
    /// From the answer to [`CLOCK`], which has just come.
    ///
    /// # Errors
    /// `statement_failed` if it is no answer.
    pub(super) fn read(answer: Option<&Row>, arrived: Arrival) -> Result<Self, Failure> {
        let now = answer.and_then(|row| row.parse(0));
        let now = now.ok_or_else(|| Failure::new(FailureCode::StatementFailed, DOING))?;
        let left = time_left(arrived.elapsed());
        Ok(Self { now, left })
    }

    /// The timestamp after which the database refuses to begin, in seconds of its epoch. This process's clock
    /// stands still while its machine is suspended; `not_after`, by the database's clock, was fixed before
    /// this process had the task.
    ///
    /// # Errors
    /// `past_deadline` if the budget was used up.
    pub(super) fn guard(&self, not_after: Option<Timestamp>) -> Result<String, Failure> {
        let left = self.left.ok_or_else(too_late)?;
        Ok(guard(self.now, left, not_after))
    }
}

/// Reads the clock for [`Clock::guard`].
///
/// # Errors
/// As [`Clock::guard`], and as any statement.
pub(super) async fn guard_at(
    home: &Session<'_>,
    arrived: Arrival,
    not_after: Option<Timestamp>,
) -> Result<String, Failure> {
    let rows = match home.transact(CLOCK).await {
        Ok(rows) => rows,
        // The statement to come finds that out, and then goes to a new connection.
        Err(error) if error.is_lost() && !home.is_fresh() => return Ok("0".to_owned()),
        Err(error) => return Err(error.into_failure(DOING)),
    };
    Clock::read(rows.first(), arrived)?.guard(not_after)
}

/// How long after its arrival a create may still begin its statement.
fn time_left(elapsed: Duration) -> Option<Duration> {
    (timing().create_budget - timing().create_statement).checked_sub(elapsed)
}

fn guard(now: f64, left: Duration, not_after: Option<Timestamp>) -> String {
    let own = now + left.as_secs_f64();
    let guard = not_after.map_or(own, |at| own.min(at.as_microsecond() as f64 / 1e6));
    format!("{guard:.6}")
}

/// A statement of PL/pgSQL that refuses to go on after `guard`.
pub(super) fn refuse_after(guard: &str) -> String {
    format!(
        "IF extract(epoch FROM clock_timestamp()) > {guard} THEN \
         RAISE EXCEPTION 'too late' USING ERRCODE = '{TOO_LATE}'; END IF;"
    )
}

/// The last statement before COMMIT. Each statement has a time-out of its own; with this, all of them
/// together end with the budget.
pub(super) fn refuse_late_commit(guard: &str) -> String {
    let limit = format!("{guard} + {}", timing().create_statement.as_secs());
    let body = format!("BEGIN {} END", refuse_after(&limit));
    format!("DO {}", literal(&body))
}

/// The failure of a task whose time is over.
pub(super) fn too_late() -> Failure {
    Failure::new(FailureCode::PastDeadline, "the create came too late")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_earlier_bound_guards() {
        let second = Duration::from_secs(1);
        let at = |text: &str| Some(text.parse::<Timestamp>().unwrap());
        assert_eq!(guard(100.0, second, None), "101.000000");
        assert_eq!(
            guard(100.0, second, at("1970-01-01T00:01:40.5Z")),
            "100.500000"
        );
        assert_eq!(
            guard(100.0, second, at("1970-01-01T00:10:00Z")),
            "101.000000"
        );
    }

    #[test]
    fn nothing_begins_in_the_last_part_of_the_budget() {
        assert_eq!(
            time_left(Duration::ZERO),
            Some(timing().create_budget - timing().create_statement)
        );
        let end = timing().create_budget - timing().create_statement;
        assert_eq!(time_left(end), Some(Duration::ZERO));
        assert_eq!(time_left(end + Duration::from_millis(1)), None);
    }

    #[test]
    fn a_commit_has_the_time_of_one_statement_more() {
        let text = refuse_late_commit("100.0");
        assert!(text.contains("> 100.0 + 4 THEN"), "{text}");
        assert!(text.contains(TOO_LATE));
    }
}
