//! Grant roles: the roles without login that hold a set of grants, so that an account needs only a membership. There
//! is one for each installation, admin, database and set. It is made once, is looked at and brought up to date at
//! most once a second, and is never dropped here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::Failure;
use mayfly_protocol::timing::timing;
use parking_lot::Mutex;

use super::grant_beside::Beside;
use super::grant_later::Later;
use super::grant_look::{LastLook, Looks, Step};
use super::grant_refresh::{Refreshed, refresh};
use super::grant_set::{GrantSet, Granted, Key};
use super::servers::Servers;
use super::sql::literal;
use super::target_key::target_key;

/// How long a role without requests is remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);

/// The grant roles that this engine has looked at.
#[derive(Default)]
pub(crate) struct GrantRoles {
    seen: Mutex<HashMap<Key, Arc<Looks>>>,
    pub(super) later: Later,
    pub(super) beside: Beside,
}

impl GrantRoles {
    /// Finds the role of a set, for a create that arrived at this time. If the last look is 1 to 2 s old, it is used,
    /// and the next look runs beside the create. If the last look is older or failed, the create waits for another
    /// look.
    ///
    /// # Errors
    /// As [`GrantRoles::ensure`].
    pub(crate) async fn find(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
        arrived: Instant,
    ) -> Result<Granted, Failure> {
        let (key, looks) = self.looks_of(set)?;
        let (step, oid) = looks.last.lock().seen(Instant::now());
        let is_used = match step {
            Step::Use => true,
            Step::UseAndLook => self.begin_look(servers, set, &key, &looks),
            Step::Wait => false,
        };
        match is_used {
            true => Ok(self.last_seen(&key, oid)),
            false => {
                self.ensure_looked(servers, set, (&key, &looks), arrived)
                    .await
            }
        }
    }

    /// Ensures that the role of a set exists and has its privileges, for a request that arrived at this time. If the
    /// last look is older than 1 s, the request waits for another look. While another request looks, a look of up to
    /// 2 s ago is used. If time runs out, objects of patterns are granted later.
    ///
    /// # Errors
    /// The grants are impossible, with the reason. Then a role that was just made is removed.
    pub(crate) async fn ensure(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
        arrived: Instant,
    ) -> Result<Granted, Failure> {
        let (key, looks) = self.looks_of(set)?;
        self.ensure_looked(servers, set, (&key, &looks), arrived)
            .await
    }

    async fn ensure_looked(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
        (key, looks): (&Key, &Looks),
        arrived: Instant,
    ) -> Result<Granted, Failure> {
        let asked = Instant::now();
        let (step, oid) = looks.last.lock().seen(asked);
        let _turn = match (step, looks.turn.try_lock()) {
            (Step::Use, _) | (Step::UseAndLook, Err(_)) => return Ok(self.last_seen(key, oid)),
            (Step::UseAndLook | Step::Wait, Ok(turn)) => turn,
            (Step::Wait, Err(_)) => looks.turn.lock().await,
        };
        // A request that waited may find that another request has done the look.
        {
            let last = looks.last.lock();
            if let Some((at, failure)) = &last.failed
                && *at > asked
            {
                return Err(failure.clone());
            }
            // The background grants these objects. They are not granted twice at the same time.
            let is_granted_later = last.at.is_some() && self.later.is_running(key);
            if last.is_fresh(Instant::now()) || is_granted_later {
                return Ok(self.last_seen(key, last.oid));
            }
        }
        let until = (Instant::now() + timing().grant_within).min(arrived + timing().grant_until);
        self.look(servers, set, key, looks, until).await
    }

    /// Brings a role up to date. Records when, or why it failed. The caller holds the turn.
    pub(super) async fn look(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
        key: &Key,
        looks: &Looks,
        until: Instant,
    ) -> Result<Granted, Failure> {
        match refresh(servers, set, &key.1, until).await {
            Ok(Refreshed { oid, sum }) => {
                *looks.last.lock() = LastLook::now(oid);
                let warnings = sum.waiting.warnings();
                self.later.put(key.clone(), set, sum.waiting);
                Ok(Granted {
                    role: key.1.clone(),
                    oid: Some(oid),
                    skipped: Some(sum.passed_over),
                    warnings,
                })
            }
            Err(failure) => {
                looks.last.lock().failed = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }

    /// The result of the last look, for the role with this oid.
    fn last_seen(&self, key: &Key, oid: Option<u32>) -> Granted {
        let waiting = self.later.waiting(key).unwrap_or_default();
        Granted {
            role: key.1.clone(),
            oid,
            skipped: None,
            warnings: waiting.warnings(),
        }
    }

    /// Brings the role of a set up to date if accounts are members of it. `None`: it has no member. A role that
    /// nobody uses is not made, and tidying may remove it.
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

    /// Grants what the roles whose turn is due lack. It is called about twice a second. It may be dropped at any
    /// point: what it granted is committed.
    pub(crate) async fn go_on(&self, servers: &Servers) {
        self.later.go_on(servers).await;
    }

    /// Number of pairs of object and privilege that grant roles lack now and get later.
    pub(crate) fn waiting(&self) -> usize {
        self.later.pairs()
    }

    /// Forgets the looks at a role, because it is gone.
    pub(crate) fn forget(&self, set: &GrantSet<'_>, role: &RoleName) {
        let key = (target_key(set.target), role.clone());
        *self.looks(&key).last.lock() = LastLook::default();
    }

    /// Forgets roles that had no request for 10 min. It is called about twice a second.
    pub(crate) fn forget_unused(&self) {
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() < REMEMBERED_FOR);
        let mut seen = self.seen.lock();
        seen.retain(|_, entry| {
            // An entry in use has another owner.
            Arc::strong_count(entry) > 1 || {
                let last = entry.last.lock();
                let failed = last.failed.as_ref().map(|(at, _)| *at);
                is_recent(last.at) || is_recent(failed)
            }
        });
    }

    /// The role of a set at its server, and the looks at it.
    fn looks_of(&self, set: &GrantSet<'_>) -> Result<(Key, Arc<Looks>), Failure> {
        let key = (target_key(set.target), set.role()?);
        let looks = self.looks(&key);
        Ok((key, looks))
    }

    fn looks(&self, key: &Key) -> Arc<Looks> {
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
            let last = Mutex::new(LastLook {
                at,
                ..LastLook::default()
            });
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
