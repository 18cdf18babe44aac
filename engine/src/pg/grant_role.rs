//! Grant roles: the NOLOGIN roles that hold a set of grants, so that an account needs only a
//! membership. One per installation, admin, databases and set; made once, refreshed at most once
//! a second, never dropped here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mayfly_common::grant::Grant;
use mayfly_common::names::{InstallationId, RoleName};
use mayfly_common::target::Target;
use mayfly_common::task::{Failure, FailureCode};
use rand::RngExt;
use tokio_postgres::error::SqlState;
use tracing::{info, warn};

use super::grant_plan;
use super::session::{Servers, Session, target_key};
use super::sql::{grant_comment, ident, literal, short_hash};
use super::tidy;

/// How long a look at the catalogs is good for: a table made later is covered at the next issue
/// after this.
const REFRESH_EVERY: Duration = Duration::from_secs(1);
/// Tries against other sessions that grant on the same objects. Each failed one shows that another
/// session got something done.
const TRIES: u32 = 10;
/// Between two of them, at random.
const PAUSE_MS: std::ops::Range<u64> = 10..60;

/// The grant roles this engine has looked at.
#[derive(Default)]
pub(crate) struct GrantRoles {
    seen: Mutex<HashMap<(String, RoleName), LastLook>>,
}

/// When a role was last refreshed; locked while it is.
type LastLook = Arc<tokio::sync::Mutex<Option<Instant>>>;

/// What a grant role is for.
pub(crate) struct GrantSet<'a> {
    pub(crate) installation: &'a InstallationId,
    pub(crate) target: &'a Target,
    pub(crate) database: &'a str,
    pub(crate) grants: &'a [Grant],
}

impl GrantSet<'_> {
    /// Its role's name: the same for the same set, whichever engine asks.
    pub(crate) fn role(&self) -> Result<RoleName, Failure> {
        let mut grants: Vec<String> = self.grants.iter().map(Grant::to_string).collect();
        grants.sort();
        grants.dedup();
        let hash = short_hash(&[
            &self.installation.to_string(),
            &self.target.username,
            // Kept in the name, so that existing grant roles keep theirs.
            &self.target.database,
            self.database,
            &grants.join("\n"),
        ]);
        format!("mayfly_grant_{hash}")
            .parse()
            .map_err(|error| Failure::new(FailureCode::StatementFailed, format!("{error}")))
    }
}

/// What a refresh found.
pub(crate) struct Granted {
    /// The role to be a member of.
    pub(crate) role: RoleName,
    /// Object-privilege pairs that patterns passed over, where it was looked.
    pub(crate) skipped: Option<usize>,
}

impl GrantRoles {
    /// Makes sure the role of a set exists and holds what it should.
    ///
    /// # Errors
    /// Whatever makes the grants impossible; then no role is left that was not there before.
    pub(crate) async fn ensure(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
    ) -> Result<Granted, Failure> {
        let role = set.role()?;
        let seen = self.entry(set.target, &role);
        // One refresh at a time; who waited finds it done.
        let mut refreshed = seen.lock().await;
        if refreshed.is_some_and(|at| at.elapsed() < REFRESH_EVERY) {
            return Ok(Granted {
                role,
                skipped: None,
            });
        }
        let skipped = refresh(servers, set, &role).await?;
        *refreshed = Some(Instant::now());
        Ok(Granted {
            role,
            skipped: Some(skipped),
        })
    }

    /// Forgets that a role was seen: it is gone.
    pub(crate) async fn forget(&self, set: &GrantSet<'_>, role: &RoleName) {
        *self.entry(set.target, role).lock().await = None;
    }

    fn entry(&self, target: &Target, role: &RoleName) -> LastLook {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.entry((target_key(target), role.clone()))
            .or_default()
            .clone()
    }
}

