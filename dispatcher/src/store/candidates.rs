//! What an engine needs to act on the account of a lease: the server, and the credential candidates.

use std::collections::HashMap;
use std::collections::hash_map::Entry::{Occupied, Vacant};

use mayfly_protocol::names::{LeaseId, PoolName};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::Place;

use tracing::warn;

use super::bases::{self, may_have};
use super::lease_row::load;
use super::pools::{self, Recipient};
use super::sealer::Sealer;
use super::sql::Connection;
use super::{Lane, Store, StoreError};
use mayfly_protocol::lease::{BaseRef, Lease};

/// What a revocation of a lease needs.
#[derive(Debug, Clone)]
pub(crate) struct LeaseAccess {
    pub(crate) lease: Lease,
    /// The admin connection to use: one of [`LeaseAccess::candidates`].
    pub(crate) target: Target,
    /// The admin connection that the account was made with.
    pub(crate) own_target: Target,
    /// The number of candidates: the credentials that the account was made with and, if the base secret has changed
    /// since, its present ones.
    pub(crate) candidates: u32,
    /// Whether messages may be parked that the engines of its pool cannot open any more.
    pub(crate) new_key: bool,
    /// Whether this pool has taken the lease over from another pool.
    pub(crate) taken_over: bool,
    /// The server that has its account, if it is known.
    pub(crate) server: Option<String>,
    /// The receiver of the sealed message.
    pub(crate) recipient: Recipient,
}

impl LeaseAccess {
    /// Whether its target is at the address where the lease was made.
    pub(crate) fn place(&self) -> Place {
        match self.target.address() == self.own_target.address() {
            true => Place::Own,
            false => Place::Other,
        }
    }

    /// Whether engines end both leases in the same way, so that one message may name both.
    pub(crate) fn is_ended_like(&self, other: &Self) -> bool {
        let (one, two) = (&self.lease, &other.lease);
        one.pool == two.pool
            && one.revoke_mode() == two.revoke_mode()
            && one.owned_objects == two.owned_objects
            && self.server == other.server
            && self.recipient == other.recipient
            && self.place() == other.place()
            && self.target == other.target
    }
}

/// What a revocation of the lease needs. `None`: its base secret is not kept any more, or its pool is distrusted.
/// `turn` chooses among the candidates: the n-th try takes the n-th of them, in a circle. A pool gets the present
/// credentials of the base secret only if it may have them, see [`may_have`]. Otherwise it gets no credentials newer
/// than its lease.
pub(super) fn lease_access(
    connection: &Connection,
    sealer: &Sealer,
    lease: &Lease,
    turn: u32,
) -> Result<Option<LeaseAccess>, StoreError> {
    Ok(common_access(connection, sealer, lease)?.map(|common| common.of(lease, turn)))
}

/// What leases of one base secret and pool have in common.
struct CommonAccess {
    own: Target,
    seen: Option<String>,
    candidates: Vec<Target>,
    new_key: bool,
    recipient: Recipient,
}

/// The candidates of many leases. Each base secret and pool is read once in a job. A job that changes them must not
/// use this.
#[derive(Default)]
pub(super) struct AccessCache(HashMap<(String, u64, PoolName, bool), Option<CommonAccess>>);

impl AccessCache {
    /// Like [`lease_access`]. It also returns `None` if a row of the base secret or the pool is unusable, so that
    /// other leases do not wait.
    pub(super) fn access(
        &mut self,
        connection: &Connection,
        sealer: &Sealer,
        lease: &Lease,
        turn: u32,
    ) -> Result<Option<LeaseAccess>, StoreError> {
        let key = (
            lease.base.id.clone(),
            lease.base.version,
            lease.pool.clone(),
            lease.status.server.is_some(),
        );
        let common = match self.0.entry(key) {
            Occupied(known) => known.into_mut(),
            Vacant(new) => new.insert(match common_access(connection, sealer, lease) {
                Err(StoreError::Unusable(why)) => {
                    warn!(lease = %lease.id, why, "a row is not used, so leases cannot be ended now");
                    None
                }
                found => found?,
            }),
        };
        Ok(common.as_ref().map(|common| common.of(lease, turn)))
    }
}

impl CommonAccess {
    fn of(&self, lease: &Lease, turn: u32) -> LeaseAccess {
        let count = u32::try_from(self.candidates.len()).unwrap_or(u32::MAX);
        let chosen = usize::try_from(turn % count.max(1)).unwrap_or(0);
        let target = self.candidates.get(chosen).unwrap_or(&self.own);
        LeaseAccess {
            lease: lease.clone(),
            target: target.clone(),
            own_target: self.own.clone(),
            candidates: count,
            new_key: self.new_key,
            taken_over: false,
            server: lease.status.server.clone().or_else(|| self.seen.clone()),
            recipient: self.recipient.clone(),
        }
    }
}

