//! The sweep looks regularly on each server for roles of leases past their end. It finds accounts that the store
//! does not know or has recorded as ended. [`super::judge`] decides what to do about a role.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mayfly_protocol::grant::OwnedObjects;
use mayfly_protocol::names::LeaseId;
use mayfly_protocol::task::{Kind, Ledger, LedgerRole, Revoke, RevokeMode, Sweep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::judge::{Act, Asked, judge, owns};
use crate::app::App;
use crate::engines::{call, outbox};
use crate::error::{ApiError, Code};
use crate::store::BaseFacts;
use mayfly_protocol::lease::Lease;

/// Maximum number of roles in one answer.
const PAGE: u32 = 500;
/// Pause between the start and the first sweep.
const FIRST_SWEEP: Duration = Duration::from_secs(5);
/// Longest identity of a server, in bytes.
const SERVER_MAX: usize = 1024;
/// Maximum number of pages of one server: a million roles.
pub(super) const MOST_PAGES: u32 = 2000;
/// Maximum time for one server, so that an endless list of an engine does not delay others.
pub(super) const SERVER_LIMIT: Duration = Duration::from_secs(600);
/// Maximum number of looks at leases of other pools that one answer can cause.
const OTHERS_LOOKS: usize = 20;
/// Maximum time for an engine's answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Sweeps every server regularly, until `stop`.
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
        let swept = tokio::time::timeout(SERVER_LIMIT, sweep(app, &base)).await;
        let swept = swept.unwrap_or_else(|_| Err(too_long()));
        app.metrics
            .swept(&base.pool.name, swept.as_ref().ok().copied());
        match swept {
            Ok(0) => {}
            Ok(ended) => {
                info!(%path, pool = %base.pool.name, ended, "a sweep found accounts past their end")
            }
            // The next sweep tries this server again. The usual messages do not depend on the sweep.
            Err(error) => {
                info!(%path, pool = %base.pool.name, code = error.code.as_str(), reason = error.message, "a server could not be swept");
            }
        }
    }
    Ok(())
}

/// Ends the roles on a server that are past their end or whose lease has ended. Returns their number.
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
                warn!(lease = %lease.id, role = %lease.role, pool = %base.pool.name, "the account of an ended lease exists again; it is ended");
            }
        }
        match page.roles.last() {
            Some(last) if page.more => after = Some(last.role.to_string()),
            _ => return Ok(ended),
        }
    }
    Err(too_long())
}

pub(super) fn too_long() -> ApiError {
    ApiError::new(Code::Deadline, "the list of roles does not end")
}

/// Describes the engine that answered with this page, and the time.
pub(super) fn asked<'a>(
    app: &App,
    base: &'a BaseFacts,
    page: &Ledger,
    grace: Duration,
) -> Asked<'a> {
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

/// Acts on a role as decided. Returns whether it did anything.
pub(super) async fn carry_out(
    app: &App,
    base: &BaseFacts,
    page: &Ledger,
    role: &LedgerRole,
    lease: Option<&Lease>,
    asked: &Asked<'_>,
    others: &mut usize,
) -> Result<bool, ApiError> {
    let act = judge(role, lease, asked);
    let access = match (act, lease) {
        (Act::Look, Some(lease)) => {
            if !owns(asked, lease) {
                *others += 1;
                if *others > OTHERS_LOOKS {
                    return Ok(false);
                }
            }
            app.store.lease_access(lease.id, 0).await?
        }
        (Act::Look, None) | (Act::Nothing, _) => return Ok(false),
        (Act::End, _) => None,
    };
    match access {
        // The message has the lease's own credentials and values. No other pool may see them or report about the
        // lease.
        Some(access) => outbox::copy(app, &access)
            .await
            .map_err(|error| ApiError::broker(&error))?,
        // If the lease's own pool is gone, as after a detach, the pool that found the role ends it. The reports of
        // that pool about the lease do not count.
        None => outbox::found(app, &base.pool, end_of(base, page, role)).await?,
    }
    Ok(true)
}

