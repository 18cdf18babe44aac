//! The first step of an end: looks the roles up, and takes the login from those that are due, in one transaction.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::task::{Failure, FailureCode, Revoke};

use super::due::{Candidate, Due, Results};
use super::row::Rows;
use super::session::{RETRY_PAUSE, Session, Tries};
use super::sql::{ident, lease_comment, literals, timestamp_text};
use super::sql_error::SqlError;
use mayfly_protocol::revocation::{Ended, Found, Verdict, verdict};

/// Time limit of the first look. It reads a catalog, and shows whether the server still answers.
pub(super) const LOOK_WITHIN: Duration = Duration::from_secs(5);

/// Looks the roles up, and takes the login from those that are due in the same transaction. A role whose end was
/// moved meanwhile keeps its login. Fails if a lock is not available in time.
pub(super) async fn disable_logins<'t>(
    home: &Session<'_>,
    candidates: &[Candidate<'t>],
    identity: &str,
    results: &mut Results,
) -> Result<Vec<Due<'t>>, SqlError> {
    let mut tries = Tries::default();
    loop {
        let done = once(home, candidates, identity, results).await;
        if done.is_err() {
            home.rollback().await;
        }
        match &done {
            Err(error) if tries.take_another(error) => tokio::time::sleep(RETRY_PAUSE).await,
            Ok(_) | Err(_) => return done,
        }
    }
}

async fn once<'t>(
    home: &Session<'_>,
    candidates: &[Candidate<'t>],
    identity: &str,
    results: &mut Results,
) -> Result<Vec<Due<'t>>, SqlError> {
    if candidates.is_empty() {
        return Ok(vec![]);
    }
    let names = candidates.iter().map(|one| one.task.role.as_str());
    let rows = home
        .query_within(&format!("{}{}", home.begin(), look_up(names)), LOOK_WITHIN)
        .await?;
    let mut due = Vec::new();
    for Candidate { index, task, .. } in candidates.iter().copied() {
        let found = parse_found(&rows, task);
        match verdict(task.mode, found.as_ref()) {
            Verdict::Due => {
                let oid = found.map_or(0, |found| found.oid);
                due.push(Due { task, oid, index });
            }
            Verdict::Absent => results.set(
                index,
                Ok(Ended::Absent {
                    at: parse_now(&rows),
                    server: identity.to_owned(),
                }),
            ),
            Verdict::NotDue { until, left } => {
                results.set(index, Ok(Ended::NotDue { until, left }));
            }
            Verdict::Foreign => results.set(index, Err(foreign(task))),
        }
    }
    if due.is_empty() {
        home.query("COMMIT").await?;
        return Ok(due);
    }
    due.sort_by(|one, other| one.task.role.cmp(&other.task.role));
    let sorted = || due.iter().map(|role| role.task.role.as_str());
    let mut text: Vec<String> = sorted()
        .map(|name| format!("ALTER ROLE {} NOLOGIN", ident(name)))
        .collect();
    // This transaction has locked the rows, so what it reads now cannot change before it ends.
    text.push(look_up(sorted()));
    let again = home.query(&text.join("; ")).await?;
    let moved = due.iter().any(|role| {
        let found = parse_found(&again, role.task);
        !matches!(verdict(role.task.mode, found.as_ref()), Verdict::Due)
    });
    if moved {
        // A renewal came first. The next try sees the new end.
        return Err(SqlError::transient("a lease was renewed meanwhile"));
    }
    home.query("COMMIT").await?;
    Ok(due)
}

/// A role with the name of the lease's role that does not belong to the lease.
pub(super) fn foreign(task: &Revoke) -> Failure {
    Failure::new(
        FailureCode::ForeignRole,
        format!(
            "role {} exists with another comment; it belongs to another lease or user and is not changed",
            task.role
        ),
    )
}

pub(super) fn look_up<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    // `infinity` is no end, and before 17 it cannot even be subtracted. shobj_description() would run a statement
    // for each role, which costs more than the rest of this query.
    format!(
        "SELECT rolname, oid, \
           (SELECT description FROM pg_shdescription WHERE objoid = pg_roles.oid AND classoid = 'pg_authid'::regclass), \
           CASE WHEN isfinite(rolvaliduntil) THEN {until} END, \
           CASE WHEN isfinite(rolvaliduntil) THEN extract(epoch FROM rolvaliduntil - clock_timestamp()) END, {now} \
         FROM pg_roles WHERE rolname IN ({names}) \
         UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, {now}",
        until = timestamp_text("rolvaliduntil"),
        now = timestamp_text("clock_timestamp()"),
        names = literals(names),
    )
}

/// The server's clock, from the row that every answer has.
fn parse_now(rows: &Rows) -> Timestamp {
    rows.last()
        .and_then(|row| row.timestamp(5))
        .unwrap_or_else(Timestamp::now)
}

pub(super) fn parse_found(rows: &Rows, task: &Revoke) -> Option<Found> {
    let row = rows
        .iter()
        .find(|row| row.get(0) == Some(task.role.as_str()))?;
    Some(Found {
        oid: row.parse(1)?,
        ours: row.text(2) == lease_comment(&task.installation, &task.lease),
        until: row.timestamp(3),
        left: row.parse(4),
        now: row.timestamp(5)?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::row::Row;
    use mayfly_protocol::fixtures::revocation;

    const END: &str = "2026-01-02T03:04:05.5Z";
    const NOW: &str = "2026-01-02T03:04:00Z";

    /// The row with the server's clock comes last, and is always there.
    fn clock() -> Row {
        Row::from([None, None, None, None, None, Some(NOW)])
    }

    #[test]
    fn a_role_is_read_with_its_end_by_the_servers_clock() {
        let task = revocation();
        let own = lease_comment(&task.installation, &task.lease);
        let other = lease_comment(&task.installation, &revocation().lease);
        let (end, now) = (END.parse().ok(), NOW.parse().unwrap());
        for (comment, until, left, expected) in [
            (
                Some(own.as_str()),
                Some(END),
                Some("5.5"),
                (true, end, Some(5.5)),
            ),
            // Without an end, and with `infinity`.
            (Some(own.as_str()), None, None, (true, None, None)),
            (
                Some(other.as_str()),
                Some(END),
                Some("-1"),
                (false, end, Some(-1.0)),
            ),
            (None, Some(END), Some("5.5"), (false, end, Some(5.5))),
        ] {
            let row = Row::from([Some("r"), Some("17"), comment, until, left, Some(NOW)]);
            let found = parse_found(&vec![row, clock()], &task).unwrap();
            assert_eq!(
                (found.ours, found.until, found.left),
                expected,
                "{comment:?}"
            );
            assert_eq!((found.oid, found.now), (17, now));
        }
    }

    #[test]
    fn a_role_that_is_absent_is_not_found_in_the_rows_of_others() {
        let task = revocation();
        let own = lease_comment(&task.installation, &task.lease);
        let other = Row::from([Some("s"), Some("18"), Some(&own), None, None, Some(END)]);
        let rows = vec![other, clock()];
        assert!(parse_found(&rows, &task).is_none());
        assert!(parse_found(&vec![clock()], &task).is_none());
        for rows in [rows, vec![clock()]] {
            assert_eq!(parse_now(&rows), NOW.parse().unwrap());
        }
    }
}
