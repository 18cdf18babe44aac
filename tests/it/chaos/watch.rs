//! The promises, checked from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use mayfly_tests::postgres::Look;
use mayfly_tests::seconds;
use mayfly_tests::system::open_leases;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::tally::{Life, Wrong};
use super::world::{Held, World};

/// The roles and sessions that were seen until now.
#[derive(Default)]
struct Known {
    /// Roles that were handed out.
    handed_out: BTreeSet<String>,
    /// Other roles, and when each was first seen.
    strangers: BTreeMap<String, Timestamp>,
    /// Sessions of a role that is no more.
    roleless: BTreeMap<i32, Timestamp>,
}

impl World {
    /// A login to a held account must work until its end, and not after it.
    pub(super) async fn log_in(&self, role: &str) {
        let held = self.held.lock().unwrap().get(role).cloned();
        if let Some(held) = held {
            self.try_login(role, held).await;
        }
    }

    async fn try_login(&self, role: &str, held: Held) {
        let asked = Timestamp::now();
        let login = tokio::time::timeout(seconds(5), held.credential.login()).await;
        let Ok(login) = login else { return };
        // The account is read again: meanwhile it may have been renewed, or its end requested.
        let held = self.held.lock().unwrap().get(role).cloned().unwrap_or(held);
        let words = format!(
            "{role}, lease {}, ends {}, asked at {asked}",
            held.credential.lease, held.end
        );
        let mut tally = self.tally.lock().unwrap();
        tally.logins += 1;
        let is_over = !held.unsure && asked > held.end + tally.late;
        match login {
            // A password is refused after its end, also during a fault.
            Ok(_) if is_over => tally.wrong(Wrong::LateLogin, words),
            Ok(_) => {}
            Err(error) => {
                let refused = error.code().is_some_and(|code| {
                    code.code().starts_with("28") || code.code().starts_with("3D")
                });
                let margin = Duration::from_millis(300);
                let is_early = Timestamp::now() + margin < held.end;
                if refused && is_over {
                    tally.logins_refused += 1;
                } else if refused && is_early && !held.revoked.load(Ordering::Relaxed) {
                    tally.wrong(Wrong::EarlyDeath, format!("{words}, refused: {error:?}"));
                }
            }
        }
    }

