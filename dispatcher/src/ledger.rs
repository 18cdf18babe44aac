//! The database as ledger. Every role of a lease says in its comment whose it is, so that what
//! the store does not know of, or takes for done, is found all the same: each server is swept now
//! and then for roles past their end, and on request all three, store, broker and database, are
//! compared. What is to be done about a role is decided by [`crate::found`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_common::fault;
use mayfly_common::grant::OwnedObjects;
use mayfly_common::names::{InstallationId, LeaseId, PoolName, RoleName, SecretPath};
use mayfly_common::task::{Kind, Ledger, LedgerRole, Revoke, RevokeMode, Sweep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::App;
use crate::error::{ApiError, Code};
use crate::found::{Act, Asked, judge, owns};
use crate::lease::{Lease, State};
use crate::requests;
use crate::store::{BaseFacts, Filter, StoreError};

/// Roles in one answer.
const PAGE: u32 = 500;
/// The first sweep comes so long after the start.
const FIRST_SWEEP: Duration = Duration::from_secs(5);
/// Pages of one server, at most: a million roles.
const MOST_PAGES: u32 = 2000;
/// How long one server is swept, at most. An engine that always has more keeps nobody else waiting.
const SWEEP_LIMIT: Duration = Duration::from_secs(600);
/// Looks at leases of other pools that one answer may cause.
const OTHERS_LOOKS: usize = 20;
/// How far two dates may differ.
const SAME: SignedDuration = SignedDuration::from_secs(1);
/// Between two counts of messages.
const COUNT_AGAIN: Duration = Duration::from_millis(400);
/// How long an engine may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two tries to park an end again while store or broker is away.
const PARK_PAUSE: Duration = Duration::from_secs(2);

/// What differs.
#[derive(Debug)]
pub(crate) struct Difference {
    /// A stable word.
    pub(crate) kind: &'static str,
    /// The base secret.
    pub(crate) path: SecretPath,
    /// The pool asked.
    pub(crate) pool: PoolName,
    /// The role.
    pub(crate) role: RoleName,
    /// The lease, as the role's comment or the store says.
    pub(crate) lease: Option<LeaseId>,
    /// Whose role, where it is another installation's.
    pub(crate) installation: Option<InstallationId>,
    /// Its end by the store.
    pub(crate) store_expiration: Option<Timestamp>,
    /// Its end by the database.
    pub(crate) database_expiration: Option<Timestamp>,
    /// What is done about it, or would be.
    pub(crate) action: &'static str,
}

/// What a comparison found.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    /// Roles of leases on all servers.
    pub(crate) roles: usize,
    /// Leases the store takes for active.
    pub(crate) leases: usize,
    /// Messages in the delay levels and in the pools' queues.
    pub(crate) messages: u64,
    /// At least so many leases have no message of theirs at the broker.
    pub(crate) messages_missing: u64,
    /// What differs.
    pub(crate) differences: Vec<Difference>,
    /// Servers that could not be asked.
    pub(crate) unreachable: Vec<(SecretPath, PoolName, ApiError)>,
    /// Roles by their servers' identities: one may be reached by several base secrets and pools.
    seen: HashMap<String, HashSet<RoleName>>,
}

/// Sweeps every server now and then, until `stop`.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut wait = FIRST_SWEEP.min(app.limits.sweep_every);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = app.limits.sweep_every;
        if !app.leads.load(Ordering::Relaxed) {
            continue;
        }
        if let Err(error) = sweep_all(&app).await {
            warn!(reason = error.message, "the sweep waits for the store");
        }
    }
}

async fn sweep_all(app: &App) -> Result<(), ApiError> {
    for (path, base) in app.store.bases_in_use().await? {
        let swept = tokio::time::timeout(SWEEP_LIMIT, sweep(app, &base)).await;
        let swept = swept.unwrap_or_else(|_| Err(too_long()));
        app.metrics
            .swept(&base.pool.name, swept.as_ref().ok().copied());
        match swept {
            Ok(0) => {}
            Ok(ended) => {
                info!(%path, pool = %base.pool.name, ended, "the sweep found accounts past their end")
            }
            // Its next chance comes; the ordinary messages do not depend on it.
            Err(error) => {
                info!(%path, pool = %base.pool.name, code = error.code.as_str(), reason = error.message, "a server was not swept");
            }
        }
    }
    Ok(())
}