async fn refresh(servers: &Servers, set: &GrantSet<'_>, role: &RoleName) -> Result<usize, Failure> {
    let home = servers.session(set.target, &set.target.database).await?;
    let mut tries = 0;
    let (made, granted) = loop {
        tries += 1;
        let made = make(&home, set, role).await?;
        let granted = fill(servers, set, role).await;
        // Tidied away meanwhile, since nobody was a member yet.
        match &granted {
            Err(failure)
                if failure.code == FailureCode::NoSuchObject
                    && tries < TRIES
                    && !stands(&home, role).await? => {}
            _ => break (made, granted),
        }
    };
    if granted.is_err()
        && made
        && let Err(error) = tidy::drop_unfilled(&home, role).await
    {
        warn!(role = %role, sqlstate = error.code(), "a grant role that could not be filled was left behind");
    }
    if granted.is_ok() {
        home.release();
    }
    granted
}

async fn stands(home: &Session<'_>, role: &RoleName) -> Result<bool, Failure> {
    let query = format!(
        "SELECT 1 FROM pg_roles WHERE rolname = {}",
        literal(role.as_str())
    );
    let rows = home.transact(&query).await;
    rows.map(|rows| !rows.is_empty())
        .map_err(|error| error.into_failure("looking for the grant role"))
}

/// Makes the role where it is not there. Tells whether it did.
async fn make(home: &Session<'_>, set: &GrantSet<'_>, role: &RoleName) -> Result<bool, Failure> {
    let comment = grant_comment(set.installation, role);
    for _ in 0..TRIES {
        let find = format!(
            "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = {}",
            literal(role.as_str())
        );
        let found = home
            .transact(&find)
            .await
            .map_err(|e| e.into_failure("looking for the grant role"))?;
        match found.first() {
            Some(row) if row.first().is_some_and(|c| c.as_deref() == Some(&comment)) => {
                return Ok(false);
            }
            Some(_) => {
                return Err(Failure::new(
                    FailureCode::ForeignRole,
                    format!(
                        "role {role} exists and is not this Mayfly's; its comment should be {comment:?}"
                    ),
                ));
            }
            None => {}
        }
        let create = format!(
            "CREATE ROLE {name} NOLOGIN; COMMENT ON ROLE {name} IS {}",
            literal(&comment),
            name = ident(role.as_str()),
        );
        match home.transact(&create).await {
            Ok(_) => {
                info!(role = %role, database = set.database, "made a grant role");
                return Ok(true);
            }
            // Another engine was quicker.
            Err(error) if error.is(&[SqlState::DUPLICATE_OBJECT, SqlState::UNIQUE_VIOLATION]) => {}
            Err(error) if error.is_passing() => {}
            Err(error) => return Err(error.into_failure("making the grant role")),
        }
    }
    Err(Failure::new(
        FailureCode::StatementFailed,
        "the grant role could not be made, others kept making it",
    ))
}

/// Gives the role what it lacks. Returns how much patterns passed over.
async fn fill(servers: &Servers, set: &GrantSet<'_>, role: &RoleName) -> Result<usize, Failure> {
    let doing = "granting to the grant role";
    let admin = &set.target.username;
    let db = servers.session(set.target, set.database).await?;
    let version = db.facts().version;
    let plan = grant_plan::plan(&db, admin, role, set.grants).await?;
    if plan.statements(role, version).is_empty() {
        let skipped = plan.verdict()?;
        db.release();
        return Ok(skipped);
    }
    let mut last = None;
    let mut plan = plan;
    for _ in 0..TRIES {
        let statements = plan.statements(role, version);
        if statements.is_empty() {
            break;
        }
        match db.transact(&statements.join("; ")).await {
            Ok(_) => {
                last = None;
                break;
            }
            Err(error) if error.is_passing() => last = Some(error),
            Err(error) => return Err(error.into_failure(doing)),
        }
        let pause = rand::rng().random_range(PAUSE_MS);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        plan = grant_plan::plan(&db, admin, role, set.grants).await?;
    }
    if let Some(error) = last {
        return Err(error.into_failure(doing));
    }
    // PostgreSQL only warns where the admin may not grant: see what came of it.
    let plan = grant_plan::plan(&db, admin, role, set.grants).await?;
    let skipped = plan.verdict()?;
    if skipped > 0 {
        warn!(role = %role, skipped, examples = plan.skipped_names(), "passed over what the admin may not grant");
    }
    db.release();
    Ok(skipped)
}
