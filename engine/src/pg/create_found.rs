//! The account that a create finds: the account of an earlier run, or the account that it has just made.

use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::{Create, Created, Failure, FailureCode};

use super::row::Row;
use super::session::Session;
use super::sql::{ident, lease_comment, literal, timestamp_text};
use super::time_guard::{CLOCK, Clock};

/// Whether an account is a member of the role that has its grant role's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Membership {
    /// It is a member of the role with this oid.
    Of(u32),
    Missing,
}

impl Membership {
    fn of(oid: Option<u32>) -> Self {
        oid.map_or(Self::Missing, Self::Of)
    }
}

/// The lease's role, if it exists, and whether it is a member of its grant role.
pub(super) type Found = Option<(Created, Membership)>;

/// Reads the database's clock and looks for the lease's role, in one round trip.
///
/// # Errors
/// `foreign_role` if the role has another comment; and the errors of any statement.
pub(super) async fn look(
    home: &Session<'_>,
    task: &Create,
    group: &RoleName,
) -> Result<(Found, Clock), Failure> {
    let query = format!("{CLOCK}; {}", question(task, group));
    let rows = home.transact(&query).await;
    let rows = rows.map_err(|error| error.into_failure("looking for the role"))?;
    let clock = Clock::read(rows.first(), 0)?;
    let rest = rows.get(1..).unwrap_or_default();
    Ok((found(rest, task, &home.facts().identity)?, clock))
}

/// The query for a role that was just made. [`seen`] reads the answer. It reads no relation, only the server's cache
/// of names and memberships. The query of [`question`] costs the server more than a `CREATE ROLE` with one SCRAM
/// round.
pub(super) fn question_again(task: &Create, group: &RoleName) -> String {
    let [role, group] = [task.role.as_str(), group.as_str()]
        .map(|name| format!("to_regrole({})", literal(&ident(name))));
    format!(
        "SELECT {role} IS NOT NULL, \
           CASE WHEN pg_has_role({role}, {group}, 'USAGE') THEN {group}::oid END, \
           extract(epoch FROM clock_timestamp())"
    )
}

/// Whether the role that was just made is a member of its grant role, and the server's clock.
///
/// # Errors
/// `statement_failed`: the role is gone.
pub(super) fn seen(answer: Option<&Row>) -> Result<(Membership, Clock), Failure> {
    let clock = Clock::read(answer, 2)?;
    if !answer.is_some_and(|row| row.flag(0)) {
        return Err(Failure::new(
            FailureCode::StatementFailed,
            "the role was made but no longer exists",
        ));
    }
    let group = answer.and_then(|row| row.parse(1));
    Ok((Membership::of(group), clock))
}

/// The query for the lease's role. [`found`] reads the answer.
fn question(task: &Create, group: &RoleName) -> String {
    format!(
        "SELECT shobj_description(r.oid, 'pg_authid'), {}, \
           (SELECT g.oid FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
            WHERE m.member = r.oid AND g.rolname = {} LIMIT 1) \
         FROM pg_roles r WHERE r.rolname = {}",
        timestamp_text("r.rolvaliduntil"),
        literal(group.as_str()),
        literal(task.role.as_str()),
    )
}

/// Reads the answer to [`question`] from this server.
///
/// # Errors
/// `foreign_role` where the role has another comment.
fn found(rows: &[Row], task: &Create, server: &str) -> Result<Found, Failure> {
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    if row.text(0) != lease_comment(&task.installation, &task.lease) {
        return Err(Failure::new(
            FailureCode::ForeignRole,
            format!(
                "role {} exists and does not belong to this lease",
                task.role
            ),
        ));
    }
    let expiration = row.timestamp(1).ok_or_else(|| {
        Failure::new(
            FailureCode::StatementFailed,
            format!("role {} has no VALID UNTIL", task.role),
        )
    })?;
    let created = Created {
        expiration,
        server: server.to_owned(),
        warnings: vec![],
    };
    Ok(Some((created, Membership::of(row.parse(2)))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::create_sql::tests::task;

    #[test]
    fn a_role_that_went_after_its_commit_is_no_account() {
        let now = Some("1764151200.5");
        let seen = |cells: [Option<&str>; 3]| seen(Some(&Row::from(cells)));
        for (group, membership) in [
            (Some("4711"), Membership::Of(4711)),
            (None, Membership::Missing),
        ] {
            let (found, _) = seen([Some("t"), group, now]).unwrap();
            assert_eq!(found, membership);
        }
        for gone in [[Some("f"), None, now], [Some("t"), Some("4711"), None]] {
            assert_eq!(seen(gone).unwrap_err().code, FailureCode::StatementFailed);
        }
        assert!(super::seen(None).is_err());
    }

    #[test]
    fn only_a_role_with_the_comment_of_the_lease_is_found() {
        let task = task(None);
        let comment = lease_comment(&task.installation, &task.lease);
        let at = Some("2026-11-26T10:00:00.5Z");
        assert!(found(&[], &task, "here").unwrap().is_none());
        let found = |row: Row| found(&[row], &task, "here");
        let (created, membership) = found(Row::from([Some(comment.as_str()), at, Some("4711")]))
            .unwrap()
            .unwrap();
        assert_eq!(
            (created.server.as_str(), membership),
            ("here", Membership::Of(4711))
        );
        let (_, membership) = found(Row::from([Some(comment.as_str()), at, None]))
            .unwrap()
            .unwrap();
        assert_eq!(membership, Membership::Missing);
        for (row, code) in [
            (
                Row::from([None, at, Some("4711")]),
                FailureCode::ForeignRole,
            ),
            (
                Row::from([Some("mayfly:lease:x"), at, Some("4711")]),
                FailureCode::ForeignRole,
            ),
            (
                Row::from([Some(comment.as_str()), None, Some("4711")]),
                FailureCode::StatementFailed,
            ),
        ] {
            assert_eq!(found(row).unwrap_err().code, code);
        }
    }
}
