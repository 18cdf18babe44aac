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
/// Age of a look that is served while another issue takes the next one.
const SERVED_FOR: Duration = Duration::from_secs(2);
/// How long a role without requests is remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);

/// The grant roles this engine has looked at.
#[derive(Default)]
pub(crate) struct GrantRoles {
    seen: Mutex<HashMap<Key, Entry>>,
    later: Later,
}

type Entry = Arc<Looks>;

/// The looks at one role.
#[derive(Default)]
struct Looks {
    last: Mutex<LastLook>,
    /// Locked while the role is refreshed.
    turn: tokio::sync::Mutex<()>,
}

/// The result of the last refresh of a role.
#[derive(Default)]
struct LastLook {
    at: Option<Instant>,
    failed: Option<(Instant, Failure)>,
}

impl Looks {
    fn is_younger(&self, than: Duration) -> bool {
        self.last.lock().at.is_some_and(|at| at.elapsed() < than)
    }

    /// Whether the last look may be served while another issue takes the next one. Not after a failure: the
    /// grants may be impossible now.
    fn is_served(&self) -> bool {
        self.last.lock().failed.is_none() && self.is_younger(SERVED_FOR)
    }

    /// Waits for the turn to refresh the role. `None`: another issue refreshes it, and the last look is
    /// served.
    async fn turn(&self) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(_) if self.is_served() => None,
            Err(_) => Some(self.turn.lock().await),
        }
    }
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
        let served = |role| {
            let waiting = self.later.waiting(&key).unwrap_or_default();
            Ok(Granted {
                role,
                skipped: None,
                warnings: waiting.warnings(),
            })
        };
        if entry.is_younger(REFRESH_EVERY) {
            return served(role);
        }
        let Some(_turn) = entry.turn().await else {
            return served(role);
        };
        // One that waited may find it done.
        if let Some((at, failure)) = &entry.last.lock().failed
            && *at > asked
        {
            return Err(failure.clone());
        }
        // The background grants these objects, so they are not granted here at the same time.
        let is_known = entry.last.lock().at.is_some();
        if entry.is_younger(REFRESH_EVERY) || (is_known && self.later.is_at_it(&key)) {
            return served(role);
        }
        let until = (Instant::now() + timing().grant_within).min(arrived + timing().grant_until);
        match refresh(servers, set, &role, until).await {
            Ok(sum) => {
                *entry.last.lock() = LastLook {
                    at: Some(Instant::now()),
                    failed: None,
                };
                let warnings = sum.waiting.warnings();
                self.later.put(key, set, sum.waiting);
                Ok(Granted {
                    role,
                    skipped: Some(sum.passed_over),
                    warnings,
                })
            }
            Err(failure) => {
                entry.last.lock().failed = Some((Instant::now(), failure.clone()));
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
    pub(crate) fn forget(&self, set: &GrantSet<'_>, role: &RoleName) {
        let key = (target_key(set.target), role.clone());
        self.entry(&key).last.lock().at = None;
    }

    /// Forgets roles that nobody has asked for lately. Called about twice a second.
    pub(crate) fn forget_unused(&self) {
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() < REMEMBERED_FOR);
        let mut seen = self.seen.lock();
        seen.retain(|_, entry| {
            // One that is in use is held by who uses it.
            Arc::strong_count(entry) > 1 || {
                let last = entry.last.lock();
                let failed = last.failed.as_ref().map(|(at, _)| *at);
                is_recent(last.at) || is_recent(failed)
            }
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

    /// One issue refreshes. The others are served the last look, unless it is old or its refresh has failed.
    #[tokio::test]
    async fn the_last_look_is_served_while_one_refreshes() {
        let ago = |ms| Instant::now().checked_sub(Duration::from_millis(ms));
        let failure = || {
            let failure = Failure::new(mayfly_protocol::task::FailureCode::NoSuchObject, "x");
            Some((Instant::now(), failure))
        };
        for (at, failed, served) in [
            (ago(1_100), None, true),
            (ago(2_100), None, false),
            (None, None, false),
            (ago(1_100), failure(), false),
        ] {
            let looks = Looks {
                last: Mutex::new(LastLook { at, failed }),
                ..Looks::default()
            };
            let turn = looks.turn().await;
            assert!(turn.is_some(), "the first refreshes");
            let second = futures_util::future::FutureExt::now_or_never(looks.turn());
            // `None` outside: it waits.
            assert_eq!(matches!(second, Some(None)), served, "{at:?}");
            drop(turn);
            assert!(looks.turn().await.is_some());
        }
    }

    #[tokio::test]
    async fn roles_are_not_remembered_for_ever() {
        let roles = GrantRoles::default();
        let long_ago = Instant::now().checked_sub(REMEMBERED_FOR).unwrap();
        let look = |at| {
            let last = Mutex::new(LastLook { at, failed: None });
            Arc::new(Looks {
                last,
                ..Looks::default()
            })
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
