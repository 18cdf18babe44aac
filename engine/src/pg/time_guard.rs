//! The guard of statements that must take effect before a timestamp or never: the database itself
//! refuses them after it.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::arrival::Arrival;
use mayfly_protocol::task::{Failure, FailureCode};
use mayfly_protocol::timing::timing;

use super::session::Session;
use super::sql::literal;

/// SQLSTATE of this guard (PostgreSQL itself has no class `MF`).
pub(super) const TOO_LATE: &str = "MF001";

/// The timestamp after which the database refuses to begin, in seconds of its epoch. It is computed
/// from the database's clock first and from this process's clock after it: a process that is stopped
/// in between gets a guard that has passed. This process's clock stands still while its machine is
/// suspended; `not_after`, by the database's clock, was fixed before this process had the task.
///
/// # Errors
/// `past_deadline` if the budget is used up; as any statement.
pub(super) async fn guard_at(
    home: &Session<'_>,
    arrived: Arrival,
    not_after: Option<Timestamp>,
) -> Result<String, Failure> {
    let doing = "reading the database's clock";
    let clock = home.transact("SELECT extract(epoch FROM clock_timestamp())");
    let rows = match clock.await {
        Ok(rows) => rows,
        // The statement to come finds that out, and then goes to a new connection.
        Err(error) if error.is_lost() && !home.is_fresh() => return Ok("0".to_owned()),
        Err(error) => return Err(error.into_failure(doing)),
    };
    let now: f64 = rows
        .first()
        .and_then(|row| row.parse(0))
        .ok_or_else(|| Failure::new(FailureCode::StatementFailed, doing))?;
    let left = time_left(arrived.elapsed()).ok_or_else(too_late)?;
    Ok(guard(now, left, not_after))
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
