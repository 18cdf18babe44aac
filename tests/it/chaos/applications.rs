//! What applications do meanwhile.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_tests::postgres::Credential;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use super::world::{Held, World};

impl World {
    /// What an application does, again and again, until `until`.
    pub(super) async fn apply(&self, until: Instant, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        while Instant::now() < until {
            let ttl = random.random_range(2..=20);
            let path = format!("/v1/secrets/{}?ttl={ttl}", self.path);
            if random.random_bool(0.05) {
                let patience = Duration::from_millis(random.random_range(5..200));
                let _ = tokio::time::timeout(patience, self.get(&path)).await;
                self.tally.lock().unwrap().abandoned += 1;
                continue;
            }
            match self.get(&path).await {
                Some((200, answer)) => {
                    let credential = Credential::from_answer(&answer);
                    self.tally.lock().unwrap().issued += 1;
                    let held = Held {
                        end: credential.expiration,
                        since: Timestamp::now(),
                        credential: Credential {
                            port: self.site.server.port(),
                            ..credential
                        },
                        revoked: false,
                        unsure: false,
                    };
                    let role = held.credential.username.clone();
                    self.held.lock().unwrap().insert(role.clone(), held);
                    self.log_in(&role).await;
                    self.live(&role, &mut random).await;
                }
                Some((_, answer)) => {
                    self.refused(answer["error"].as_str().unwrap_or("?"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                None => {
                    self.refused("no answer");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    pub(super) fn refused(&self, code: &str) {
        let mut tally = self.tally.lock().unwrap();
        *tally.refused.entry(code.to_owned()).or_default() += 1;
    }

    /// What becomes of an account some time after it was made, while others are made.
    pub(super) async fn live(&self, role: &str, random: &mut StdRng) {
        let Some(held) = self.held.lock().unwrap().get(role).cloned() else {
            // It ended meanwhile.
            return;
        };
        let lease = format!("/v1/leases/{}", held.credential.lease);
        if random.random_bool(0.2) {
            let increment = random.random_range(2..20);
            // Until it is answered it may be done or not.
            self.change(role, |held| held.unsure = true);
            let asked = self
                .post(&format!("{lease}/renew"), json!({"increment": increment}))
                .await;
            match asked {
                Some((200, answer)) => {
                    let end: Timestamp = answer["expiration"].as_str().unwrap().parse().unwrap();
                    self.change(role, |held| {
                        held.end = end.max(held.end);
                        held.unsure = false;
                    });
                    self.tally.lock().unwrap().renewed += 1;
                    self.log_in(role).await;
                }
                Some((400 | 404 | 409 | 429, _)) => self.change(role, |held| held.unsure = false),
                _ => {}
            }
        }
        if random.random_bool(0.15) {
            self.change(role, |held| held.revoked = true);
            if let Some((200, _)) = self.delete(&lease).await {
                self.tally.lock().unwrap().revoked += 1;
            }
        }
    }
}