/// Ends what stands on a server past its date, and what is there although its lease has ended. How
/// many.
async fn sweep(app: &App, base: &BaseFacts) -> Result<usize, ApiError> {
    let (mut ended, mut others) = (0, 0);
    let mut after = None;
    for _ in 0..MOST_PAGES {
        let page = list(app, base, after.take()).await?;
        let known = known(app, &page.roles).await?;
        let asked = asked(app, base, &page, app.limits.sweep_grace);
        for role in &page.roles {
            let lease = known.get(&role.lease);
            if !carry_out(app, base, &page, role, lease, &asked, &mut others).await? {
                continue;
            }
            ended += 1;
            if let Some(lease) = lease.filter(|lease| lease.status.state.is_settled()) {
                warn!(lease = %lease.id, role = %lease.role, pool = %base.pool.name, "the account of a lease that has ended is there again; it is ended");
            }
        }
        match page.roles.last() {
            Some(last) if page.more => after = Some(last.role.to_string()),
            _ => return Ok(ended),
        }
    }
    Err(too_long())
}

fn too_long() -> ApiError {
    ApiError::new(Code::Deadline, "the list of roles has no end")
}

/// Who answered with this page, and when.
fn asked<'a>(app: &App, base: &'a BaseFacts, page: &Ledger, grace: Duration) -> Asked<'a> {
    Asked {
        installation: app.identity.installation,
        pool: &base.pool.name,
        base: &base.base.id,
        there: page.now,
        here: app.now(),
        grace,
        others_grace: app.limits.sweep_grace,
    }
}

/// Does what is to be done about a role. Whether anything was.
async fn carry_out(
    app: &App,
    base: &BaseFacts,
    page: &Ledger,
    role: &LedgerRole,
    lease: Option<&Lease>,
    asked: &Asked<'_>,
    others: &mut usize,
) -> Result<bool, ApiError> {
    let act = judge(role, lease, asked);
    let way = match (act, lease) {
        (Act::Look, Some(lease)) => {
            if !owns(asked, lease) {
                *others += 1;
                if *others > OTHERS_LOOKS {
                    return Ok(false);
                }
            }
            app.store.revocation(lease.id, 0).await?
        }
        (Act::Look, None) | (Act::Nothing, _) => return Ok(false),
        (Act::End, _) => None,
    };
    match way {
        // What it was made with and what the store has on record: no other pool may see those
        // credentials, or speak for it.
        Some(way) => app
            .send_copy(&way)
            .await
            .map_err(|error| ApiError::broker(&error))?,
        // Where its own pool is gone, as of a lease that was detached, whoever found it does as it
        // can; what it says of the lease then counts for nothing.
        None => app.send_found(&base.pool, end_of(base, page, role)).await?,
    }
    Ok(true)
}

/// One page of the roles on a server.
async fn list(app: &App, base: &BaseFacts, after: Option<String>) -> Result<Ledger, ApiError> {
    let sweep = Sweep {
        installation: Some(app.identity.installation),
        target: base.target.clone(),
        expired_for_seconds: None,
        after: after.clone(),
        limit: PAGE,
    };
    let sent = app.now();
    let page = requests::call(app, &base.pool, &sweep, "", PATIENCE).await?;
    if !is_in_order(&page, after.as_deref()) {
        return Err(requests::unexpected_answer(Kind::Sweep).into());
    }
    let moments = (sent, app.now());
    app.clocks
        .learn(&base.base.id, &base.pool.name, page.now, moments);
    Ok(page)
}

/// Whether a page is one: of no more than was asked for, each name once and after those before.
fn is_in_order(page: &Ledger, after: Option<&str>) -> bool {
    let names = page.roles.iter().map(|role| role.role.as_str());
    page.roles.len() <= PAGE as usize
        && names
            .clone()
            .zip(names.clone().skip(1))
            .all(|(one, next)| one < next)
        && after.is_none_or(|after| names.clone().next().is_none_or(|first| after < first))
}

/// The store's leases that the comments of these roles name, whoever wrote them.
async fn known(app: &App, roles: &[LedgerRole]) -> Result<HashMap<LeaseId, Lease>, ApiError> {
    let ids = roles.iter().map(|role| role.lease).collect();
    let leases = app.store.leases_of(ids).await?;
    Ok(leases.into_iter().map(|lease| (lease.id, lease)).collect())
}

