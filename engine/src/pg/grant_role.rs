//! Grant roles: the NOLOGIN roles that hold a set of grants, so that an account needs only a
//! membership. One per installation, admin, databases and set; made once, refreshed at most once
//! a second, never dropped here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::Failure;
use mayfly_protocol::timing::timing;
use parking_lot::Mutex;

use super::grant_later::Later;
use super::grant_refresh::refresh;
use super::grant_set::{GrantSet, Granted, Key};
use super::servers::Servers;
use super::sql::literal;
use super::target_key::target_key;

/// How long a look at the catalogs is valid. An issue after this time finds newer tables.
const REFRESH_EVERY: Duration = Duration::from_secs(1);
/// How long a role without requests is remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);

/// The grant roles this engine has looked at.
#[derive(Default)]
pub(crate) struct GrantRoles {
    seen: Mutex<HashMap<Key, Entry>>,
    later: Later,
}

/// Locked while a role is refreshed.
type Entry = Arc<tokio::sync::Mutex<LastLook>>;

/// The result of the last refresh of a role.
#[derive(Default)]
struct LastLook {
    at: Option<Instant>,
    failed: Option<(Instant, Failure)>,
}

impl GrantRoles {
    /// Ensures that the role of a set exists and has its privileges, for a create that arrived at this time.
    /// Objects of patterns for which the create has no time are granted later.
    ///
    /// # Errors
    /// Why the grants are impossible. Then a role that was just made is removed.
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
        // The background grants these objects, so they are not granted here at the same time.
        if is_fresh || (last.at.is_some() && self.later.is_at_it(&key)) {
            let waiting = self.later.waiting(&key).unwrap_or_default();
            return Ok(Granted {
                role,
                skipped: None,
                warnings: waiting.warnings(),
            });
        }
        let until = (Instant::now() + timing().grant_within).min(arrived + timing().grant_until);
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

    /// Brings the role of a set up to date where accounts are members of it. `None`: none are, and
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

    /// Grants what roles lack whose turn it is. Called about twice a second. May be given up at any
    /// point: what was granted is committed.
    pub(crate) async fn go_on(&self, servers: &Servers) {
        self.later.go_on(servers).await;
    }

    /// Pairs of object and privilege that grant roles lack for now and get later.
    pub(crate) fn waiting(&self) -> usize {
        self.later.pairs()
    }

    /// Forgets that a role was seen: it is gone.
    pub(crate) async fn forget(&self, set: &GrantSet<'_>, role: &RoleName) {
        let key = (target_key(set.target), role.clone());
        self.entry(&key).lock().await.at = None;
    }

    /// Forgets roles that nobody has asked for lately. Called about twice a second.
    pub(crate) fn forget_unused(&self) {
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() < REMEMBERED_FOR);
        let mut seen = self.seen.lock();
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
        let mut seen = self.seen.lock();
        seen.entry(key.clone()).or_default().clone()
    }
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
            roles.seen.lock().insert(key, look);
        }
        roles.forget_unused();
        let seen = roles.seen.lock();
        let mut left: Vec<&str> = seen.keys().map(|(_, role)| role.as_str()).collect();
        left.sort_unstable();
        assert_eq!(left, ["in_use", "lately"]);
        drop(used);
    }
}
