//! Compares store, broker and databases on request. The comment of each role names its lease, so leases can
//! be found without the store. [`super::judge`] decides what to do about a role.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::names::{InstallationId, LeaseId, PoolName, RoleName, SecretPath};
use mayfly_protocol::task::{Ledger, LedgerRole};
use tokio::time::timeout;

use super::judge::{Act, Asked, judge, owns};
use super::sweep;
use crate::app::App;
use crate::engines::{declare, outbox};
use crate::error::ApiError;
use crate::store::BaseFacts;
use mayfly_protocol::lease::{Lease, State};

/// Leases in one query. It is also the number of roles in one answer of an engine.
const PAGE: u32 = 500;
/// Differences that the answer lists; it counts all of them.
const LISTED_MAX: usize = 10_000;
/// Allowed difference between two ends of a lease.
const SAME: SignedDuration = SignedDuration::from_secs(1);
const EXPIRATION_DIFFERS: &str = "expiration_differs";
/// Pause between two counts of messages.
const COUNT_AGAIN: Duration = Duration::from_millis(400);

/// A difference between a role and the store.
#[derive(Debug)]
pub(crate) struct Difference {
    pub(crate) kind: &'static str,
    pub(crate) path: SecretPath,
    pub(crate) pool: PoolName,
    pub(crate) role: RoleName,
    /// The lease, by the role's comment or the store.
    pub(crate) lease: Option<LeaseId>,
    /// The other installation, if the role belongs to one.
    pub(crate) installation: Option<InstallationId>,
    /// The lease's end according to the store.
    pub(crate) store_expiration: Option<Timestamp>,
    /// The account's end according to the database.
    pub(crate) database_expiration: Option<Timestamp>,
    /// What is done about it, or would be.
    pub(crate) action: &'static str,
}

/// What a comparison found.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    /// Roles of leases on all servers.
    pub(crate) roles: usize,
    /// Number of active leases in the store.
    pub(crate) leases: usize,
    /// Messages in the delay levels and in the pools' queues.
    pub(crate) messages: u64,
    /// Minimum number of leases that have no message at the broker.
    pub(crate) messages_missing: u64,
    /// The first [`LISTED_MAX`] of them.
    pub(crate) differences: Vec<Difference>,
    pub(crate) differences_total: usize,
    /// Servers that did not answer.
    pub(crate) unreachable: Vec<(SecretPath, PoolName, ApiError)>,
    /// The last compared role of each of [`places`], in the order of the ledger. A server may be reached by several
    /// base secrets and pools.
    compared: HashMap<String, RoleName>,
}

/// The two names under which a compared server is remembered: its identity with the pool, and its identity with the
/// address. An engine reports the identity, and could report that of another server. So the pool or the address must
/// match too; otherwise an engine could hide the roles of any server.
fn places(pool: &PoolName, address: &str, server: &str) -> [String; 2] {
    [
        format!("pool {pool} {server}"),
        format!("address {address} {server}"),
    ]
}

impl Comparison {
    fn differs(&mut self, difference: Difference) {
        self.differences_total += 1;
        if self.differences.len() < LISTED_MAX {
            self.differences.push(difference);
        }
    }

    /// Whether this role was reported before, through another base secret or pool. While its lease is not settled,
    /// only the lease's own pool reports a role.
    fn was_compared(&self, places: &[String; 2], role: &RoleName) -> bool {
        let mut last = places.iter().filter_map(|place| self.compared.get(place));
        last.any(|last| role.as_str() <= last.as_str())
    }

    fn compared_to(&mut self, places: [String; 2], page: &Ledger) {
        let Some(last) = page.roles.last() else {
            return;
        };
        for place in places {
            let known = self
                .compared
                .entry(place)
                .or_insert_with(|| last.role.clone());
            if known.as_str() < last.role.as_str() {
                *known = last.role.clone();
            }
        }
    }
}

/// Compares store, broker and databases. Unless `dry_run`, it repairs the differences: roles past their end are
/// ended, and revocations are sent for leases, so that the outcomes correct their rows.
///
/// # Errors
/// The store or the broker is unreachable. Servers that cannot be asked are listed in the result.
pub(crate) async fn reconcile(app: &Arc<App>, dry_run: bool) -> Result<Comparison, ApiError> {
    let mut found = Comparison::default();
    let (messages, missing) = count_messages(app).await?;
    (found.messages, found.messages_missing) = (messages, missing);
    if missing > 0 {
        // A message between two levels may not have been counted.
        tokio::time::sleep(COUNT_AGAIN).await;
        let (messages, missing) = count_messages(app).await?;
        found.messages = messages.max(found.messages);
        found.messages_missing = missing.min(found.messages_missing);
    }
    for (path, base) in app.store.bases_in_use().await? {
        let (path, base) = (&path, &base);
        let comparing = Comparing {
            app,
            path,
            base,
            dry_run,
        };
        let run = timeout(sweep::SERVER_LIMIT, comparing.run(&mut found)).await;
        if let Err(error) = run.unwrap_or_else(|_| Err(sweep::too_long())) {
            let pool = base.pool.name.clone();
            found.unreachable.push((path.clone(), pool, error));
        }
    }
    if !dry_run {
        declare::mend(app).await;
        declare::declare_pools(app, false).await;
        app.store.wake_put_off(app.now()).await?;
        app.reconcile.notify_one();
        if found.messages_missing > 0 {
            app.park_again.notify_one();
        }
    }
    Ok(found)
}

