//! What a connection is doing, and how long that may take. This file reads no clock: times are parameters, and a
//! deadline is the result.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Limit for the head of a request (request line and headers), from its first byte on; for the first head of a
/// connection, from the accept on.
pub(super) const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// Limit for the body of a request, after its head.
pub(super) const BODY_LIMIT: Duration = Duration::from_secs(10);
/// Limit for the answer of a handler whose body was late.
const BODY_GRACE: Duration = Duration::from_secs(2);
/// A connection may wait this long for its next request. Most clients close their connections after 60 or 90 s, and
/// should close first.
const IDLE_LIMIT: Duration = Duration::from_secs(120);
/// An answer has to be taken within this time.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// While an answer is written, the client has to take some of it at least this often.
const STALL_LIMIT: Duration = Duration::from_secs(10);
/// The connection of a client that has read nothing of its answer for this long may be closed to make room.
const STALL_GRACE: Duration = Duration::from_secs(1);

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The head of a request is awaited or has begun to come.
    Head,
    /// A request is awaited after one that was answered.
    Idle,
    /// A handler has the head, and the body is coming.
    Body,
    /// A handler works. Its own limits end it.
    Work,
    /// An answer is being written.
    Answer,
}

/// The order in which connections are closed to make room for a new one: the lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Worth {
    /// The client has not sent a whole head.
    Nothing,
    /// The connection waits for the next request.
    Idle,
    /// The client has not sent its whole body, or does not take its answer.
    Slow,
}

/// The state of a connection at one time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) phase: Phase,
    pub(super) since: Instant,
    /// Since when nothing of the answer was taken.
    stalled: Option<Instant>,
    /// All of the answer is with hyper.
    is_whole: bool,
    /// Something of the next request has come already.
    has_more: bool,
}

impl Now {
    fn at(phase: Phase, since: Instant) -> Self {
        Self {
            phase,
            since,
            stalled: None,
            is_whole: false,
            has_more: false,
        }
    }

    /// When the connection is closed if nothing happens. `None`: its handler decides.
    fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Head => Some(self.since + HEAD_LIMIT),
            Phase::Idle => Some(self.since + IDLE_LIMIT),
            Phase::Body => Some(self.since + BODY_LIMIT + BODY_GRACE),
            Phase::Work => None,
            Phase::Answer => {
                let all = self.since + ANSWER_LIMIT;
                let next = self.stalled.map(|since| since + STALL_LIMIT);
                Some(next.map_or(all, |next| next.min(all)))
            }
        }
    }

    /// How early the connection is closed if there is no room. `None`: it is not closed.
    pub(super) fn worth(&self, now: Instant) -> Option<Worth> {
        match self.phase {
            Phase::Head => Some(Worth::Nothing),
            Phase::Idle => Some(Worth::Idle),
            Phase::Body => Some(Worth::Slow),
            Phase::Work => None,
            Phase::Answer => self
                .stalled
                .filter(|since| now.duration_since(*since) >= STALL_GRACE)
                .map(|_| Worth::Slow),
        }
    }
}

/// What a connection is doing, as reported by its stream, its bodies and its service.
#[derive(Debug)]
pub(super) struct Seen(Mutex<Now>);

impl Seen {
    pub(super) fn new(at: Instant) -> Self {
        Self(Mutex::new(Now::at(Phase::Head, at)))
    }

    fn change(&self, change: impl FnOnce(&mut Now)) {
        // No code panics while it holds this lock.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn now(&self) -> Now {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.now().deadline()
    }

    /// Bytes have arrived from the client.
    pub(super) fn read(&self, at: Instant) {
        self.change(|now| match now.phase {
            Phase::Idle => *now = Now::at(Phase::Head, at),
            Phase::Work | Phase::Answer => now.has_more = true,
            Phase::Head | Phase::Body => {}
        });
    }

    /// A handler has the head of a request.
    pub(super) fn asked(&self, has_body: bool, at: Instant) {
        let phase = if has_body { Phase::Body } else { Phase::Work };
        self.change(|now| *now = Now::at(phase, at));
    }

    /// The body of a request is complete, or no handler reads it.
    pub(super) fn body_ended(&self, at: Instant) {
        self.change(|now| {
            if now.phase == Phase::Body {
                *now = Now::at(Phase::Work, at);
            }
        });
    }

    /// A handler has answered.
    pub(super) fn answered(&self, at: Instant) {
        self.change(|now| {
            *now = Now {
                has_more: now.has_more,
                ..Now::at(Phase::Answer, at)
            };
        });
    }

    /// All of the answer was handed over to be written.
    pub(super) fn answer_ended(&self) {
        self.change(|now| now.is_whole = true);
    }

    /// The client has taken some of the answer, or takes nothing now.
    pub(super) fn wrote(&self, some: bool, at: Instant) {
        self.change(|now| {
            if some {
                now.stalled = None;
            } else {
                now.stalled.get_or_insert(at);
            }
        });
    }

    /// All that was handed over is written.
    pub(super) fn flushed(&self, at: Instant) {
        self.change(|now| {
            if now.phase == Phase::Answer && now.is_whole {
                let next = match now.has_more {
                    true => Phase::Head,
                    false => Phase::Idle,
                };
                *now = Now::at(next, at);
            }
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_its_limit() {
        let begun = Instant::now();
        let at = |second: u64| begun + Duration::from_secs(second);
        let seen = Seen::new(at(0));
        let is = |second: u64, limit: Option<u64>, worth: Option<Worth>| {
            assert_eq!(seen.deadline(), limit.map(at), "at {second}");
            assert_eq!(seen.now().worth(at(second)), worth, "at {second}");
        };
        is(0, Some(10), Some(Worth::Nothing));
        // A byte from time to time does not move the limit of the head.
        seen.read(at(4));
        is(4, Some(10), Some(Worth::Nothing));
        seen.asked(true, at(5));
        is(5, Some(17), Some(Worth::Slow));
        seen.read(at(6));
        seen.body_ended(at(6));
        is(6, None, None);
        seen.answered(at(400));
        is(400, Some(460), None);
        // A client that does not read.
        seen.wrote(false, at(401));
        is(401, Some(411), None);
        seen.wrote(false, at(404));
        is(404, Some(411), Some(Worth::Slow));
        // A client that reads a little from time to time.
        seen.wrote(true, at(405));
        is(405, Some(460), None);
        seen.wrote(false, at(455));
        is(455, Some(460), None);
        seen.wrote(true, at(456));
        seen.flushed(at(456));
        assert_eq!(seen.now().phase, Phase::Answer, "not all of it was there");
        seen.answer_ended();
        seen.flushed(at(457));
        is(457, Some(577), Some(Worth::Idle));
        seen.read(at(500));
        is(500, Some(510), Some(Worth::Nothing));
        // Half a request behind a whole one is half a request.
        seen.asked(false, at(501));
        seen.read(at(501));
        seen.answered(at(502));
        seen.answer_ended();
        seen.flushed(at(502));
        is(502, Some(512), Some(Worth::Nothing));
    }
}
