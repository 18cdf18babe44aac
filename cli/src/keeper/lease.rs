//! A lease with its credential: its end, and its revocation.

use std::sync::OnceLock;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::client::Api;
use crate::failure::Failure;
use crate::route::Route;
use crate::ui;

/// Maximum time for which the revocation of a lease may delay the end of the process.
const REVOKE_SECONDS: u64 = 10;
/// A time limit that is never reached.
pub(super) const FAR: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A lease with its credential, from the dispatcher's answer.
#[derive(Debug)]
pub(crate) struct Lease {
    /// The lease's id at the dispatcher.
    pub(crate) id: String,
    /// The answer to the read. `data` has the credential.
    pub(crate) answer: Value,
    /// Whether other callers use the lease too. Then it is never revoked here.
    pub(crate) is_shared: bool,
    /// Number of seconds by which a renewal extends the lease: the requested life, or else the secret's TTL.
    pub(super) life: u64,
    /// When the request for the lease was sent.
    pub(super) begun: Instant,
    pub(super) end: watch::Sender<Instant>,
    /// The end beyond which the lease cannot be renewed, if known.
    pub(crate) most: OnceLock<Instant>,
    /// Set if the dispatcher does not renew the lease although its maximum is not reached.
    pub(super) is_lost: OnceLock<()>,
    pub(super) left_alone: Notify,
    pub(super) is_left_alone: OnceLock<()>,
}

impl Lease {
    /// The lease in an answer to a read that was sent at `begun`. `ttl` is the requested life in seconds.
    ///
    /// # Errors
    /// The secret is not a dynamic one.
    pub(crate) fn of(
        path: &str,
        answer: Value,
        life: Option<u64>,
        begun: Instant,
    ) -> Result<Self, Failure> {
        let Some(id) = answer.pointer("/data/leaseId").and_then(Value::as_str) else {
            return Err(Failure::Local(format!(
                "{path} is not a dynamic secret: it has no lease"
            )));
        };
        let id = id.to_owned();
        let is_shared = answer.pointer("/attributes/share") == Some(&Value::Bool(true));
        let whole = answer.pointer("/data/ttl").and_then(Value::as_u64);
        let life = life.or(whole).unwrap_or(0).min(FAR.as_secs());
        let mut left = whole.map_or(FAR, |whole| Duration::from_secs(whole).min(FAR));
        if is_shared && let Some(end) = date(&answer["data"], "expiration") {
            // An earlier read may have made the lease. Its first renewal, which is sent at once, replaces this
            // estimate.
            let by_clock = end.duration_since(Timestamp::now()).as_secs();
            left = left.min(Duration::from_secs(u64::try_from(by_clock).unwrap_or(0)));
        }
        Ok(Self {
            id,
            answer,
            is_shared,
            life,
            begun,
            end: watch::Sender::new(begun + left),
            most: OnceLock::new(),
            is_lost: OnceLock::new(),
            left_alone: Notify::new(),
            is_left_alone: OnceLock::new(),
        })
    }

    /// The time until which the account certainly lives, unless somebody revokes it. Renewals move it.
    pub(crate) fn end(&self) -> Instant {
        *self.end.borrow()
    }

    /// A receiver that is notified when the end moves.
    pub(crate) fn ends(&self) -> watch::Receiver<Instant> {
        self.end.subscribe()
    }

    /// When the next lease should be read. This is when a third of the maximum is left, when renewals have failed
    /// and a third of the life is left, or when the dispatcher has refused a renewal.
    pub(crate) fn replace_at(&self) -> Instant {
        if self.is_lost.get().is_some() {
            return self.begun;
        }
        let end = self.end();
        let by_life = end - (Duration::from_secs(self.life) / 3).min(end - self.begun);
        match self.most.get() {
            Some(most) => by_life.min(*most - most.duration_since(self.begun) / 3),
            None => by_life,
        }
    }

    /// Waits until [`Lease::replace_at`].
    pub(super) async fn replaceable(&self) {
        let mut ends = self.ends();
        loop {
            tokio::select! {
                () = sleep_until(self.replace_at()) => return,
                _ = ends.changed() => {}
            }
        }
    }

    /// Stops the renewals. The account lives until its end.
    pub(crate) fn stop_renewing(&self) {
        let _ = self.is_left_alone.set(());
        self.left_alone.notify_one();
    }

    /// Revokes the lease, unless others use it too. A failure is only a warning, because the lease ends by itself.
    pub(crate) async fn revoke(&self, api: &Api) {
        if self.is_shared {
            return;
        }
        let call = async {
            let route = Route::item("leases", &self.id)?;
            api.delete(&route).await
        };
        let why = match timeout(Duration::from_secs(REVOKE_SECONDS), call).await {
            Ok(Ok(_)) => return,
            Ok(Err(failure)) => failure.to_string(),
            Err(_) => format!("no answer within {REVOKE_SECONDS} s"),
        };
        let end = self
            .answer
            .pointer("/data/expiration")
            .and_then(Value::as_str)
            .unwrap_or("its expiration");
        ui::warning(&format!(
            "lease {} is not revoked: {why}; it ends by itself at {end}",
            self.id
        ));
    }
}

pub(super) fn date(of: &Value, member: &str) -> Option<Timestamp> {
    of.get(member)?.as_str()?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_dynamic_secrets_have_leases() {
        let answer = json!({"data": {"password": "p"}});
        let refused = Lease::of("db:x", answer, None, Instant::now()).unwrap_err();
        assert!(refused.to_string().contains("not a dynamic secret"));
    }
}
