//! Memberships that the admin grants to itself. It needs them to end a role's sessions and to give its objects away.
//! A superuser needs none.

use super::due::Due;
use super::session::Session;
use super::sql::ident;
use super::sql_error::SqlError;

/// Makes the admin a member of a role.
pub(super) async fn join(home: &Session<'_>, role: &str) -> Result<(), SqlError> {
    let facts = home.facts();
    if facts.superuser {
        return Ok(());
    }
    let options = membership_options(facts.version);
    home.transact(&format!("GRANT {} TO CURRENT_USER{options}", ident(role)))
        .await
        .map(drop)
}

/// Makes the admin a member of all accounts that are due, with one statement.
pub(super) async fn join_all(home: &Session<'_>, due: &[Due<'_>]) -> Result<(), SqlError> {
    let facts = home.facts();
    if facts.superuser || due.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = due
        .iter()
        .map(|role| ident(role.task.role.as_str()))
        .collect();
    let text = format!(
        "GRANT {} TO CURRENT_USER{}",
        names.join(", "),
        membership_options(facts.version)
    );
    home.transact(&text).await.map(drop)
}

/// The options of a membership with which the admin has the rights of the role and may act as it.
pub(super) fn membership_options(version: u32) -> &'static str {
    match version {
        16.. => " WITH INHERIT TRUE, SET TRUE",
        _ => "",
    }
}
