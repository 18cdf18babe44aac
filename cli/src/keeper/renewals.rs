//! Renews a lease when half of its life has passed. Near the lease's maximum a renewal extends it up to the maximum.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::lease::{Lease, date};
use crate::client::Api;
use crate::failure::Failure;
use crate::route::Route;
use crate::ui;

/// Maximum time until a failed renewal is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// Maximum time of a renewal's call. So no renewal requests the last part of a lease's maximum.
const CALL_MARGIN: Duration = Duration::from_secs(2);

impl Lease {
    /// Renews the lease when half of its life has passed, and near its maximum up to the maximum. Returns when it
    /// cannot be renewed any more, or after [`Lease::stop_renewing`].
    pub(crate) async fn keep(&self, api: &Api) {
        if self.life == 0 || self.is_left_alone.get().is_some() {
            return;
        }
        tokio::select! {
            () = self.left_alone.notified() => {}
            () = self.renew_on(api) => {}
        }
    }

    async fn renew_on(&self, api: &Api) {
        let mut wait = match self.is_shared {
            // Other users of a shared lease may have renewed it.
            true => Duration::ZERO,
            false => Duration::from_secs(self.life) / 2,
        };
        let mut is_last = false;
        loop {
            sleep(wait).await;
            let Some(increment) = self.increment(is_last) else {
                return self.is_final();
            };
            match self.renew(api, increment).await {
                Ok(()) if is_last => return self.is_final(),
                Ok(()) => wait = Duration::from_secs(increment) / 2,
                Err(Failure::Refused(refusal)) if refusal.status == 400 && !is_last => {
                    is_last = true;
                    wait = Duration::ZERO;
                    if let Ok(most) = self.learn_maximum(api).await {
                        ui::note(&format!(
                            "the lease reaches its maximum at {most:.0} and cannot be renewed beyond it"
                        ));
                    }
                }
                Err(Failure::Refused(refusal)) if refusal.status < 500 => {
                    ui::warning(&format!(
                        "lease {} is not renewed: {}",
                        self.id, refusal.message
                    ));
                    let _ = self.is_lost.set(());
                    return self.is_final();
                }
                // Half of the lease's life is left, so the next try comes in time.
                Err(_) => {
                    wait = AGAIN
                        .min(Duration::from_secs(self.life) / 20)
                        .max(Duration::from_secs(1));
                }
            }
        }
    }

    /// Seconds by which to renew. `None`: the maximum does not allow a later end. The last renewal requests all that
    /// the maximum allows.
    fn increment(&self, is_last: bool) -> Option<u64> {
        let allowed = self.most.get().map(|most| {
            let left = most.saturating_duration_since(Instant::now());
            left.saturating_sub(CALL_MARGIN).as_secs()
        });
        match (allowed, is_last) {
            (Some(left), true) => (left > 0).then_some(left.min(self.life)),
            (None, true) => None,
            // This renewal is not the last one, so by this estimate the maximum allows a whole life. The dispatcher
            // knows the exact maximum.
            (_, false) => Some(self.life),
        }
    }

    /// Records that the end will not move any more.
    fn is_final(&self) {
        let _ = self.most.set(self.end());
        self.end.send_modify(|_| {});
    }

    pub(crate) async fn renew(&self, api: &Api, increment: u64) -> Result<(), Failure> {
        let route = Route::item("leases", &self.id)?.then("/renew");
        let sent = Instant::now();
        let lease = api
            .post(&route, Some(&json!({ "increment": increment })))
            .await?;
        let end = sent + Duration::from_secs(increment);
        self.end.send_if_modified(|known| {
            let is_later = end > *known;
            *known = end.max(*known);
            is_later
        });
        self.note_maximum(&lease);
        Ok(())
    }

    /// Asks the dispatcher for the lease's maximum.
    pub(super) async fn learn_maximum(&self, api: &Api) -> Result<Timestamp, Failure> {
        let lease = api.get(&Route::item("leases", &self.id)?).await?;
        self.note_maximum(&lease);
        date(&lease, "maxExpiration")
            .ok_or_else(|| Failure::Local("the lease has no maxExpiration".to_owned()))
    }

    /// Records the maximum of a lease, from the dispatcher's answer. The difference between the two timestamps of the
    /// answer is added to the known end.
    fn note_maximum(&self, lease: &Value) {
        if let (Some(end), Some(most)) = (date(lease, "expiration"), date(lease, "maxExpiration")) {
            let further = u64::try_from(most.duration_since(end).as_secs()).unwrap_or(0);
            if self
                .most
                .set(self.end() + Duration::from_secs(further))
                .is_ok()
            {
                self.end.send_modify(|_| {});
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::lease::FAR;
    use super::*;
    use crate::session::{Session, Token};
    use crate::tls::Tls;
    use tokio::time::timeout;

    fn lease(ttl: u64) -> Lease {
        let answer = json!({"data": {"leaseId": "l1", "ttl": ttl}, "attributes": {}});
        Lease::of("db:app", answer, None, Instant::now()).unwrap()
    }

    fn shown(end: &str, most: &str) -> Value {
        json!({"expiration": end, "maxExpiration": most})
    }

    #[tokio::test]
    async fn a_third_of_the_maximum_is_left_for_the_next_one() {
        let lease = lease(60);
        let begun = lease.begun;
        assert_eq!(lease.end(), begun + Duration::from_secs(60));
        // The maximum is not known yet: a third of the life.
        assert_eq!(lease.replace_at(), begun + Duration::from_secs(40));
        lease.note_maximum(&shown("2026-01-01T00:01:00Z", "2026-01-01T00:03:00Z"));
        assert_eq!(lease.replace_at(), begun + Duration::from_secs(40));
        // After renewals only the maximum counts.
        lease.end.send_replace(begun + Duration::from_secs(180));
        assert_eq!(lease.replace_at(), begun + Duration::from_secs(120));
    }

    #[tokio::test]
    async fn a_lease_that_cannot_be_renewed_is_replaced_in_time() {
        let lease = lease(30);
        lease.is_final();
        assert_eq!(lease.replace_at(), lease.begun + Duration::from_secs(20));
        assert_eq!(lease.increment(false), Some(30));
        lease.is_lost.set(()).unwrap();
        assert!(lease.replace_at() <= Instant::now());
    }

    #[tokio::test]
    async fn a_huge_life_is_no_overflow() {
        let lease = lease(u64::MAX);
        assert_eq!(lease.end(), lease.begun + FAR);
        assert!(lease.replace_at() < lease.end());
        assert_eq!(lease.increment(false), Some(FAR.as_secs()));
    }

    #[tokio::test]
    async fn the_last_renewal_asks_for_what_is_allowed() {
        let lease = lease(60);
        assert_eq!(lease.increment(true), None);
        lease.note_maximum(&shown("2026-01-01T00:01:00Z", "2026-01-01T00:01:00Z"));
        let increment = lease.increment(true).unwrap();
        assert!((56..=58).contains(&increment), "{increment}");
    }

    #[tokio::test]
    async fn a_lease_that_is_left_alone_is_not_renewed() {
        let lease = lease(3600);
        let session = Session {
            address: "http://127.0.0.1:1".to_owned(),
            token: Token::read("t").unwrap(),
            tls: Tls::default(),
        };
        let api = Api::new(&session).unwrap();
        lease.stop_renewing();
        // Without `stop_renewing` the renewals would wait for half an hour.
        timeout(Duration::from_secs(20), lease.keep(&api))
            .await
            .unwrap();
    }
}
