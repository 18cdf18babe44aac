//! The check: an engine examines the server and its admin, and for a dynamic secret a short lease is issued and
//! revoked in the usual way. The answer has all findings.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_common::trace::Span;
use mayfly_protocol::names::{LeaseId, RoleName, SecretPath};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Accounts, Check, CheckWhat, Connections, Finding, Topic};
use serde_json::{Value, json};

use crate::app::App;
use crate::engines::call;
use crate::error::{ApiError, Code};
use crate::leases::issue;
use crate::leases::order::Order;
use crate::leases::revoke;
use crate::servers::pool::pool_of;
use crate::store::{Base, Pool};

/// Maximum time for an engine's check.
const PATIENCE: Duration = Duration::from_secs(25);
/// Life of the trial account. It ends after this time even if its revocation fails.
pub(crate) const TRIAL_TTL_SECONDS: u64 = 60;
/// Maximum time for the revocation of the trial account.
const REVOKED_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Maximum time for which an update waits for its warning.
const WARNED_WITHIN: Duration = Duration::from_secs(10);

/// Checks a base secret through an engine of this pool.
///
/// # Errors
/// No engine could do the check.
pub(crate) async fn base(
    app: &App,
    pool: &Pool,
    target: &Target,
) -> Result<Vec<Finding>, ApiError> {
    call(app, pool, target, CheckWhat::Admin { accounts: None }).await
}

/// The warning after an update of a base secret that changes its admin: the new admin may lack the
/// right to end the accounts that the earlier admin made.
pub(crate) async fn another_admin(app: &App, path: &SecretPath, before: &Base) -> Option<Value> {
    let base = app.store.base(path.clone()).await.ok()?;
    if base.target.username == before.target.username {
        return None;
    }
    let mut has_leases = false;
    for pool in base.linked.iter().chain(&base.last) {
        let open = app
            .store
            .open_of_base(base.record.id.clone(), pool.name.clone());
        has_leases |= open.await.ok()?;
    }
    if !has_leases {
        return None;
    }
    let mut looked = None;
    if let Ok(pool) = pool_of(app, &base).await {
        let target = &base.target;
        let asked = call(app, pool, target, CheckWhat::Admin { accounts: None });
        let asked = tokio::time::timeout(WARNED_WITHIN, asked).await;
        looked = asked.ok().and_then(Result::ok);
    }
    let Some(findings) = looked else {
        let words = format!(
            "live leases were made by {}; from PostgreSQL 16 on another admin may not end them. No engine could check it now: run `mayfly secret check {path}`",
            before.target.username
        );
        return Some(json!({"check": Topic::LiveAccounts, "message": words, "fix": []}));
    };
    let found = findings
        .into_iter()
        .find(|found| !found.ok && found.topic == Topic::LiveAccounts)?;
    Some(json!({"check": found.topic, "message": found.message, "fix": found.fix}))
}

/// Checks a dynamic secret, and reads it once as a trial. The trial's lease is ended even if the caller leaves.
///
/// # Errors
/// No engine could do the check.
pub(crate) async fn dynamic(
    app: &Arc<App>,
    order: Order,
    span: Span,
) -> Result<Vec<Finding>, ApiError> {
    let working = app.clone();
    let checking = app
        .issues
        .spawn(async move { run(&working, order, span).await });
    let stopping = || ApiError::new(Code::StoreUnavailable, "the dispatcher is stopping");
    checking.await.map_err(|_| stopping())?
}

async fn run(app: &Arc<App>, order: Order, span: Span) -> Result<Vec<Finding>, ApiError> {
    let (pool, target) = (order.base.pool.clone(), order.base.target.clone());
    let accounts = Accounts {
        database: order
            .dynamic
            .database
            .clone()
            .unwrap_or_else(|| target.database.clone()),
        grants: order.dynamic.grants.clone(),
        owned_objects: order.dynamic.owned_objects.clone(),
        connections: Some(Connections {
            each: order.dynamic.connection_limit,
            accounts: order.dynamic.max_leases,
        }),
        account: order.dynamic.account.clone(),
    };
    let database = accounts.database.clone();
    let what = CheckWhat::Admin {
        accounts: Some(accounts),
    };
    let mut findings = call(app, &pool, &target, what).await?;
    let hopeless = findings
        .iter()
        .any(|found| !found.ok && found.topic.is_needed_for_accounts());
    if hopeless {
        findings.push(Finding::bad(
            Topic::Issue,
            "not tried, because of the findings above",
        ));
        return Ok(findings);
    }
    let begun = Instant::now();
    let issued = match issue::issue(app, order, span).await {
        Ok(issued) => issued,
        Err(error) => {
            let words = format!("{} ({})", error.message, error.code.as_str());
            findings.push(Finding::bad(Topic::Issue, words));
            return Ok(findings);
        }
    };
    let words = format!("an account was made in {}", took(begun));
    findings.push(Finding::good(Topic::Issue, words));
    findings.push(probe_login(app, &pool, &target, issued.role, database).await);
    findings.push(revoke(app, issued.lease).await);
    Ok(findings)
}

fn took(begun: Instant) -> String {
    format!("{:.0} ms", begun.elapsed().as_secs_f64() * 1e3)
}

async fn call(
    app: &App,
    pool: &Pool,
    target: &Target,
    what: CheckWhat,
) -> Result<Vec<Finding>, ApiError> {
    let check = Check {
        installation: app.identity.installation,
        target: target.clone(),
        what,
    };
    call::call(app, pool, &check, "", PATIENCE).await
}

/// Whether the account is refused with a wrong password.
async fn probe_login(
    app: &App,
    pool: &Pool,
    target: &Target,
    role: RoleName,
    database: String,
) -> Finding {
    let what = CheckWhat::WrongPassword { role, database };
    let found = call(app, pool, target, what).await;
    let unknown = |words: String| Finding::bad(Topic::AccountPassword, words);
    match found.map(|mut findings| findings.pop()) {
        Ok(Some(found)) => found,
        Ok(None) => unknown("the engine reported no finding".to_owned()),
        Err(error) => unknown(error.message),
    }
}

/// Ends the lease, and waits until its account is gone.
async fn revoke(app: &App, lease: LeaseId) -> Finding {
    let begun = Instant::now();
    let revoked = revoke::revoke_now(app, lease).await;
    let mut last = match revoked {
        Ok(lease) => lease,
        Err(error) => return Finding::bad(Topic::Revoke, error.message),
    };
    while last.status.revoked_at.is_none() && begun.elapsed() < REVOKED_WITHIN {
        tokio::time::sleep(LOOK_EVERY).await;
        match app.store.lease(lease).await {
            Ok(lease) => last = lease,
            Err(error) => return Finding::bad(Topic::Revoke, error.to_string()),
        }
    }
    let status = last.status;
    match (status.revoked_at, status.last_error) {
        (Some(_), _) => Finding::good(
            Topic::Revoke,
            format!("the account was gone after {}", took(begun)),
        ),
        (None, Some(error)) => Finding::bad(
            Topic::Revoke,
            format!("the account still exists after {}: {error}", took(begun)),
        ),
        (None, None) => Finding::bad(
            Topic::Revoke,
            format!(
                "the account still exists after {}; its revocation is retried",
                took(begun)
            ),
        ),
    }
}
