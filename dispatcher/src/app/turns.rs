//! Reads of dynamic secrets take turns by database server and caller. So a caller with many reads takes no more of a
//! server than another, and a slow server takes nothing from the others.
//!
//! A read keeps its place (`Place`) for a short time only: places are for reads that are worked on, not for
//! reads that wait for an unreachable server.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::settings::Shares;

/// The turns of one server: `C` is a caller, `T` a waiting read.
struct Turns<C, T> {
    running: usize,
    of_caller: HashMap<C, usize>,
    /// Callers with waiting reads, in the order of their turns.
    order: VecDeque<C>,
    waiting: HashMap<C, VecDeque<T>>,
}

impl<C, T> Default for Turns<C, T> {
    fn default() -> Self {
        Self {
            running: 0,
            of_caller: HashMap::new(),
            order: VecDeque::new(),
            waiting: HashMap::new(),
        }
    }
}

impl<C: Clone + Eq + std::hash::Hash, T> Turns<C, T> {
    fn may_begin(&self, caller: &C, shares: Shares) -> bool {
        let of_caller = self.of_caller.get(caller).copied().unwrap_or(0);
        self.running < shares.per_server && of_caller < shares.per_caller
    }

    fn begin(&mut self, caller: &C) {
        self.running += 1;
        *self.of_caller.entry(caller.clone()).or_default() += 1;
    }

    fn end(&mut self, caller: &C) {
        self.running = self.running.saturating_sub(1);
        if let Some(n) = self.of_caller.get_mut(caller) {
            *n -= 1;
            if *n == 0 {
                self.of_caller.remove(caller);
            }
        }
    }

    /// Adds a read behind the others of its caller. Returns it if too many of them wait.
    fn wait(&mut self, caller: &C, who: T, most: usize) -> Result<(), T> {
        let line = self.waiting.entry(caller.clone()).or_default();
        if line.len() >= most {
            return Err(who);
        }
        if line.is_empty() {
            self.order.push_back(caller.clone());
        }
        line.push_back(who);
        Ok(())
    }

    /// Takes the next read: one of the caller that has waited longest for a turn.
    fn next(&mut self, shares: Shares) -> Option<(C, T)> {
        let at = (0..self.order.len()).find(|at| self.may_begin(&self.order[*at], shares))?;
        let caller = self.order.remove(at)?;
        let line = self.waiting.get_mut(&caller)?;
        let who = line.pop_front()?;
        if line.is_empty() {
            self.waiting.remove(&caller);
        } else {
            self.order.push_back(caller.clone());
        }
        Some((caller, who))
    }