/// The number of messages at the broker, and the minimum number of leases without a message.
async fn count_messages(app: &App) -> Result<(u64, u64), ApiError> {
    // The store is read first, so that leases that are issued meanwhile do not seem to lack a message.
    let living = app.store.living(app.now()).await?;
    let mut messages = app
        .broker
        .parked()
        .await
        .map_err(|error| ApiError::broker(&error))?;
    for pool in app.store.all_pools().await? {
        // Absent queues hold no messages.
        let waiting = app.broker.waiting(&pool.name).await.ok().flatten();
        messages += waiting.map_or(0, |waiting| u64::from(waiting.revoke));
    }
    Ok((messages, living.saturating_sub(messages)))
}

/// One base secret, whose server is compared with the store.
struct Comparing<'a> {
    app: &'a App,
    path: &'a SecretPath,
    base: &'a BaseFacts,
    /// Whether it only lists what differs.
    dry_run: bool,
}

impl Comparing<'_> {
    /// Compares page by page: leases of the store and roles of the server, both in the order of the roles. The memory
    /// it needs does not grow with their number.
    async fn run(&self, found: &mut Comparison) -> Result<(), ApiError> {
        let mut after = String::new();
        for _ in 0..sweep::MOST_PAGES {
            // The store is read first, so that accounts that are made meanwhile do not seem to be absent.
            let (mut leases, next) = self.active_leases(after.clone()).await?;
            let listed_from = (!after.is_empty()).then_some(after);
            let mut page = sweep::list(self.app, self.base, listed_from).await?;
            let until = cut(&mut leases, next, &mut page);
            found.leases += leases.len();
            let mut missing: HashSet<LeaseId> = leases.iter().map(|lease| lease.id).collect();
            drop(leases);
            self.compare_page(&page, &mut missing, found).await?;
            for id in missing {
                self.settle_without_account(id, &page.server, found).await?;
            }
            match until {
                Some(role) => after = role,
                None => return Ok(()),
            }
        }
        Err(sweep::too_long())
    }

    /// The next page of active leases of the base secret, and the role after which there may be more.
    async fn active_leases(&self, after: String) -> Result<(Vec<Lease>, Option<String>), ApiError> {
        let (base, pool) = (self.base.base.id.clone(), self.base.pool.name.clone());
        let leases = self.app.store.active_by_role(base, pool, after, PAGE).await;
        Ok(leases?)
    }

    /// Compares the roles of a page with their leases, and takes the leases of these roles out of `missing`.
    async fn compare_page(
        &self,
        page: &Ledger,
        missing: &mut HashSet<LeaseId>,
        found: &mut Comparison,
    ) -> Result<(), ApiError> {
        let (app, base) = (self.app, self.base);
        let known = sweep::known(app, &page.roles).await?;
        let asked = sweep::asked(app, base, page, Duration::ZERO);
        let places = places(&base.pool.name, &base.target.address(), &page.server);
        for role in &page.roles {
            let known = known.get(&role.lease);
            let Some(compared) = Compared::of(role, known, &asked) else {
                continue;
            };
            let lease = compared.lease;
            if lease.is_some() {
                missing.remove(&role.lease);
            }
            let is_unsettled = lease.is_some_and(|lease| !lease.status.state.is_settled());
            if !is_unsettled && found.was_compared(&places, &role.role) {
                continue;
            }
            found.roles += 1;
            let Some((kind, remedy)) = compared.difference else {
                continue;
            };
            match remedy {
                _ if self.dry_run => {}
                Remedy::EndAccount => {
                    sweep::carry_out(app, base, page, role, known, &asked, &mut 0).await?;
                }
                Remedy::CorrectStore => self.send_copy(role.lease).await?,
                Remedy::Nothing => {}
            }
            let own = role.installation == asked.installation;
            found.differs(Difference {
                kind,
                path: self.path.clone(),
                pool: base.pool.name.clone(),
                role: role.role.clone(),
                lease: Some(role.lease),
                installation: (!own).then_some(role.installation),
                store_expiration: lease.and_then(|lease| lease.status.expiration),
                database_expiration: role.expiration,
                action: remedy.as_str(),
            });
        }
        found.compared_to(places, page);
        Ok(())
    }

    /// The account of this lease was not found on `server`.
    async fn settle_without_account(
        &self,
        id: LeaseId,
        server: &str,
        found: &mut Comparison,
    ) -> Result<(), ApiError> {
        let lease = self.app.store.lease(id).await?;
        if !lacks_account(&lease, server) {
            return Ok(());
        }
        if !self.dry_run {
            self.send_copy(lease.id).await?;
        }
        found.differs(Difference {
            kind: "account_missing",
            path: self.path.clone(),
            pool: self.base.pool.name.clone(),
            role: lease.role,
            lease: Some(lease.id),
            installation: None,
            store_expiration: lease.status.expiration,
            database_expiration: None,
            action: "settle the lease",
        });
        Ok(())
    }

    /// Sends a copy of the lease's revocation. Its outcome corrects the row.
    async fn send_copy(&self, lease: LeaseId) -> Result<(), ApiError> {
        if let Some(access) = self.app.store.lease_access(lease, 0).await? {
            outbox::copy(self.app, &access)
                .await
                .map_err(|error| ApiError::broker(&error))?;
        }
        Ok(())
    }
}