/// The end of a role that no lease of the store names, due by its own date when the message comes.
fn end_of(base: &BaseFacts, page: &Ledger, role: &LedgerRole) -> Revoke {
    Revoke {
        lease: role.lease,
        installation: role.installation,
        target: base.target.clone(),
        role: role.role.clone(),
        mode: RevokeMode::Expire,
        // What nobody remembers the policy of is kept.
        owned_objects: OwnedObjects::Reassign,
        server: Some(page.server.clone()),
        // Found there just now: on another server it is another role.
        place: None,
        window_ms: 0,
        copy: true,
        asked: false,
    }
}

/// Compares store, broker and database. Unless `dry_run`, what differs is set right: roles past
/// their date are ended, and leases are asked after, so that the outcomes correct their rows.
///
/// # Errors
/// The store or the broker is away. Servers that cannot be asked are told in the result.
pub(crate) async fn reconcile(app: &Arc<App>, dry_run: bool) -> Result<Comparison, ApiError> {
    let mut found = Comparison::default();
    let (messages, missing) = count_messages(app).await?;
    (found.messages, found.messages_missing) = (messages, missing);
    if missing > 0 {
        // One on its way from a level to the next may not have been counted.
        tokio::time::sleep(COUNT_AGAIN).await;
        let (messages, missing) = count_messages(app).await?;
        found.messages = messages.max(found.messages);
        found.messages_missing = missing.min(found.messages_missing);
    }
    for (path, base) in app.store.bases_in_use().await? {
        if let Err(error) = compare(app, &path, &base, dry_run, &mut found).await {
            found
                .unreachable
                .push((path, base.pool.name.clone(), error));
        }
    }
    if !dry_run {
        crate::delays::mend(app).await;
        crate::reconciler::declare_pools(app, false).await;
        app.store.wake_put_off(app.now()).await?;
        app.reconcile.notify_one();
        if found.messages_missing > 0 {
            app.park_again.notify_one();
        }
    }
    Ok(found)
}

/// How many messages are at the broker, and how many leases at least have none of them.
async fn count_messages(app: &App) -> Result<(u64, u64), ApiError> {
    // The store first: what is issued meanwhile must not look like missing.
    let living = app.store.living(app.now()).await?;
    let mut messages = app
        .broker
        .parked()
        .await
        .map_err(|error| ApiError::broker(&error))?;
    for pool in app.store.all_pools().await? {
        // Queues that are gone hold nothing.
        let waiting = app.broker.waiting(&pool.name).await.ok().flatten();
        messages += waiting.map_or(0, |waiting| u64::from(waiting.revoke));
    }
    Ok((messages, living.saturating_sub(messages)))
}

/// Parks the ends of all leases that somebody holds once more: it cannot be told whose are
/// missing, and a second message finds nothing left to do. Store and broker are waited for, until the
/// dispatcher ends. Whether it came to the last one.
pub(crate) async fn park_all(app: &App) -> bool {
    let mut cursor = String::new();
    let mut parked = 0_u64;
    let filter = Filter {
        state: Some(State::Active),
        ..Filter::default()
    };
    while !app.draining.load(Ordering::Relaxed) {
        let page = app
            .store
            .leases(filter.clone(), cursor.clone(), PAGE as usize)
            .await;
        let page = match page {
            Ok(page) => page,
            Err(error) => {
                warn!(%error, "the ends of leases wait to be parked again");
                tokio::time::sleep(PARK_PAUSE).await;
                continue;
            }
        };
        let Some(last) = page.last() else { break };
        cursor = last.id.to_string();
        for lease in page {
            // The same lease again, so that no other gets a second message.
            while !app.draining.load(Ordering::Relaxed) {
                fault::point("levels", "parking").await;
                match park_again(app, lease.id).await {
                    Ok(was) => {
                        parked += u64::from(was);
                        break;
                    }
                    Err(error) => {
                        warn!(lease = %lease.id, reason = error.message, "the ends of leases wait to be parked again");
                        tokio::time::sleep(PARK_PAUSE).await;
                    }
                }
            }
        }
    }
    let is_done = !app.draining.load(Ordering::Relaxed);
    if is_done {
        info!(parked, "the ends of leases are parked again");
    }
    is_done
}

