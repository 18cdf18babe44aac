//! The state that the agent's listener shows, and its `POST /quit`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::failure::Failure;
use crate::keeper::Lease;
use crate::listener::{Reply, Request};
use crate::ui;

/// The state of the files, shared with the listener.
#[derive(Default)]
pub(super) struct Shown {
    state: Mutex<State>,
    quit: Notify,
}

#[derive(Default)]
struct State {
    written: Option<Arc<Lease>>,
    trouble: Option<String>,
    has_warned: bool,
}

impl Shown {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the files have the credential of this lease.
    pub(super) fn is_written(&self, lease: &Arc<Lease>) {
        let mut state = self.state();
        state.written = Some(lease.clone());
        state.trouble = None;
    }

    /// Reports why the files cannot be written. A failure that continues is reported once.
    pub(super) fn is_not_written(&self, failure: &Failure) {
        let text = failure.to_string();
        let mut state = self.state();
        if state.trouble.as_ref() != Some(&text) {
            ui::warning(&text);
            state.trouble = Some(text);
        }
    }

    /// Whether this is the first call: the warning is given once.
    pub(super) fn warns_first(&self) -> bool {
        !std::mem::replace(&mut self.state().has_warned, true)
    }

    /// Waits for `POST /quit`.
    pub(super) async fn quit(&self) {
        self.quit.notified().await;
    }

    /// Why programs cannot use the files.
    fn readiness(&self) -> Result<(), &'static str> {
        match &self.state().written {
            None => Err("no credential is written yet"),
            Some(lease) if lease.end() <= Instant::now() => Err("the credential has ended"),
            Some(_) => Ok(()),
        }
    }

    /// The answer to a request of the listener.
    pub(super) fn answer(&self, request: &Request) -> Reply {
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/healthz") => Reply::new(200, "ok\n"),
            ("GET", "/readyz") => match self.readiness() {
                Ok(()) => Reply::new(200, "ok\n"),
                Err(reason) => Reply::new(503, format!("{reason}\n")),
            },
            ("POST", "/quit") if request.is_local => {
                self.quit.notify_one();
                Reply::new(200, "ok\n")
            }
            ("POST", "/quit") => Reply::new(403, "only a program of this machine may do this\n"),
            (_, "/healthz" | "/readyz" | "/quit") => Reply::new(405, "method not allowed\n"),
            _ => Reply::new(404, "not found\n"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;
    use tokio::time::timeout;

    fn asked(shown: &Shown, method: &str, path: &str, is_local: bool) -> u16 {
        let request = Request {
            method: method.into(),
            path: path.into(),
            is_local,
        };
        shown.answer(&request).status
    }

    #[tokio::test]
    async fn it_is_ready_while_the_credential_is_valid() {
        let shown = Shown::default();
        assert_eq!(asked(&shown, "GET", "/readyz", true), 503);
        assert_eq!(asked(&shown, "GET", "/healthz", true), 200);
        for (ttl, status) in [(60, 200), (0, 503)] {
            let answer = json!({"data": {"leaseId": "l", "ttl": ttl}});
            let lease = Lease::of("db:a", answer, None, Instant::now()).unwrap();
            shown.is_written(&Arc::new(lease));
            assert_eq!(asked(&shown, "GET", "/readyz", false), status, "{ttl}");
        }
    }

    #[tokio::test]
    async fn only_this_machine_may_end_it() {
        let shown = Shown::default();
        assert_eq!(asked(&shown, "POST", "/quit", false), 403);
        assert_eq!(asked(&shown, "GET", "/quit", true), 405);
        let quit = timeout(Duration::from_millis(50), shown.quit());
        assert!(quit.await.is_err());
        assert_eq!(asked(&shown, "POST", "/quit", true), 200);
        timeout(Duration::from_secs(20), shown.quit())
            .await
            .unwrap();
        assert_eq!(asked(&shown, "GET", "/", true), 404);
    }
}
