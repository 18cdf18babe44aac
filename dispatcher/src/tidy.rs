//! Removing grant and quarantine roles nothing needs: asked for, or after a secret was deleted,
//! when the last of its accounts are gone. The latter is done as well as can be, a few times, and
//! forgotten at a restart: a tidying asked for finds what it left.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mayfly_common::names::{PoolName, SecretPath};
use mayfly_common::target::Target;
use mayfly_common::task::{Tidied, Tidy};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::app::App;
use crate::error::ApiError;
use crate::requests;
use crate::rotation::pool_of;
use crate::store::{BaseFacts, Pool};

/// How long an engine may take.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long a base secret's own delete waits for it.
const LAST_PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at what waits.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// When it is tried, counted from the time before, while accounts still use the roles.
const TRIES_AFTER: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(15),
    Duration::from_secs(45),
    Duration::from_secs(120),
    Duration::from_secs(300),
];
/// Servers that may wait.
const WAITING: usize = 1000;

/// Tidies a server through an engine of this pool.
///
/// # Errors
/// Nobody could do it.
pub(crate) async fn tidy(app: &App, pool: &Pool, target: &Target) -> Result<Tidied, ApiError> {
    let tidy = Tidy {
        installation: app.identity.installation,
        target: target.clone(),
    };
    let tidied = requests::call(app, pool, &tidy, "", PATIENCE).await?;
    info!(server = target.host, port = target.port, removed = ?tidied.removed,
        kept = tidied.kept.len(), "tidied a server");
    Ok(tidied)
}

/// Before a base secret is deleted: the last chance, taken where an engine is there.
pub(crate) async fn before_delete(app: &App, path: SecretPath) {
    let Ok(base) = app.store.base(path.clone()).await else {
        return;
    };
    if !base.linked.is_empty() {
        return;
    }
    let tidying = async {
        let pool = pool_of(app, &base).await?;
        tidy(app, pool, &base.target).await
    };
    match tokio::time::timeout(LAST_PATIENCE, tidying).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => debug!(%path, reason = error.message, "not tidied before the delete"),
        Err(_) => debug!(%path, "not tidied before the delete, for want of time"),
    }
}

/// Servers to tidy.
#[derive(Default)]
pub(crate) struct Queue(Mutex<Vec<Waiting>>);

struct Waiting {
    base: String,
    pool: PoolName,
    target: Target,
    tries: usize,
    due: Instant,
}

impl Queue {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A dynamic secret was deleted.
    pub(crate) fn add(&self, facts: BaseFacts) {
        self.put(Waiting {
            base: facts.base.id,
            pool: facts.pool.name,
            target: facts.target,
            tries: 0,
            due: Instant::now() + TRIES_AFTER[0],
        });
    }

    fn put(&self, new: Waiting) {
        let mut waiting = self.waiting();
        waiting.retain(|old| old.base != new.base);
        if waiting.len() < WAITING {
            waiting.push(new);
        }
    }

    fn take_due(&self) -> Option<Waiting> {
        let mut waiting = self.waiting();
        let index = waiting.iter().position(|one| one.due <= Instant::now())?;
        Some(waiting.swap_remove(index))
    }

    fn has(&self, base: &str) -> bool {
        self.waiting().iter().any(|one| one.base == base)
    }
}

/// Tidies what waits, until `stop`.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        while let Some(mut due) = app.tidying.take_due() {
            let tidying = async {
                // Its key may be another by now, or nothing may be said to it.
                let pool = app.store.pool(due.pool.clone()).await?;
                tidy(&app, &pool, &due.target).await
            };
            let tidied = tokio::select! {
                () = stop.cancelled() => return,
                tidied = tidying => tidied,
            };
            let again = match &tidied {
                Ok(tidied) => tidied.kept.iter().any(|kept| kept.in_use),
                Err(error) => {
                    debug!(reason = error.message, "not tidied");
                    true
                }
            };
            due.tries += 1;
            if let Some(after) = TRIES_AFTER.get(due.tries)
                && again
                && !app.tidying.has(&due.base)
            {
                due.due = Instant::now() + *after;
                app.tidying.put(due);
            }
        }
    }
}
