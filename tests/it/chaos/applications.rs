//! What applications do during the faults.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_tests::postgres::Credential;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tokio::task::JoinSet;

use super::world::{Held, World};

impl World {
    /// The actions of an application, repeated until `until`; and its sessions, to their end.
    pub(super) async fn apply(self: Arc<Self>, until: Instant, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut sessions = JoinSet::new();
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
                    let role = self.hold(&answer);
                    self.log_in(&role).await;
                    if random.random_bool(0.15) {
                        sessions.spawn(self.clone().keep_session(role.clone()));
                    }
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
        sessions.join_all().await;
    }

    /// Notes that somebody holds this account from now on.
    fn hold(&self, answer: &serde_json::Value) -> String {
        let credential = Credential::from_answer(answer);
        let issued = credential.lease.clone();
        self.tally.lock().unwrap().issued.push(issued);
        let held = Held {
            end: credential.expiration,
            since: Timestamp::now(),
            // Applications go straight to the database.
            credential: Credential {
                host: "127.0.0.1".to_owned(),
                port: self.site.server.port(),
                ..credential
            },
            revoked: Arc::new(AtomicBool::new(false)),
            unsure: false,
        };
        let role = held.credential.username.clone();
        self.held.lock().unwrap().insert(role.clone(), held);
        role
    }

    fn refused(&self, code: &str) {
        let mut tally = self.tally.lock().unwrap();
        *tally.refused.entry(code.to_owned()).or_default() += 1;
    }

    /// What happens to an account some time after it was made, while others are made.
    async fn live(&self, role: &str, random: &mut StdRng) {
        let Some(held) = self.held.lock().unwrap().get(role).cloned() else {
            // The account ended meanwhile.
            return;
        };
        let lease = format!("/v1/leases/{}", held.credential.lease);
        if random.random_bool(0.2) {
            let increment = random.random_range(2..20);
            // Until there is an answer the renewal may be done or not.
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
            held.revoked.store(true, Ordering::Relaxed);
            if let Some((200, _)) = self.delete(&lease).await {
                self.tally.lock().unwrap().revoked += 1;
            }
        }
    }
}
