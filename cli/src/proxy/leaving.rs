//! When a session leaves its account: as soon as it is idle after a newer lease has come or the proxy ends, and at
//! the latest one second before the lease's end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::site::Upstream;

/// A session is cut this long before its account ends.
const CUT_BEFORE: Duration = Duration::from_secs(1);
/// In the first half of the time that is left, only sessions move that have been idle for this time. A connection
/// pool is unlikely to use them at the same moment.
const QUIET: Duration = Duration::from_millis(200);
/// In the second half, a session moves after this idle time: the client has read the last answer, and has put its
/// connection back into its connection pool.
const SHORTLY_QUIET: Duration = Duration::from_millis(10);
/// In the last eighth of the time, any idle moment is used.
const LAST_PART: u32 = 8;

/// What a session does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// End the session, because it is idle.
    Move,
    /// Give the session a new account while its client stays connected. A session of the server is ready for this.
    Swap,
    /// End the session at once, although it is in use.
    Cut,
    /// End the session: the client's machine or the server's is gone.
    Lose,
    /// Look again at this time, or when something changes.
    Wait(Instant),
}

/// When the sessions of an account begin to leave it, and when the last one is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leave {
    /// When they were asked to leave.
    pub(super) since: Instant,
    /// The end of a drain. The lease may end before.
    pub(super) cut_at: Option<Instant>,
}

/// What one session needs to decide when it leaves.
pub(super) struct Leaving {
    upstream: Arc<Upstream>,
    leave: watch::Receiver<Option<Leave>>,
    ends: watch::Receiver<Instant>,
}

impl Leaving {
    /// The state for a session of this account.
    pub(super) fn new(upstream: Arc<Upstream>) -> Self {
        Self {
            leave: upstream.leave.subscribe(),
            ends: upstream.lease.ends(),
            upstream,
        }
    }

    /// Decides what a session does now that has been idle since this time.
    pub(super) fn next(&self, now: Instant, idle_since: Option<Instant>) -> Next {
        next(now, idle_since, *self.leave.borrow(), *self.ends.borrow())
    }

    /// Whether the session moves as soon as it is idle.
    pub(super) fn is_leaving(&self) -> bool {
        self.leave.borrow().is_some()
    }

    /// Whether this is the session's last account: the proxy ends, or the account ends at once.
    pub(super) fn is_last(&self, now: Instant) -> bool {
        let drains = self.leave.borrow().is_some_and(|it| it.cut_at.is_some());
        drains || now >= self.cut_at()
    }

    /// When the session is cut at the latest.
    pub(super) fn cut_at(&self) -> Instant {
        cut_at(*self.leave.borrow(), *self.ends.borrow())
    }

    /// Waits until the end of the lease, or the request to leave, has changed.
    pub(super) async fn changed(&mut self) {
        // The senders live as long as the upstream, which is held here.
        tokio::select! {
            _ = self.leave.changed() => {}
            _ = self.ends.changed() => {}
        }
    }

    /// Why sessions of this account are cut.
    pub(super) fn why(&self) -> String {
        match *self.leave.borrow() {
            Some(Leave {
                cut_at: Some(cut_at),
                ..
            }) if cut_at + CUT_BEFORE < self.upstream.lease.end() => "mayfly proxy ends".to_owned(),
            _ => "the lease of its account ends in 1 s".to_owned(),
        }
    }
}

fn cut_at(leave: Option<Leave>, end: Instant) -> Instant {
    let end = end - CUT_BEFORE;
    let drained = leave.and_then(|leave| leave.cut_at);
    drained.map_or(end, |drained| drained.min(end))
}

fn next(now: Instant, idle_since: Option<Instant>, leave: Option<Leave>, end: Instant) -> Next {
    let cut_at = cut_at(leave, end);
    if now >= cut_at {
        return match idle_since {
            Some(_) => Next::Move,
            None => Next::Cut,
        };
    }
    let (Some(leave), Some(idle_since)) = (leave, idle_since) else {
        return Next::Wait(cut_at);
    };
    let time = cut_at.saturating_duration_since(leave.since);
    let movable = (idle_since + QUIET)
        .min((idle_since + SHORTLY_QUIET).max(leave.since + time / 2))
        .min(idle_since.max(cut_at - time / LAST_PART));
    match now >= movable {
        true => Next::Move,
        false => Next::Wait(movable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_moves_when() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let end = at(21_000);
        let leave = |cut_at| {
            Some(Leave {
                since: at(10_000),
                cut_at,
            })
        };
        for (now, idle, leave, expected) in [
            // Nobody asks the session to leave. It is looked at again before the lease's end.
            (5_000, Some(0), None, Next::Wait(at(20_000))),
            // The session was quiet for long enough, or not yet.
            (10_000, Some(0), leave(None), Next::Move),
            (10_000, Some(9_900), leave(None), Next::Wait(at(10_100))),
            (10_100, Some(9_900), leave(None), Next::Move),
            // In the second half of the time the session need not be quiet for long.
            (14_999, Some(14_980), leave(None), Next::Wait(at(15_000))),
            (15_000, Some(14_980), leave(None), Next::Move),
            (16_000, Some(16_000), leave(None), Next::Wait(at(16_010))),
            (16_010, Some(16_000), leave(None), Next::Move),
            // In the last eighth of the time any idle moment is used.
            (18_749, Some(18_749), leave(None), Next::Wait(at(18_750))),
            (18_750, Some(18_750), leave(None), Next::Move),
            // The session is in use: it is cut at the end, and not before.
            (19_999, None, leave(None), Next::Wait(at(20_000))),
            (20_000, None, leave(None), Next::Cut),
            (20_000, None, None, Next::Cut),
            (20_000, Some(0), None, Next::Move),
            // A drain ends before the lease does.
            (12_000, None, leave(Some(at(12_000))), Next::Cut),
            (
                11_999,
                None,
                leave(Some(at(12_000))),
                Next::Wait(at(12_000)),
            ),
            // A drain ends after the lease does.
            (20_000, None, leave(Some(at(60_000))), Next::Cut),
        ] {
            let idle = idle.map(at);
            assert_eq!(next(at(now), idle, leave, end), expected, "{now} {idle:?}");
        }
    }
}
