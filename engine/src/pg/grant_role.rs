//! Grant roles: the NOLOGIN roles that hold a set of grants, so that an account needs only a
//! membership. One per installation, admin, databases and set; made once, refreshed at most once
//! a second, never dropped here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mayfly_protocol::grant::Grant;
use mayfly_protocol::names::{InstallationId, RoleName};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use tracing::{info, warn};

use super::grant_fill::fill;
use super::grant_later::Later;
use super::grant_verdict::Sum;
use super::own_role::find_or_make;
use super::servers::{Servers, target_key};
use super::session::Session;
use super::sql::{grant_comment, literal, short_hash};
use super::tidy;

/// How long a look at the catalogs is good for: a table made later is covered at the next issue
/// after this.
const REFRESH_EVERY: Duration = Duration::from_secs(1);
/// How long a role is remembered that nobody asks for.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);
/// Tries against others that make the role or take it away.
const TRIES: u32 = 10;
/// How long a create grants what patterns find. The rest is granted after it.
const GRANT_WITHIN: Duration = Duration::from_millis(1500);
/// The last moment after a create's arrival at which it still grants what patterns find.
const GRANT_UNTIL: Duration = Duration::from_millis(4500);

/// The grant roles this engine has looked at.
#[derive(Default)]
pub(crate) struct GrantRoles {
    seen: Mutex<HashMap<Key, Entry>>,
    pub(super) later: Later,
}

/// Server and admin, and the role.
pub(super) type Key = (String, RoleName);

/// Locked while a role is refreshed.
type Entry = Arc<tokio::sync::Mutex<LastLook>>;

/// What came of the last refresh of a role.
#[derive(Default)]
struct LastLook {
    at: Option<Instant>,
    failed: Option<(Instant, Failure)>,
}

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
    /// What it lacks for now, for who gets an account.
    pub(crate) warnings: Vec<String>,
}

impl GrantRoles {
    /// Makes sure the role of a set exists and holds what it should, for a create that arrived then.
    /// What of its patterns takes longer than a create has is granted later.
    ///
    /// # Errors
    /// Whatever makes the grants impossible; then no role is left that was not there before.
    pub(crate) async fn ensure(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
        arrived: Instant,
    ) -> Result<Granted, Failure> {
        let role = set.role()?;
        let key = (target_key(set.target), role.clone());
        let asked = Instant::now();
        let entry = self.entry(&key);
        // One refresh at a time; who waited finds it done.
        let mut last = entry.lock().await;
        if let Some((at, failure)) = &last.failed
            && *at > asked
        {
            return Err(failure.clone());
        }
        let is_fresh = last.at.is_some_and(|at| at.elapsed() < REFRESH_EVERY);
        // What is granted in the background is not granted here beside it.
        if is_fresh || (last.at.is_some() && self.later.is_at_it(&key)) {
            let waiting = self.later.waiting(&key).unwrap_or_default();
            return Ok(Granted {
                role,
                skipped: None,
                warnings: waiting.warnings(),
            });
        }
        let until = (Instant::now() + GRANT_WITHIN).min(arrived + GRANT_UNTIL);
        match refresh(servers, set, &role, until).await {
            Ok(sum) => {
                last.at = Some(Instant::now());
                last.failed = None;
                let warnings = sum.waiting.warnings();
                self.later.put(key, set, sum.waiting);
                Ok(Granted {
                    role,
                    skipped: Some(sum.passed_over),
                    warnings,
                })
            }
            Err(failure) => {
                last.failed = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }

    /// Brings the role of a set up to date where accounts are members of it. None where none are:
    /// a role nobody uses is not made, nor kept from being tidied away.
    ///
    /// # Errors
    /// As [`GrantRoles::ensure`].
    pub(crate) async fn refresh_in_use(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
    ) -> Result<Option<Granted>, Failure> {
        let role = set.role()?;
        let home = servers.session(set.target, &set.target.database).await?;
        let members = format!(
            "SELECT 1 FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
             JOIN pg_roles u ON u.oid = m.member \
             WHERE g.rolname = {} AND NOT m.admin_option AND u.rolcanlogin AND u.rolname <> current_user LIMIT 1",
            literal(role.as_str())
        );
        let found = home.transact(&members).await;
        let found = found.map_err(|error| error.into_failure("looking at the grant role"))?;
        home.release();
        if found.is_empty() {
            return Ok(None);
        }
        self.ensure(servers, set, Instant::now()).await.map(Some)
    }

    /// Forgets that a role was seen: it is gone.
    pub(crate) async fn forget(&self, set: &GrantSet<'_>, role: &RoleName) {
        let key = (target_key(set.target), role.clone());
        self.entry(&key).lock().await.at = None;
    }

    /// Forgets roles that nobody has asked for lately. Called about twice a second.
    pub(crate) fn forget_unused(&self) {
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() < REMEMBERED_FOR);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|_, entry| {
            // One that is in use is held by who uses it.
            Arc::strong_count(entry) > 1
                || entry.try_lock().is_ok_and(|last| {
                    let failed = last.failed.as_ref().map(|(at, _)| *at);
                    is_recent(last.at) || is_recent(failed)
                })
        });
    }

