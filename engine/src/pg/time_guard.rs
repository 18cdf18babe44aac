//! A guard for statements that must take effect before a timestamp or never: after it the database itself refuses
//! them.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::arrival::Arrival;
use mayfly_protocol::task::{Failure, FailureCode};
use mayfly_protocol::timing::timing;

use super::row::Row;
use super::session::Session;

/// SQLSTATE with which [`refuse_after`] fails: invalid_argument_for_width_bucket_function. No other statement of
/// Mayfly can cause it.
pub(super) const TOO_LATE: &str = "2201G";
/// An older reading is not used: the server's clock may have been set since then.
const RECENT: Duration = Duration::from_secs(2);

/// The query for the database's clock.
pub(super) const CLOCK: &str = "SELECT extract(epoch FROM clock_timestamp())";
const DOING: &str = "reading the database's clock";

/// A reading of the database's clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// The database's clock, in seconds of its epoch.
    at: f64,
    /// When the answer arrived. The database's clock was read before that, so [`Clock::now`] is never ahead of it.
    read: Arrival,
}

impl Clock {
    /// Reads column `n` of the answer to [`CLOCK`], which has just arrived.
    ///
    /// # Errors
    /// `statement_failed` if the text is not a time.
    pub(super) fn read(answer: Option<&Row>, n: usize) -> Result<Self, Failure> {
        let at = answer.and_then(|row| row.parse(n));
        let at = at.ok_or_else(|| Failure::new(FailureCode::StatementFailed, DOING))?;
        let read = Arrival::now();
        Ok(Self { at, read })
    }

    /// A clock from a timestamp that has just arrived.
    pub(super) fn of(now: Timestamp) -> Self {
        Self {
            at: seconds(now),
            read: Arrival::now(),
        }
    }

    /// Whether it can still be used.
    pub(super) fn is_recent(&self) -> bool {
        self.read.elapsed() < RECENT
    }

    /// The database's clock at present, in seconds of its epoch. It is behind by the time that the answer took, and
    /// by the time for which this machine's clocks stood still since then.
    fn now(&self) -> f64 {
        self.at + self.read.elapsed().as_secs_f64()
    }

    /// The timestamp after which the database refuses to begin, in seconds of its epoch. The rest of the budget is
    /// read last: if the process is stopped anywhere in this function, the guard has passed when it continues. This
    /// process's clock stands still while its machine is suspended. `not_after` does not have this weakness: it is a
    /// time of the database's clock, and was set before this process got the task.
    ///
    /// # Errors
    /// `past_deadline` if the budget is used up.
    pub(super) fn guard(
        &self,
        arrived: Arrival,
        not_after: Option<Timestamp>,
    ) -> Result<String, Failure> {
        let now = self.now();
        let left = time_left(arrived.elapsed()).ok_or_else(too_late)?;
        Ok(guard(now, left, not_after))
    }

    /// The timestamp `seconds` from now, by the database's clock.
    ///
    /// # Errors
    /// `statement_failed` beyond the last date of this program.
    pub(super) fn after(&self, seconds: u64) -> Result<Timestamp, Failure> {
        let microseconds = ((self.now() + seconds as f64) * 1e6).round() as i64;
        Timestamp::from_microsecond(microseconds)
            .map_err(|_| Failure::new(FailureCode::StatementFailed, "the TTL is too long"))
    }
}

fn seconds(at: Timestamp) -> f64 {
    at.as_microsecond() as f64 / 1e6
}

/// Reads the clock for [`Clock::guard`].
///
/// # Errors
/// As [`Clock::guard`], and those of any statement.
pub(super) async fn guard_at(
    home: &Session<'_>,
    arrived: Arrival,
    not_after: Option<Timestamp>,
) -> Result<String, Failure> {
    let rows = match home.transact(CLOCK).await {
        Ok(rows) => rows,
        // The next statement notices this, and then uses a new connection.
        Err(error) if error.is_lost() && !home.is_fresh() => return Ok("0".to_owned()),
        Err(error) => return Err(error.into_failure(DOING)),
    };
    Clock::read(rows.first(), 0)?.guard(arrived, not_after)
}

/// The time that is left for a create to begin its statement.
fn time_left(elapsed: Duration) -> Option<Duration> {
    (timing().create_budget - timing().create_statement).checked_sub(elapsed)
}

fn guard(now: f64, left: Duration, not_after: Option<Timestamp>) -> String {
    let own = now + left.as_secs_f64();
    let guard = not_after.map_or(own, |at| own.min(seconds(at)));
    format!("{guard:.6}")
}

/// A statement without rows that fails with [`TOO_LATE`] after `guard`: then the number of buckets is 0, which
/// `width_bucket` refuses. It is not a block of PL/pgSQL, because the server compiles each one.
pub(super) fn refuse_after(guard: &str) -> String {
    format!(
        "SELECT WHERE width_bucket(0, 0, 1, CASE WHEN extract(epoch FROM clock_timestamp()) > {guard} THEN 0 ELSE 1 END) < 0"
    )
}

/// The last statement before COMMIT. Each statement has its own time-out. This statement makes all of them together
/// end with the budget.
pub(super) fn refuse_late_commit(guard: &str) -> String {
    refuse_after(&format!(
        "{guard} + {}",
        timing().create_statement.as_secs()
    ))
}

/// The failure of a task that is too late.
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
        assert!(text.contains("> 100.0 + 4 THEN 0"), "{text}");
    }

    #[test]
    fn an_older_reading_gives_the_same_guard_and_not_for_ever() {
        let ago = |seconds| Arrival::now().earlier(Duration::from_secs(seconds));
        let clock = |at, age| Clock { at, read: ago(age) };
        let arrived = ago(0);
        let guards = [clock(100.0, 0), clock(99.0, 1)].map(|clock| {
            let guard = clock.guard(arrived, None).unwrap();
            guard.parse::<f64>().unwrap()
        });
        assert!((guards[0] - guards[1]).abs() < 0.5, "{guards:?}");
        assert!(clock(100.0, 1).is_recent() && !clock(100.0, 3).is_recent());
        let end = clock(100.0, 1).after(60).unwrap();
        assert!((seconds(end) - 161.0).abs() < 0.5, "{end}");
        let late = timing().create_budget.as_secs();
        assert!(clock(100.0, 0).guard(ago(late), None).is_err());
    }
}
