//! Mayfly's own roles: grant roles and the quarantine role. Their comments identify them.

use mayfly_protocol::task::{Failure, FailureCode};
use tokio_postgres::error::SqlState;

use super::row::Row;
use super::session::{Session, TRIES};
use super::sql::{ident, literal};

/// Facts about a role that exists.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Existing {
    /// Whether the role has the comment that Mayfly would give it.
    pub(super) is_ours: bool,
    /// Whether the admin has ADMIN OPTION on it, or is a superuser. From PostgreSQL 16 on the admin needs one of
    /// these.
    pub(super) can_admin: bool,
}

impl Existing {
    /// Reads a row: its comment, and whether the admin has ADMIN OPTION.
    fn of(row: &Row, comment: &str) -> Option<Self> {
        (!row.is_empty()).then(|| Self {
            is_ours: row.get(0) == Some(comment),
            can_admin: row.flag(1),
        })
    }
}

/// Looks for the role of this name, which should have this comment.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn find(
    home: &Session<'_>,
    name: &str,
    comment: &str,
    doing: &str,
) -> Result<Option<Existing>, Failure> {
    let query = format!(
        "SELECT shobj_description(oid, 'pg_authid'), pg_has_role(oid, 'MEMBER WITH ADMIN OPTION') \
         FROM pg_roles WHERE rolname = {}",
        literal(name)
    );
    let row = home.first_row(doing, &query).await?;
    Ok(Existing::of(&row, comment))
}

/// The message about a role of this name that is not Mayfly's.
pub(super) fn foreign(name: &str, comment: &str) -> String {
    format!(
        "role {name} exists and does not belong to this installation; its comment should be {comment:?}"
    )
}

/// Finds the role of this name, or makes it without a login. Returns `true` if it was made. A second run finds it.
///
/// # Errors
/// `foreign_role` if the role has another comment; and the errors of any statement.
pub(super) async fn find_or_make(
    home: &Session<'_>,
    name: &str,
    attributes: &str,
    comment: &str,
    doing: &str,
) -> Result<bool, Failure> {
    let create = format!(
        "CREATE ROLE {name} NOLOGIN {attributes}; COMMENT ON ROLE {name} IS {comment}",
        name = ident(name),
        comment = literal(comment),
    );
    for _ in 0..TRIES {
        if let Some(role) = find(home, name, comment, doing).await? {
            return match role.is_ours {
                true => Ok(false),
                false => Err(Failure::new(
                    FailureCode::ForeignRole,
                    foreign(name, comment),
                )),
            };
        }
        match home.transact(&create).await {
            Ok(_) => return Ok(true),
            // Another engine made the role first.
            Err(error) if error.is(&[SqlState::DUPLICATE_OBJECT, SqlState::UNIQUE_VIOLATION]) => {}
            Err(error) if error.is_transient() => {}
            Err(error) => return Err(error.into_failure(doing)),
        }
    }
    Err(Failure::new(
        FailureCode::StatementFailed,
        format!("{doing}: other sessions made and dropped it {TRIES} times meanwhile"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_ours_by_its_comment() {
        let existing = |is_ours, can_admin| Some(Existing { is_ours, can_admin });
        for (row, found) in [
            (Row::default(), None),
            (Row::from([Some("ours"), Some("t")]), existing(true, true)),
            (Row::from([Some("ours"), Some("f")]), existing(true, false)),
            (
                Row::from([Some("theirs"), Some("t")]),
                existing(false, true),
            ),
            (Row::from([None, Some("t")]), existing(false, true)),
        ] {
            assert_eq!(Existing::of(&row, "ours"), found, "{row:?}");
        }
    }
}