fn common_access(
    connection: &Connection,
    sealer: &Sealer,
    lease: &Lease,
) -> Result<Option<CommonAccess>, StoreError> {
    let Some((own, seen)) = bases::load_target(connection, sealer, &lease.base)? else {
        return Ok(None);
    };
    let is_known = lease.status.server.is_some() || seen.is_some();
    let newest = bases::newest_version(connection, &lease.base.id)?
        .filter(|version| *version != lease.base.version)
        .map(|version| BaseRef {
            id: lease.base.id.clone(),
            version,
        });
    let (mut present, mut between) = (None, Vec::new());
    if let Some(newest) = newest
        && may_have(connection, &newest, &lease.pool)?
    {
        present = bases::load_target(connection, sealer, &newest)?.map(|(target, _)| target);
        between = bases::targets_between(connection, sealer, &lease.base, newest.version)?;
    }
    let mut candidates = candidates(&own, present, is_known);
    also_as_its_maker(&mut candidates, &own, between);
    let pool = match pools::load(connection, &lease.pool) {
        Ok(pool) => pool,
        Err(StoreError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Ok(recipient) = pool.recipient() else {
        return Ok(None);
    };
    Ok(Some(CommonAccess {
        own,
        seen,
        candidates,
        new_key: pool.has_new_keys(),
        recipient,
    }))
}

/// The candidates to end an account, the most likely first: the address where it was made, with the credentials that
/// work there now. Another address is tried only if the server's identity is known, so that no other server is taken
/// for it. Credentials are never sent with less protection than the base secret stated for their address.
fn candidates(own: &Target, present: Option<Target>, is_known: bool) -> Vec<Target> {
    let Some(present) = present.filter(|present| present != own) else {
        return vec![own.clone()];
    };
    // The credentials of one target, with address and protection of another.
    let by = |address: &Target, credentials: &Target| Target {
        database: credentials.database.clone(),
        username: credentials.username.clone(),
        password: credentials.password.clone(),
        sslcert: credentials.sslcert.clone(),
        sslkey: credentials.sslkey.clone(),
        ..address.clone()
    };
    if (&present.host, present.port) == (&own.host, own.port) {
        let before = by(&present, own);
        return match before == present {
            true => vec![present],
            false => vec![present, before],
        };
    }
    let mut candidates = vec![own.clone()];
    if is_known {
        candidates.push(present.clone());
    }
    candidates.push(Target {
        auth: own.auth.min(present.auth),
        ..by(own, &present)
    });
    candidates
}

/// Adds the later passwords of the account's maker, which are those of `between`, at the address where the account
/// was made. From PostgreSQL 16 on only the maker of an account may end it.
fn also_as_its_maker(candidates: &mut Vec<Target>, own: &Target, between: Vec<Target>) {
    for target in between {
        let is_maker =
            target.username == own.username && (&target.host, target.port) == (&own.host, own.port);
        let is_new = |it: &Target| {
            (&it.host, it.port, &it.username, &it.password)
                != (
                    &target.host,
                    target.port,
                    &target.username,
                    &target.password,
                )
        };
        if is_maker && candidates.iter().all(is_new) {
            // These credentials are used with the present protection of the address.
            let first = candidates
                .iter()
                .find(|it| (&it.host, it.port) == (&own.host, own.port));
            let first = first.unwrap_or(own);
            candidates.push(Target {
                database: target.database,
                username: target.username,
                password: target.password,
                sslcert: target.sslcert,
                sslkey: target.sslkey,
                ..first.clone()
            });
        }
    }
}

impl Store {
    /// What a revocation of a lease needs, with the candidate number `turn`. `None`: its base secret is not kept any
    /// more.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn lease_access(
        &self,
        id: LeaseId,
        turn: u32,
    ) -> Result<Option<LeaseAccess>, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let sealer = connection.sealer()?;
            let lease = load(connection, id)?;
            lease_access(connection, sealer, &lease, turn)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::pg_login::Auth;
    use mayfly_protocol::secret::Secret;
    use mayfly_protocol::target::SslMode;

    fn target(host: &str, user: &str) -> Target {
        Target {
            host: host.to_owned(),
            username: user.to_owned(),
            ..mayfly_protocol::fixtures::target()
        }
    }

    #[test]
    fn accounts_are_ended_where_they_were_made_with_what_works_there() {
        let own = target("old", "a");
        assert_eq!(candidates(&own, None, true), std::slice::from_ref(&own));
        let same = candidates(&own, Some(own.clone()), true);
        assert_eq!(same, std::slice::from_ref(&own));
        let user = target("old", "b");
        assert_eq!(
            candidates(&own, Some(user.clone()), true),
            [user, own.clone()]
        );
        let safer = Target {
            sslmode: SslMode::VerifyFull,
            ..own.clone()
        };
        assert_eq!(
            candidates(&own, Some(safer.clone()), true),
            std::slice::from_ref(&safer),
            "a protection that was raised is not got round"
        );
        let weak = Target {
            auth: Auth::Password,
            ..target("new", "b")
        };
        let there = candidates(&safer, Some(weak), false);
        assert_eq!(there.len(), 2);
        assert_eq!(
            (there[1].sslmode, there[1].auth, there[1].username.as_str()),
            (SslMode::VerifyFull, Auth::Scram, "b")
        );
        let later = Target {
            password: Secret::new("p2"),
            ..own.clone()
        };
        let mut by_maker = candidates(&own, Some(target("old", "b")), true);
        let between = vec![
            later.clone(),
            own.clone(),
            target("old", "c"),
            target("new", "a"),
        ];
        also_as_its_maker(&mut by_maker, &own, between);
        assert_eq!(by_maker, [target("old", "b"), own.clone(), later]);
        let moved = target("new", "b");
        let mixed = target("old", "b");
        assert_eq!(
            candidates(&own, Some(moved.clone()), true),
            [own.clone(), moved.clone(), mixed.clone()]
        );
        assert_eq!(
            candidates(&own, Some(moved), false),
            [own, mixed],
            "an unknown server is not looked for elsewhere"
        );
    }
}
