//! A panic is a mistake in this program. It ends one piece of work, and no other work in progress.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// Pause before a loop that has panicked is started again.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Runs work to its end. `None`: it has panicked. `what` names it in the log. Rust's hook writes the panic's message
/// to standard error.
pub async fn caught<F: Future>(what: &str, work: F) -> Option<F::Output> {
    let done = AssertUnwindSafe(work).catch_unwind().await;
    if done.is_err() {
        error!(
            what,
            "a part of the work failed because of a mistake in this program; please report it"
        );
    }
    done.ok()
}

/// Runs a loop until it ends. A loop that panics is started again 1 s later, until `stop`.
pub async fn restarted<F: Future<Output = ()>>(
    what: &str,
    stop: CancellationToken,
    begin: impl Fn() -> F,
) {
    while caught(what, begin()).await.is_none() {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(AGAIN_AFTER) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn a_panic_ends_one_piece_of_work() {
        assert_eq!(caught("x", async { 1 }).await, Some(1));
        let none: Option<()> = caught("x", async { panic!("on purpose") }).await;
        assert_eq!(none, None);
    }

    #[tokio::test]
    async fn a_loop_begins_again_after_a_panic() {
        let begun = AtomicU32::new(0);
        let stop = CancellationToken::new();
        restarted("x", stop, async || {
            assert!(begun.fetch_add(1, Ordering::Relaxed) > 1, "on purpose");
        })
        .await;
        assert_eq!(begun.load(Ordering::Relaxed), 3);
    }
}
