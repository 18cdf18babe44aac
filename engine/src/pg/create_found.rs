//! The account that a create finds: its own, from an earlier run, or one that it has just made.

use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::{Create, Created, Failure, FailureCode};

use super::row::Row;
use super::session::Session;
use super::sql::{lease_comment, literal, moment};

/// Whether an account is a member of the role that has its grant role's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Membership {
    Held,
    Missing,
}

/// The lease's role, where it exists, and whether it is a member of its grant role.
///
/// # Errors
/// `foreign_role` where the role has another comment; as any statement.
pub(super) async fn find(
    home: &Session<'_>,
    task: &Create,
    group: &RoleName,
) -> Result<Option<(Created, Membership)>, Failure> {
    let query = format!(
        "SELECT shobj_description(r.oid, 'pg_authid'), {}, \
           EXISTS (SELECT 1 FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
                   WHERE m.member = r.oid AND g.rolname = {}) \
         FROM pg_roles r WHERE r.rolname = {}",
        moment("r.rolvaliduntil"),
        literal(group.as_str()),
        literal(task.role.as_str()),
    );
    let row = home.first_row("looking for the role", &query).await?;
    let facts = home.facts();
    found(&row, task, &facts.identity)
}

/// What a row of [`find`] says.
fn found(row: &Row, task: &Create, server: &str) -> Result<Option<(Created, Membership)>, Failure> {
    if row.is_empty() {
        return Ok(None);
    }
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
    let membership = match row.flag(2) {
        true => Membership::Held,
        false => Membership::Missing,
    };
    Ok(Some((created, membership)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::create_sql::tests::task;

    #[test]
    fn only_a_role_with_the_comment_of_the_lease_is_found() {
        let task = task(None);
        let comment = lease_comment(&task.installation, &task.lease);
        let at = Some("2026-11-26T10:00:00.5Z");
        let found = |row: Row| found(&row, &task, "here");
        assert!(found(Row::default()).unwrap().is_none());
        let (created, membership) = found(Row::from([Some(comment.as_str()), at, Some("t")]))
            .unwrap()
            .unwrap();
        assert_eq!(
            (created.server.as_str(), membership),
            ("here", Membership::Held)
        );
        let (_, membership) = found(Row::from([Some(comment.as_str()), at, Some("f")]))
            .unwrap()
            .unwrap();
        assert_eq!(membership, Membership::Missing);
        for (row, code) in [
            (Row::from([None, at, Some("t")]), FailureCode::ForeignRole),
            (
                Row::from([Some("mayfly:lease:x"), at, Some("t")]),
                FailureCode::ForeignRole,
            ),
            (
                Row::from([Some(comment.as_str()), None, Some("t")]),
                FailureCode::StatementFailed,
            ),
        ] {
            assert_eq!(found(row).unwrap_err().code, code);
        }
    }
}
