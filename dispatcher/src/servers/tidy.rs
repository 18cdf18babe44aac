//! Removes grant and quarantine roles that nothing needs: on request, or after a secret was deleted and its last
//! accounts are gone. Tidying after a deletion is tried a few times, and a restart forgets it. A requested tidying
//! removes what remains.

use std::sync::Arc;
use std::time::Duration;

use mayfly_protocol::names::SecretPath;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Tidied, Tidy};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::app::App;
use crate::engines::call;
use crate::error::ApiError;
use crate::servers::pool::pool_of;
use crate::store::Pool;

/// Maximum time for an engine's answer.
const PATIENCE: Duration = Duration::from_secs(40);
/// Maximum time for which the deletion of a base secret waits for tidying.
const LAST_PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two looks at the queue.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Tidies a server through an engine of this pool.
///
/// # Errors
/// As [`call::call`].
pub(crate) async fn tidy(app: &App, pool: &Pool, target: &Target) -> Result<Tidied, ApiError> {
    let tidy = Tidy {
        installation: app.identity.installation,
        target: target.clone(),
    };
    let tidied = call::call(app, pool, &tidy, "", PATIENCE).await?;
    info!(server = target.host, port = target.port, removed = ?tidied.removed,
        kept = tidied.kept.len(), "tidied a server");
    Ok(tidied)
}

/// Tidies before a base secret is deleted, if there is an engine. Later Mayfly does not know the server.
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
        Ok(Err(error)) => {
            debug!(%path, reason = error.message, "the server was not tidied before the delete")
        }
        Err(_) => {
            debug!(%path, "the server was not tidied before the delete: it took more than 20 s")
        }
    }
}

/// Tidies the servers in the queue, until `stop`.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        while let Some(due) = app.tidying.take_due() {
            let tidying = async {
                // The pool's key may have been rotated since, or the pool may be distrusted.
                let pool = app.store.pool(due.pool.clone()).await?;
                tidy(&app, &pool, &due.target).await
            };
            let tidied = tokio::select! {
                () = stop.cancelled() => return,
                tidied = tidying => tidied,
            };
            if let Err(error) = &tidied {
                debug!(reason = error.message, "not tidied");
            }
            app.tidying.again(due, is_left(tidied.as_ref().ok()));
        }
    }
}

/// Whether another try may remove more. `tidied` is the result of this try, if it has one.
fn is_left(tidied: Option<&Tidied>) -> bool {
    tidied.is_none_or(|tidied| tidied.kept.iter().any(|kept| kept.in_use))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::task::Kept;

    #[test]
    fn another_try_is_due_while_accounts_use_a_role() {
        let tidied = |in_use: &[bool]| Tidied {
            removed: vec![],
            kept: in_use
                .iter()
                .map(|in_use| Kept {
                    role: "g".to_owned(),
                    reason: "x".to_owned(),
                    in_use: *in_use,
                })
                .collect(),
        };
        for (tidied, expected) in [
            (None, true),
            (Some(tidied(&[])), false),
            // A role that is kept for good is no reason to try again.
            (Some(tidied(&[false])), false),
            (Some(tidied(&[false, true])), true),
        ] {
            assert_eq!(is_left(tidied.as_ref()), expected, "{tidied:?}");
        }
    }
}