/// Parks one end again. False: there is none to park, or its pool may not be told.
///
/// # Errors
/// The store or the broker is away.
async fn park_again(app: &App, lease: LeaseId) -> Result<bool, ApiError> {
    let way = match app.store.revocation(lease, 0).await {
        Ok(Some(way)) => way,
        Ok(None) => return Ok(false),
        Err(error @ StoreError::Unavailable(_)) if !app.store.is_reached() => {
            return Err(error.into());
        }
        // A row that cannot be read, or a pool that is distrusted, holds up no other lease.
        Err(error) => {
            warn!(%lease, %error, "the end of this lease is not parked again");
            return Ok(false);
        }
    };
    match app.park_rest(&way).await {
        Ok(()) => Ok(true),
        Err(error) => Err(ApiError::broker(&error)),
    }
}

async fn compare(
    app: &App,
    path: &SecretPath,
    base: &BaseFacts,
    dry_run: bool,
    found: &mut Comparison,
) -> Result<(), ApiError> {
    // The store first: what is made meanwhile must not look like missing.
    let mut missing = HashMap::new();
    let mut cursor = String::new();
    loop {
        let leases = app
            .store
            .active_of_base(base.base.id.clone(), base.pool.name.clone(), cursor, PAGE)
            .await?;
        let full = leases.len() == PAGE as usize;
        cursor = leases
            .last()
            .map_or_else(String::new, |last| last.id.to_string());
        missing.extend(leases.into_iter().map(|lease| (lease.id, lease)));
        if !full {
            break;
        }
    }
    found.leases += missing.len();
    let mut after = None;
    let mut server;
    loop {
        let page = list(app, base, after.take()).await?;
        let known = known(app, &page.roles).await?;
        let asked = asked(app, base, &page, Duration::ZERO);
        for role in &page.roles {
            let lease = known.get(&role.lease);
            let own = role.installation == app.identity.installation;
            // The engines of its own pool are asked too, and only they say what differs.
            let is_others =
                |lease: &Lease| own && !owns(&asked, lease) && !lease.status.state.is_settled();
            if lease.is_some_and(is_others) {
                continue;
            }
            let lease = lease.filter(|lease| own && role.role == lease.role);
            if lease.is_some() {
                missing.remove(&role.lease);
            }
            let seen = found.seen.entry(page.server.clone()).or_default();
            if !seen.insert(role.role.clone()) {
                continue;
            }
            found.roles += 1;
            let Some(kind) = differs(role, lease, own, page.now) else {
                continue;
            };
            let act = judge(role, known.get(&role.lease), &asked);
            let corrects = kind == "expiration_differs" && lease.is_some();
            let action = match act {
                Act::Look | Act::End => "end the account",
                Act::Nothing if corrects => "correct the store",
                Act::Nothing => "none; it ends at its date or is another's",
            };
            if dry_run {
            } else if act != Act::Nothing {
                let known = known.get(&role.lease);
                carry_out(app, base, &page, role, known, &asked, &mut 0).await?;
            } else if corrects && let Some(way) = app.store.revocation(role.lease, 0).await? {
                app.send_copy(&way)
                    .await
                    .map_err(|error| ApiError::broker(&error))?;
            }
            found.differences.push(Difference {
                kind,
                path: path.clone(),
                pool: base.pool.name.clone(),
                role: role.role.clone(),
                lease: Some(role.lease),
                installation: (!own).then_some(role.installation),
                store_expiration: lease.and_then(|lease| lease.status.expiration),
                database_expiration: role.expiration,
                action,
            });
        }
        server = page.server;
        match page.roles.last() {
            Some(last) if page.more => after = Some(last.role.to_string()),
            _ => break,
        }
    }
    for lease in missing.into_values() {
        // Made on the server this base secret named before.
        if lease
            .status
            .server
            .as_ref()
            .is_some_and(|made| *made != server)
        {
            continue;
        }
        // It ended after the store was asked.
        if app.store.lease(lease.id).await?.status.state != lease.status.state {
            continue;
        }
        if !dry_run && let Some(way) = app.store.revocation(lease.id, 0).await? {
            app.send_copy(&way)
                .await
                .map_err(|error| ApiError::broker(&error))?;
        }
        found.differences.push(Difference {
            kind: "account_missing",
            path: path.clone(),
            pool: base.pool.name.clone(),
            role: lease.role,
            lease: Some(lease.id),
            installation: None,
            store_expiration: lease.status.expiration,
            database_expiration: None,
            action: "settle the lease",
        });
    }
    Ok(())
}

/// In what a role and its lease differ; a stable word.
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
            // As long as it lives it is none of this one's business.
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
    (stored.duration_since(real).abs() > SAME).then_some("expiration_differs")
}
