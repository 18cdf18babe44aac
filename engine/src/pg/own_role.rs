//! Roles of Mayfly's own, told by their comment: grant roles and the quarantine role.

use mayfly_protocol::task::{Failure, FailureCode};
use tokio_postgres::error::SqlState;

use super::session::{Session, TRIES};
use super::sql::{ident, literal};

/// Finds the role of this name, or makes it without a login. True: it was made. Run twice, the second
/// finds it.
///
/// # Errors
/// `foreign_role` where the role has another comment; as any statement.
pub(super) async fn find_or_make(
    home: &Session<'_>,
    name: &str,
    attributes: &str,
    comment: &str,
    doing: &str,
) -> Result<bool, Failure> {
    let find = format!(
        "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = {}",
        literal(name)
    );
    let create = format!(
        "CREATE ROLE {name} NOLOGIN {attributes}; COMMENT ON ROLE {name} IS {comment}",
        name = ident(name),
        comment = literal(comment),
    );
    for _ in 0..TRIES {
        let found = home.transact(&find).await;
        let found = found.map_err(|error| error.into_failure(doing))?;
        if let Some(role) = found.first() {
            return match role.get(0) == Some(comment) {
                true => Ok(false),
                false => Err(Failure::new(
                    FailureCode::ForeignRole,
                    format!(
                        "role {name} exists and is not this Mayfly's; its comment should be {comment:?}"
                    ),
                )),
            };
        }
        match home.transact(&create).await {
            Ok(_) => return Ok(true),
            // Another engine was quicker.
            Err(error) if error.is(&[SqlState::DUPLICATE_OBJECT, SqlState::UNIQUE_VIOLATION]) => {}
            Err(error) if error.is_transient() => {}
            Err(error) => return Err(error.into_failure(doing)),
        }
    }
    Err(Failure::new(
        FailureCode::StatementFailed,
        format!("{doing}: others made and dropped it meanwhile, {TRIES} times"),
    ))
}