/// Cuts a page of leases and a page of roles to the part that both cover. `next` is the role after which there may
/// be more leases. Returns the last role of that part; `None`: both lists are complete.
fn cut(leases: &mut Vec<Lease>, next: Option<String>, page: &mut Ledger) -> Option<String> {
    let of_server = page.roles.last().filter(|_| page.more);
    let of_server = of_server.map(|last| last.role.to_string());
    let until = next.into_iter().chain(of_server).min()?;
    leases.retain(|lease| lease.role.as_str() <= until.as_str());
    page.roles
        .retain(|role| role.role.as_str() <= until.as_str());
    Some(until)
}

/// A role and what the store has of it.
#[derive(Debug)]
struct Compared<'l> {
    /// The lease of this installation whose account it is.
    lease: Option<&'l Lease>,
    /// The stable word for the difference, and what is done about it.
    difference: Option<(&'static str, Remedy)>,
}

impl<'l> Compared<'l> {
    /// Compares a role with the lease that its comment names. `None`: the engines of the lease's own pool are asked
    /// too, and only their answer decides what differs.
    fn of(role: &LedgerRole, known: Option<&'l Lease>, asked: &Asked<'_>) -> Option<Self> {
        let own = role.installation == asked.installation;
        let is_others =
            |lease: &Lease| own && !owns(asked, lease) && !lease.status.state.is_settled();
        if known.is_some_and(is_others) {
            return None;
        }
        let lease = known.filter(|lease| own && role.role == lease.role);
        let difference = differs(role, lease, own, asked.there);
        let difference = difference.map(|kind| match judge(role, known, asked) {
            Act::Look | Act::End => (kind, Remedy::EndAccount),
            Act::Nothing if kind == EXPIRATION_DIFFERS => (kind, Remedy::CorrectStore),
            Act::Nothing => (kind, Remedy::Nothing),
        });
        Some(Self { lease, difference })
    }
}

/// What is done about a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    EndAccount,
    CorrectStore,
    Nothing,
}

impl Remedy {
    fn as_str(self) -> &'static str {
        match self {
            Self::EndAccount => "end the account",
            Self::CorrectStore => "correct the store",
            Self::Nothing => "none: the account ends on time, or belongs to another installation",
        }
    }
}

/// Whether a lease lacks its account, which was not found on `server`. It may have ended after the store was read,
/// or its account was made on the server that its base secret named before.
fn lacks_account(lease: &Lease, server: &str) -> bool {
    let made_on = lease.status.server.as_deref();
    lease.status.state == State::Active && made_on.is_none_or(|made| made == server)
}

/// The stable word for the difference between a role and its lease.
fn differs(
    role: &LedgerRole,
    lease: Option<&Lease>,
    own: bool,
    now: Timestamp,
) -> Option<&'static str> {
    let overdue = role.expiration.is_some_and(|end| end <= now);
    let Some(lease) = lease else {
        return match (own, overdue) {
            (true, _) => Some("unknown_to_store"),
            // The account belongs to the other installation while it lives.
            (false, true) => Some("other_installation"),
            (false, false) => None,
        };
    };
    if lease.status.state.is_settled() {
        return Some("settled_in_store");
    }
    if overdue {
        return Some("overdue");
    }
    let (Some(stored), Some(real)) = (lease.status.expiration, role.expiration) else {
        return None;
    };
    (stored.duration_since(real).abs() > SAME).then_some(EXPIRATION_DIFFERS)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