/// One page of the roles on a server.
pub(super) async fn list(
    app: &App,
    base: &BaseFacts,
    after: Option<String>,
) -> Result<Ledger, ApiError> {
    let sweep = Sweep {
        installation: Some(app.identity.installation),
        target: base.target.clone(),
        expired_for_seconds: None,
        after: after.clone(),
        limit: PAGE,
    };
    let sent = app.now();
    let page = call::call(app, &base.pool, &sweep, "", PATIENCE).await?;
    if !is_in_order(&page, after.as_deref()) {
        return Err(call::unexpected_answer(Kind::Sweep).into());
    }
    let moments = (sent, app.now());
    app.clocks
        .learn(&base.base.id, &base.pool.name, page.now, moments);
    Ok(page)
}

/// Whether a page is valid: at most the requested number of roles, in ascending order without duplicates, of a server
/// with a short name.
fn is_in_order(page: &Ledger, after: Option<&str>) -> bool {
    let names = page.roles.iter().map(|role| role.role.as_str());
    page.roles.len() <= PAGE as usize
        && page.server.len() <= SERVER_MAX
        && names
            .clone()
            .zip(names.clone().skip(1))
            .all(|(one, next)| one < next)
        && after.is_none_or(|after| names.clone().next().is_none_or(|first| after < first))
}

/// The store's leases that the comments of these roles name. Anybody may have written a comment.
pub(super) async fn known(
    app: &App,
    roles: &[LedgerRole],
) -> Result<HashMap<LeaseId, Lease>, ApiError> {
    let ids = roles.iter().map(|role| role.lease).collect();
    let leases = app.store.leases_of(ids).await?;
    Ok(leases.into_iter().map(|lease| (lease.id, lease)).collect())
}

/// The end of a role that belongs to no lease of the store. It is due at the role's own `VALID UNTIL`.
fn end_of(base: &BaseFacts, page: &Ledger, role: &LedgerRole) -> Revoke {
    Revoke {
        lease: role.lease,
        installation: role.installation,
        target: base.target.clone(),
        role: role.role.clone(),
        mode: RevokeMode::Expire,
        // Objects of an account with an unknown policy are kept.
        owned_objects: OwnedObjects::Reassign,
        server: Some(page.server.clone()),
        // The sweep has just found the role on this server. A role with the same name on another server is a
        // different one.
        place: None,
        window_ms: 0,
        copy: true,
        asked: false,
        reads_batches: true,
        others: vec![],
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::at;

    fn page(names: &[&str]) -> Ledger {
        let role = |name: &&str| LedgerRole {
            role: name.parse().unwrap(),
            installation: "00000000-0000-4000-8000-000000000001".parse().unwrap(),
            lease: LeaseId::random(),
            expiration: None,
            owns: false,
        };
        Ledger {
            server: "s".to_owned(),
            now: at(0),
            roles: names.iter().map(role).collect(),
            more: true,
        }
    }

    /// An engine that repeats itself would keep the sweep busy for ever.
    #[test]
    fn a_page_must_go_on_where_the_last_one_ended() {
        for (names, after, expected) in [
            (&["mayfly_b", "mayfly_c"][..], None, true),
            (&["mayfly_b", "mayfly_c"], Some("mayfly_a"), true),
            (&[], Some("mayfly_a"), true),
            (&["mayfly_b", "mayfly_c"], Some("mayfly_b"), false),
            (&["mayfly_b", "mayfly_b"], None, false),
            (&["mayfly_c", "mayfly_b"], None, false),
        ] {
            assert_eq!(is_in_order(&page(names), after), expected, "{names:?}");
        }
        let many: Vec<String> = (0..=PAGE).map(|n| format!("mayfly_{n:04}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(is_in_order(&page(&many[1..]), None));
        assert!(!is_in_order(&page(&many), None), "more than was asked for");
        let long = Ledger {
            server: "s".repeat(SERVER_MAX + 1),
            ..page(&["mayfly_b"])
        };
        assert!(!is_in_order(&long, None), "each page would be remembered");
    }
}