    fn entry(&self, key: &Key) -> Entry {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.entry(key.clone()).or_default().clone()
    }
}

async fn refresh(
    servers: &Servers,
    set: &GrantSet<'_>,
    role: &RoleName,
    until: Instant,
) -> Result<Sum, Failure> {
    let home = servers.session(set.target, &set.target.database).await?;
    let mut tries = 0;
    let (made, granted) = loop {
        tries += 1;
        let made = make(&home, set, role).await?;
        let granted = grant(servers, set, role, until).await;
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

/// Gives the role what it lacks, and says in the log what it does not get.
pub(super) async fn grant(
    servers: &Servers,
    set: &GrantSet<'_>,
    role: &RoleName,
    until: Instant,
) -> Result<Sum, Failure> {
    let db = servers.session_beside(set.target, set.database).await?;
    let sum = fill(&db, &set.target.username, role, set.grants, until).await?;
    db.release();
    if !sum.notes.is_empty() {
        warn!(role = %role, skipped = sum.passed_over, examples = sum.notes.join("; "), "passed over what cannot be granted");
    }
    if !sum.waiting.is_none() {
        warn!(role = %role, locked = sum.waiting.locked, not_reached = sum.waiting.not_reached, examples = sum.waiting.names(), "granted in part, the rest later");
    }
    Ok(sum)
}

pub(super) async fn stands(home: &Session<'_>, role: &RoleName) -> Result<bool, Failure> {
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
    let doing = "making the grant role";
    let made = find_or_make(home, role.as_str(), "", &comment, doing).await?;
    if made {
        info!(role = %role, database = set.database, "made a grant role");
    }
    Ok(made)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn roles_are_not_remembered_for_ever() {
        let roles = GrantRoles::default();
        let long_ago = Instant::now().checked_sub(REMEMBERED_FOR).unwrap();
        let look = |at| {
            let last = LastLook { at, failed: None };
            Arc::new(tokio::sync::Mutex::new(last))
        };
        let used = look(None);
        for (name, look) in [
            ("lately", look(Some(Instant::now()))),
            ("long_ago", look(Some(long_ago))),
            ("never", look(None)),
            ("in_use", used.clone()),
        ] {
            let key = ("t".to_owned(), name.parse().unwrap());
            roles.seen.lock().unwrap().insert(key, look);
        }
        roles.forget_unused();
        let seen = roles.seen.lock().unwrap();
        let mut left: Vec<&str> = seen.keys().map(|(_, role)| role.as_str()).collect();
        left.sort_unstable();
        assert_eq!(left, ["in_use", "lately"]);
        drop(used);
    }
}