    /// Drops the waiting reads of a caller for which `keep` is false. A caller without waiting reads loses its place
    /// in the order.
    fn forget(&mut self, caller: &C, keep: impl Fn(&T) -> bool) {
        if let Some(line) = self.waiting.get_mut(caller) {
            line.retain(keep);
            if line.is_empty() {
                self.waiting.remove(caller);
                self.order.retain(|other| other != caller);
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.running == 0 && self.order.is_empty()
    }
}

/// A server, by its hosts and port, and a caller.
type Servers = HashMap<(String, u16), Turns<String, oneshot::Sender<Place>>>;

/// The turns of all servers.
#[derive(Clone)]
pub(crate) struct Fair {
    shares: Shares,
    servers: Arc<Mutex<Servers>>,
}

/// A turn. The next turn begins when this one is dropped.
pub(crate) struct Place {
    fair: Fair,
    server: (String, u16),
    caller: String,
    is_taken: bool,
}

/// Too many reads of this caller wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMany(pub(crate) usize);

impl Fair {
    pub(crate) fn new(shares: Shares) -> Self {
        Self {
            shares,
            servers: Arc::default(),
        }
    }

    fn servers(&self) -> MutexGuard<'_, Servers> {
        // No code panics while it holds this lock.
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, server: &(String, u16), caller: &str) -> Place {
        Place {
            fair: self.clone(),
            server: server.clone(),
            caller: caller.to_owned(),
            is_taken: true,
        }
    }

    /// Waits for the turn of a caller at a server. A caller that stops waiting loses it.
    ///
    /// # Errors
    /// Too many reads of this caller wait already.
    pub(crate) async fn turn(
        &self,
        server: (String, u16),
        caller: String,
    ) -> Result<Place, TooMany> {
        let waiting = {
            let mut servers = self.servers();
            let turns = servers.entry(server.clone()).or_default();
            if turns.may_begin(&caller, self.shares) && !turns.waiting.contains_key(&caller) {
                turns.begin(&caller);
                return Ok(self.place(&server, &caller));
            }
            let most = self.shares.waiting_per_caller;
            // Reads whose callers have left do not wait any more.
            turns.forget(&caller, |who| !who.is_closed());
            let (sender, waiting) = oneshot::channel();
            if turns.wait(&caller, sender, most).is_err() {
                return Err(TooMany(most));
            }
            waiting
        };
        // The sender is dropped only after it has sent a place, or when the process ends.
        match waiting.await {
            Ok(place) => Ok(place),
            Err(_) => Err(TooMany(0)),
        }
    }

    fn give_on(&self, server: &(String, u16), caller: &String) {
        let mut refused = Vec::new();
        {
            let mut servers = self.servers();
            let Some(turns) = servers.get_mut(server) else {
                return;
            };
            turns.end(caller);
            while let Some((caller, who)) = turns.next(self.shares) {
                turns.begin(&caller);
                if let Err(mut place) = who.send(self.place(server, &caller)) {
                    // The caller has left. Its place must not be dropped here, while the lock is held.
                    place.is_taken = false;
                    turns.end(&caller);
                    refused.push(place);
                }
            }
            if turns.is_empty() {
                servers.remove(server);
            }
        }
        drop(refused);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_taken {
            self.fair.give_on(&self.server, &self.caller);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use proptest::prelude::*;

    const SHARES: Shares = Shares {
        per_server: 3,
        per_caller: 2,
        waiting_per_caller: 4,
    };

    fn server(name: &str) -> (String, u16) {
        (name.to_owned(), 5432)
    }

    #[tokio::test]
    async fn callers_take_turns() {
        let fair = Fair::new(SHARES);
        let turn = |caller: &str| Box::pin(fair.turn(server("a"), caller.to_owned()));
        let mut running = Vec::new();
        for _ in 0..2 {
            running.push(turn("greedy").await.unwrap());
        }
        let mut waiting: Vec<_> = (0..4).map(|_| turn("greedy")).collect();
        assert!(waiting.iter_mut().all(|turn| turn.now_or_never().is_none()));
        // One caller gets at most its share, and at most the allowed number of its reads wait.
        assert_eq!(turn("greedy").await.err(), Some(TooMany(4)));
        // Another caller is served at once, and then waits for one turn, not for four.
        running.push(turn("modest").await.unwrap());
        let mut modest = turn("modest");
        assert!((&mut modest).now_or_never().is_none());
        drop(running.remove(0));
        let first = (&mut waiting[0]).now_or_never().unwrap().unwrap();
        assert!((&mut modest).now_or_never().is_none());
        drop(first);
        let served = (&mut modest).now_or_never();
        assert!(served.is_some(), "three others came before");
        assert!((&mut waiting[1]).now_or_never().is_none());
        // Turns at another server are independent.
        let elsewhere = fair.turn(server("b"), "greedy".to_owned()).await;
        assert!(elsewhere.is_ok());
    }

    #[tokio::test]
    async fn who_leaves_leaves_nothing_behind() {
        let fair = Fair::new(SHARES);
        let turn = || Box::pin(fair.turn(server("a"), "one".to_owned()));
        let places = (turn().await.unwrap(), turn().await.unwrap());
        let mut gone: Vec<_> = (0..4).map(|_| turn()).collect();
        assert!(gone.iter_mut().all(|turn| turn.now_or_never().is_none()));
        drop(gone);
        let mut stays = turn();
        assert!(
            (&mut stays).now_or_never().is_none(),
            "the others wait no more"
        );
        drop(places.0);
        drop((&mut stays).now_or_never().unwrap().unwrap());
        drop(places.1);
        assert!(fair.servers().is_empty());
    }

    proptest! {
        /// For any order of reads and ends: no share is exceeded, no read waits while there is a place for it, and
        /// between two turns of a waiting caller each other caller has at most one.
        #[test]
        fn shares_hold_and_turns_alternate(steps in prop::collection::vec((0..3usize, any::<bool>()), 1..200)) {
            let mut turns: Turns<usize, usize> = Turns::default();
            let mut running: Vec<usize> = Vec::new();
            let mut since: HashMap<(usize, usize), usize> = HashMap::new();
            for (n, (caller, comes)) in steps.into_iter().enumerate() {
                if comes {
                    let _ = turns.wait(&caller, n, SHARES.waiting_per_caller);
                } else if !running.is_empty() {
                    let done = running.remove(caller % running.len());
                    turns.end(&done);
                }
                while let Some((next, _)) = turns.next(SHARES) {
                    prop_assert!(turns.may_begin(&next, SHARES));
                    for waits in turns.order.iter().filter(|waits| **waits != next) {
                        if turns.may_begin(waits, SHARES) {
                            let n = since.entry((*waits, next)).or_default();
                            *n += 1;
                            prop_assert!(*n <= 1, "{next} had {n} turns before {waits}");
                        }
                    }
                    since.retain(|(waits, _), _| *waits != next);
                    turns.begin(&next);
                    running.push(next);
                }
                since.retain(|(waits, _), _| turns.waiting.contains_key(waits));
                prop_assert!(turns.running <= SHARES.per_server && turns.running == running.len());
                for caller in 0..3 {
                    let of_caller = running.iter().filter(|one| **one == caller).count();
                    prop_assert!(of_caller <= SHARES.per_caller);
                    prop_assert_eq!(turns.of_caller.get(&caller).copied().unwrap_or(0), of_caller);
                    let waits = turns.waiting.get(&caller).map_or(0, VecDeque::len);
                    prop_assert!(waits == 0 || !turns.may_begin(&caller, SHARES));
                }
            }
        }
    }
}
