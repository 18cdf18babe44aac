//! Brings one grant role up to date: makes the role if it does not exist, and grants what it lacks.

use std::time::Instant;

use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::{Failure, FailureCode};
use tracing::{info, warn};

use super::grant_fill::fill;
use super::grant_set::GrantSet;
use super::grant_verdict::Sum;
use super::own_role::find_or_make;
use super::servers::Servers;
use super::session::Session;
use super::sql::{grant_comment, literal};
use super::unneeded::drop_unfilled;

/// Maximum number of tries while other sessions make or remove the role.
const TRIES: u32 = 10;

/// The result of a refresh.
pub(super) struct Refreshed {
    /// The oid of the role that got the grants. Another role may have got its name since then.
    pub(super) oid: u32,
    pub(super) sum: Sum,
}

/// Makes the role, and grants what it lacks, until a time limit. Meanwhile a tidying may rename the role, and
/// another engine may make a new role with its name, which is empty at first. So the name must belong to the same
/// role before and after.
///
/// # Errors
/// As [`super::grant_role::GrantRoles::ensure`].
pub(super) async fn refresh(
    servers: &Servers,
    set: &GrantSet<'_>,
    role: &RoleName,
    until: Instant,
) -> Result<Refreshed, Failure> {
    let home = servers.session(set.target, &set.target.database).await?;
    let mut tries = 0;
    let (made, refreshed) = loop {
        tries += 1;
        let made = make(&home, set, role).await?;
        let before = oid(&home, role).await?;
        // A second connection is needed only for another database.
        let granted = match set.database == set.target.database {
            true => grant_by(&home, set, role, until).await,
            false => grant(servers, set, role, until).await,
        };
        if let Err(failure) = &granted
            && failure.code != FailureCode::NoSuchObject
        {
            break (made, Err(failure.clone()));
        }
        let after = oid(&home, role).await?;
        match before.filter(|_| before == after) {
            Some(oid) => break (made, granted.map(|sum| Refreshed { oid, sum })),
            // `tidy` renamed the role meanwhile, because it had no member yet. The next try makes a new role.
            None if tries < TRIES => {}
            None => break (made, Err(removed_again())),
        }
    };
    if refreshed.is_err()
        && made
        && let Err(error) = drop_unfilled(&home, role).await
    {
        warn!(role = %role, sqlstate = error.code(), "a grant role without grants remains");
    }
    if refreshed.is_ok() {
        home.release();
    }
    refreshed
}

fn removed_again() -> Failure {
    Failure::new(
        FailureCode::StatementFailed,
        format!("the grant role was removed {TRIES} times while it got its privileges"),
    )
}

/// Grants what the role lacks, and logs what it does not get.
pub(super) async fn grant(
    servers: &Servers,
    set: &GrantSet<'_>,
    role: &RoleName,
    until: Instant,
) -> Result<Sum, Failure> {
    let db = servers.session_beside(set.target, set.database).await?;
    let sum = grant_by(&db, set, role, until).await?;
    db.release();
    Ok(sum)
}

/// Like [`grant`], with a connection to the set's database.
async fn grant_by(
    db: &Session<'_>,
    set: &GrantSet<'_>,
    role: &RoleName,
    until: Instant,
) -> Result<Sum, Failure> {
    let sum = fill(db, &set.target.username, role, set.grants, until).await?;
    if !sum.notes.is_empty() {
        warn!(role = %role, skipped = sum.passed_over, examples = sum.notes.join("; "), "skipped what cannot be granted");
    }
    if !sum.waiting.is_none() {
        warn!(role = %role, locked = sum.waiting.locked, not_reached = sum.waiting.not_reached, examples = sum.waiting.names(), "granted in part; the rest follows in the background");
    }
    Ok(sum)
}

/// The oid of the role with this name. `None`: no role has it.
pub(super) async fn oid(home: &Session<'_>, role: &RoleName) -> Result<Option<u32>, Failure> {
    let query = format!(
        "SELECT oid FROM pg_roles WHERE rolname = {}",
        literal(role.as_str())
    );
    let row = home.first_row("looking for the grant role", &query).await?;
    Ok(row.parse(0))
}

/// Makes the role if it does not exist. Returns `true` if it was made.
async fn make(home: &Session<'_>, set: &GrantSet<'_>, role: &RoleName) -> Result<bool, Failure> {
    let comment = grant_comment(set.installation, role);
    let doing = "making the grant role";
    let made = find_or_make(home, role.as_str(), "", &comment, doing).await?;
    if made {
        info!(role = %role, database = set.database, "made a grant role");
    }
    Ok(made)
}
