//! What must hold, seen from outside.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_tests::seconds;
use mayfly_tests::system::prefix;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::tally::LATE;
use super::world::World;

impl World {
    /// A held account must let its holder in, until its end.
    pub(super) async fn log_in(&self, role: &str) {
        let Some(held) = self.held.lock().unwrap().get(role).cloned() else {
            return;
        };
        let asked = Timestamp::now();
        let login = tokio::time::timeout(seconds(5), held.credential.login()).await;
        let Ok(login) = login else { return };
        self.tally.lock().unwrap().logins += 1;
        let Err(error) = login else { return };
        let refused = error
            .code()
            .is_some_and(|code| code.code().starts_with("28") || code.code().starts_with("3D"));
        // Looked up again: its end may have been asked for meanwhile.
        let now_revoked = self
            .held
            .lock()
            .unwrap()
            .get(role)
            .is_none_or(|held| held.revoked);
        let margin = Duration::from_millis(300);
        if refused && !now_revoked && Timestamp::now() + margin < held.end {
            self.tally.lock().unwrap().violations.push(format!(
                "early death: {role}, lease {}, ends {}, refused at {asked}: {error:?}",
                held.credential.lease, held.end
            ));
        }
    }

    /// Logs in to accounts at random, until there is calm.
    pub(super) async fn check_logins(&self, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        while !self.calm.load(Ordering::Relaxed) {
            let roles: Vec<String> = self.held.lock().unwrap().keys().cloned().collect();
            if let Some(role) = roles.choose(&mut random) {
                self.log_in(role).await;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Looks at the database's roles and sessions, again and again: what is past its end must go.
    pub(super) async fn check_ends(&self) {
        loop {
            tokio::time::sleep(Duration::from_millis(150)).await;
            let asked = Timestamp::now();
            let Some(present) = self.present().await else {
                continue;
            };
            let now = Timestamp::now();
            let mut held = self.held.lock().unwrap();
            let mut tally = self.tally.lock().unwrap();
            held.retain(|role, one| {
                if present.iter().any(|name| name == role) {
                    let late = now.duration_since(one.end);
                    let trouble = tally.trouble_in(one.end, now);
                    let allowed = LATE + trouble;
                    if one.unsure || late.is_negative() || late.unsigned_abs() <= allowed {
                        return true;
                    }
                    tally.violations.push(format!(
                        "too late: {role}, lease {}, ended {}, {late:.1} ago, trouble {trouble:?}",
                        one.credential.lease, one.end
                    ));
                    return false;
                }
                if one.since > asked {
                    // Handed out while the database was asked.
                    return true;
                }
                if now < one.end - seconds(1) && !one.revoked {
                    tally.violations.push(format!(
                        "early death: {role}, lease {}, ends {}, absent at {now}",
                        one.credential.lease, one.end
                    ));
                } else if !one.revoked {
                    let late = now.duration_since(one.end);
                    tally.late.push(late.unsigned_abs());
                }
                false
            });
        }
    }

    /// Roles of leases in the database; none while it cannot be asked.
    pub(super) async fn present(&self) -> Option<Vec<String>> {
        let prefix = prefix(&self.site);
        let looking = self.site.server.try_roles(&prefix);
        tokio::time::timeout(seconds(5), looking).await.ok()?
    }

    /// Nothing is left: no role, no lease that is not settled, no message.
    pub(super) async fn nothing_is_left(&self, within: Duration) -> Duration {
        let begun = Instant::now();
        let mut left = String::new();
        while begun.elapsed() < within {
            tokio::time::sleep(seconds(1)).await;
            let roles = self.present().await;
            let mut open = 0;
            for state in ["pending", "active", "revoking"] {
                let path = format!("/v1/leases?state={state}&limit=500");
                match self.get(&path).await {
                    Some((200, list)) => open += list["length"].as_u64().unwrap(),
                    // Unknown is not none.
                    _ => open += 1,
                }
            }
            let rabbit = self.system.lock().await.rabbit.handle();
            let messages = tokio::task::spawn_blocking(move || {
                rabbit.messages("mayfly.v1.delay") + rabbit.messages("mayfly.v1.pool")
            })
            .await
            .unwrap();
            if roles.as_ref().is_some_and(Vec::is_empty) && open == 0 && messages == 0 {
                return begun.elapsed();
            }
            left = format!("roles {roles:?}, leases not settled {open}, messages {messages}");
        }
        let mut tally = self.tally.lock().unwrap();
        tally
            .violations
            .push(format!("left after {within:?}: {left}"));
        begun.elapsed()
    }
}