    /// Logs in to accounts at random, and to ended ones, until the run is over.
    pub(super) async fn check_logins(&self, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        while !self.calm.load(Ordering::Relaxed) {
            let roles: Vec<String> = self.held.lock().unwrap().keys().cloned().collect();
            if let Some(role) = roles.choose(&mut random) {
                self.log_in(role).await;
            }
            let late = self.tally.lock().unwrap().late;
            let gone = self
                .gone
                .lock()
                .unwrap()
                .pop_if(|held| Timestamp::now() > held.end + late);
            if let Some(held) = gone {
                self.try_login(&held.credential.username.clone(), held)
                    .await;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Looks at the database's roles and sessions repeatedly: what is past its end must go.
    pub(super) async fn check_ends(&self) {
        let mut watch = self.site.server.watch(&self.prefix());
        let mut known = Known::default();
        let mut seen = Timestamp::now();
        loop {
            tokio::time::sleep(Duration::from_millis(150)).await;
            let asked = Timestamp::now();
            let Some(look) = watch.look().await else {
                continue;
            };
            self.check_roles(&look, seen, asked);
            seen = asked;
            self.check_sessions(&look, asked, &mut known);
            self.count_strangers(&look, asked, &mut known).await;
        }
    }

    /// The result of a look that began at `asked`, after an earlier look that had `seen` the database.
    fn check_roles(&self, look: &Look, seen: Timestamp, asked: Timestamp) {
        let mut held = self.held.lock().unwrap();
        let mut tally = self.tally.lock().unwrap();
        held.retain(|role, one| {
            let lease = &one.credential.lease;
            let is_revoked = one.revoked.load(Ordering::Relaxed);
            if let Some(until) = look.roles.get(role) {
                // A renewal without an answer may have been done or not. The API answers in whole seconds; the
                // database keeps microseconds.
                if one.unsure || *until < one.end + SignedDuration::from_secs(1) {
                    one.end = one.end.max(*until);
                }
                if !tally.is_too_late(one.life(), asked) {
                    return true;
                }
                let excuse = tally.excuse(one.life(), asked);
                let words = format!(
                    "{role}, lease {lease}, ended {}, there at {asked}, {excuse:.1?} excused",
                    one.end
                );
                tally.wrong(Wrong::LateRole, words);
                return false;
            }
            if one.since > asked {
                // The account was handed out during the query.
                return true;
            }
            if !is_revoked {
                if asked < one.end - SignedDuration::from_secs(1) {
                    let words = format!("{role}, lease {lease}, ends {}, gone at {asked}", one.end);
                    tally.wrong(Wrong::EarlyDeath, words);
                } else if !one.unsure {
                    tally.ended(|tally| &mut tally.roles, one.life(), seen, asked);
                }
                self.gone.lock().unwrap().push(one.clone());
            }
            false
        });
    }

    fn check_sessions(&self, look: &Look, asked: Timestamp, known: &mut Known) {
        let held = self.held.lock().unwrap();
        let mut tally = self.tally.lock().unwrap();
        known
            .roleless
            .retain(|pid, _| look.sessions.get(pid).is_some_and(Option::is_none));
        for (pid, role) in &look.sessions {
            let life = match role {
                Some(role) => match held.get(role) {
                    Some(held) if !held.unsure => held.life(),
                    _ => continue,
                },
                None => {
                    let seen = *known.roleless.entry(*pid).or_insert(asked);
                    Life {
                        since: seen,
                        end: seen,
                    }
                }
            };
            if tally.is_too_late(life, asked) {
                let end = life.end;
                let words = format!("a session of {role:?} is there at {asked}, {end} was its end");
                tally.wrong(Wrong::LateSession, words);
            }
        }
    }

    /// Counts accounts that were handed to nobody and appeared after their revocation had found none.
    async fn count_strangers(&self, look: &Look, asked: Timestamp, known: &mut Known) {
        known
            .handed_out
            .extend(self.held.lock().unwrap().keys().cloned());
        for role in look.roles.keys() {
            if !known.handed_out.contains(role) {
                known.strangers.entry(role.clone()).or_insert(asked);
            }
        }
        known
            .strangers
            .retain(|role, _| !known.handed_out.contains(role));
        // By now nobody is still getting the credential.
        let old = asked - seconds(15);
        let role = known.strangers.iter().find(|(_, seen)| **seen < old);
        let Some((role, seen)) = role.map(|(role, seen)| (role.clone(), *seen)) else {
            return;
        };
        let path = format!("/v1/leases?role={role}");
        let asking = self.get(&path);
        let Ok(Some((200, found))) = tokio::time::timeout(seconds(1), asking).await else {
            return;
        };
        known.strangers.remove(&role);
        // No account is asked about twice.
        known.handed_out.insert(role);
        let gone = found["leases"][0]["revokedAt"].as_str();
        if gone.is_some_and(|gone| gone.parse::<Timestamp>().unwrap() < seen) {
            self.tally.lock().unwrap().made_late += 1;
        }
    }

    /// Nothing is left: no role, no session, no lease that is not settled, no message.
    pub(super) async fn nothing_is_left(&self, within: Duration) -> Duration {
        let begun = Instant::now();
        let mut watch = self.site.server.watch(&self.prefix());
        let mut left = String::new();
        while begun.elapsed() < within {
            tokio::time::sleep(seconds(1)).await;
            let look = watch.look().await;
            let mut open: u64 = 0;
            match self.get("/v1/status").await {
                Some((200, status)) => open += open_leases(&status),
                // An unknown number does not count as 0.
                _ => open += 1,
            }
            let rabbit = self.rabbit.handle();
            let counting = move || rabbit.messages("mayfly.v1.");
            let messages = tokio::task::spawn_blocking(counting).await.unwrap();
            let is_empty = look
                .as_ref()
                .is_some_and(|look| look.roles.is_empty() && look.sessions.is_empty());
            if is_empty && open == 0 && messages == 0 {
                return begun.elapsed();
            }
            let roles = look.map(|look| (look.roles, look.sessions));
            left = format!("roles {roles:?}, leases not settled {open}, messages {messages}");
        }
        let rabbit = self.rabbit.handle();
        let listing = move || rabbit.not_empty("mayfly.v1.");
        let queues = tokio::task::spawn_blocking(listing).await.unwrap();
        let words = format!("after {within:?}: {left} in {queues:?}");
        self.tally.lock().unwrap().wrong(Wrong::Left, words);
        begun.elapsed()
    }

    /// Every lease that was handed out is known, and known to have ended.
    pub(super) async fn all_are_accounted_for(&self) {
        let mut ended = BTreeSet::new();
        let mut cursor = String::new();
        loop {
            let path = format!("/v1/leases?state=revoked&limit=500&cursor={cursor}");
            let page = self.apis[0].ok(&path).await;
            for lease in page["leases"].as_array().unwrap() {
                ended.insert(lease["id"].as_str().unwrap().to_owned());
            }
            cursor = page["cursor"].as_str().unwrap().to_owned();
            if cursor.is_empty() {
                break;
            }
        }
        let mut tally = self.tally.lock().unwrap();
        let lost: Vec<_> = tally
            .issued
            .iter()
            .filter(|id| !ended.contains(*id))
            .cloned()
            .collect();
        if !lost.is_empty() {
            tally.wrong(Wrong::Left, format!("leases unaccounted for: {lost:?}"));
        }
    }
}
