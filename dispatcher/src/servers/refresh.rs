//! Keeps grant roles up to date: while accounts of a dynamic secret live, an engine looks regularly for new tables,
//! and grants on them. A read and a renewal do the same for their secret.
//!
//! One dispatcher sends the requests, and one engine takes each of them. So a grant set is checked once in a period,
//! for any number of engines. A check that takes long is repeated less often: checks take at most a twentieth of the
//! time.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use mayfly_protocol::names::SecretPath;
use mayfly_protocol::task::Refresh;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::app::App;
use crate::engines::call;
use crate::error::{ApiError, Code};
use crate::store::StoreError;

/// Maximum time for an engine's answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The pause after a check is at least this multiple of its duration.
const SHARE: u32 = 20;
/// Maximum number of concurrent checks.
const AT_ONCE: usize = 4;

/// Requests regularly that engines check the grant roles of all secrets with live accounts, until `stop`.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut rest = HashMap::new();
    loop {
        // The period is random, so that dispatchers do not work in step with each other or with jobs that start at a
        // full minute.
        let period = app
            .limits
            .refresh_every
            .mul_f64(0.8 + 0.4 * rand::random::<f64>());
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(period) => {}
        }
        if !app.leads.load(Ordering::Relaxed) {
            continue;
        }
        if let Err(error) = round(&app, &mut rest).await {
            warn!(%error, "grant roles were not refreshed: the store is unreachable");
        }
    }
}

/// Has each grant set checked once. `rest` has the time before which a secret is not checked again.
async fn round(app: &App, rest: &mut HashMap<SecretPath, Instant>) -> Result<(), StoreError> {
    rest.retain(|_, until| *until > Instant::now());
    let mut paths = app.store.paths_with_accounts().await?;
    paths.retain(|path| !rest.contains_key(path));
    let done = std::sync::Mutex::new(HashSet::new());
    let looked: Vec<_> = futures_util::stream::iter(paths)
        .map(|path| {
            let done = &done;
            async move {
                let begun = Instant::now();
                if let Err(error) = look(app, &path, done).await {
                    let (code, reason) = (error.code.as_str(), &error.message);
                    match error.code {
                        // Reads of the secret report these errors.
                        Code::NoEngine | Code::NotFound => {
                            debug!(%path, code, reason, "a grant role was not refreshed");
                        }
                        _ => info!(%path, code, reason, "a grant role was not refreshed"),
                    }
                }
                (path, begun.elapsed())
            }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    for (path, took) in looked {
        if let Some(until) = Instant::now().checked_add(took * SHARE) {
            rest.insert(path, until);
        }
    }
    Ok(())
}

/// Has the grant role of one secret checked, unless another secret of this round has the same role.
async fn look(
    app: &App,
    path: &SecretPath,
    done: &std::sync::Mutex<HashSet<(String, String)>>,
) -> Result<(), ApiError> {
    let reading = app.store.read_secret(path.clone()).await?;
    let Some(base) = reading.base else {
        return Ok(());
    };
    if base.pool.distrusted.is_some() {
        return Ok(());
    }
    let of = reading.record.dynamic()?.grants_at(&base.target.database);
    let mut texts: Vec<String> = of.grants.iter().map(ToString::to_string).collect();
    texts.sort();
    texts.dedup();
    texts.push(of.database.clone());
    let set = (base.base.id.clone(), texts.join("\n"));
    let is_new = done
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .insert(set);
    if !is_new {
        return Ok(());
    }
    let refresh = Refresh {
        installation: app.identity.installation,
        target: base.target,
        of,
    };
    call::call(app, &base.pool, &refresh, "", PATIENCE)
        .await
        .map(drop)
}
