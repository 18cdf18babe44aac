//! A circuit breaker for one database server, as a pure value: the caller passes the time. After some failed
//! connections in a row no task connects for a pause. Then one task tries, and its result counts for all.

use std::time::{Duration, Instant};

/// Number of failures in a row that open the breaker.
const FAILURES: u32 = 3;
/// Two failures that are further apart than this do not count as in a row.
const IN_A_ROW: Duration = Duration::from_secs(30);
/// How long it stays open at first. The time doubles with each failed trial.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest time for which the circuit breaker stays open.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The circuit breaker stays open for at most this fraction of the time for which the server has been unreachable. So
/// the end of a short outage is noticed soon, and a long outage costs few tries.
const PAUSE_PART: u32 = 12;

/// The state of one server.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Breaker {
    failures: u32,
    /// Times of the first and the last failure.
    away: Option<(Instant, Instant)>,
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Open {
    until: Instant,
    pause: Duration,
    /// Whether a task is testing if the server is reachable again.
    probing: bool,
}

/// The permission to try; pass it to [`Breaker::ended`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// The breaker is closed: no change.
    Ordinary,
    /// The only trial at present.
    Probe,
    /// A person asked for the try.
    Asked,
}

/// The result of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reached {
    /// The server answered, perhaps with a refusal.
    Reachable,
    /// There was no connection.
    Unreachable,
    /// The try was aborted before it had a result.
    Aborted,
}

/// The server must not be tried now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Away {
    /// How long it has not answered.
    pub(crate) since: Duration,
    /// The time until the next try. Zero: a try is in progress.
    pub(crate) again: Duration,
}

impl Breaker {
    /// Requests permission to connect.
    ///
    /// # Errors
    /// [`Away`]: no task may connect now.
    pub(crate) fn pass(&mut self, now: Instant, asked: bool) -> Result<Pass, Away> {
        let Some(open) = &mut self.open else {
            return Ok(if asked { Pass::Asked } else { Pass::Ordinary });
        };
        if asked {
            return Ok(Pass::Asked);
        }
        if now >= open.until && !open.probing {
            open.probing = true;
            return Ok(Pass::Probe);
        }
        Err(Away {
            since: self
                .away
                .map_or(Duration::ZERO, |(first, _)| now.duration_since(first)),
            again: open.until.saturating_duration_since(now),
        })
    }

    /// Reports the result of a try, once for each pass.
    pub(crate) fn ended(&mut self, now: Instant, pass: Pass, found: Reached) {
        match found {
            Reached::Reachable => *self = Self::default(),
            Reached::Aborted => {
                if let (Pass::Probe, Some(open)) = (pass, &mut self.open) {
                    open.probing = false;
                }
            }
            Reached::Unreachable => self.failed(now, pass),
        }
    }

    fn failed(&mut self, now: Instant, pass: Pass) {
        let first = match self.away {
            Some((first, last)) if self.open.is_some() || now.duration_since(last) <= IN_A_ROW => {
                first
            }
            _ => {
                self.failures = 0;
                now
            }
        };
        self.away = Some((first, now));
        self.failures = self.failures.saturating_add(1);
        let pause = match (self.open, pass) {
            // A try that began before the breaker opened, or that a person asked for, does not change the pause.
            (Some(_), Pass::Ordinary | Pass::Asked) => return,
            (Some(open), Pass::Probe) => open.pause.saturating_mul(2),
            (None, _) if self.failures < FAILURES => return,
            (None, _) => PAUSE_FIRST,
        };
        let part = now.duration_since(first) / PAUSE_PART;
        let pause = pause.min(part.clamp(PAUSE_FIRST, PAUSE_MAX));
        self.open = Some(Open {
            until: now + pause,
            pause,
            probing: false,
        });
    }

    /// Whether the breaker is open, so that only a probe may try.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether it remembers no failure.
    pub(crate) fn is_untouched(&self) -> bool {
        *self == Self::default()
    }

    /// Forgets failures that are too old to count.
    pub(crate) fn forget(&mut self, now: Instant) {
        if self.open.is_none()
            && self
                .away
                .is_some_and(|(_, last)| now.duration_since(last) > IN_A_ROW)
        {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Fails at these times, in milliseconds after `start`.
    fn failing(start: Instant, moments: &[u64]) -> Breaker {
        let mut breaker = Breaker::default();
        for ms in moments {
            let now = start + Duration::from_millis(*ms);
            let pass = breaker.pass(now, false).unwrap();
            breaker.ended(now, pass, Reached::Unreachable);
        }
        breaker
    }

    #[test]
    fn it_opens_after_failures_in_a_row() {
        let start = Instant::now();
        let later = start + Duration::from_millis(30);
        assert!(failing(start, &[0, 10]).pass(later, false).is_ok());
        let away = failing(start, &[0, 10, 20]).pass(later, false).unwrap_err();
        assert_eq!(away.since, Duration::from_millis(30));
        assert_eq!(away.again, Duration::from_millis(990));
        let far_apart = failing(start, &[0, 10, 40_000]);
        assert!(
            far_apart
                .clone()
                .pass(start + Duration::from_secs(41), false)
                .is_ok()
        );
        let mut healed = failing(start, &[0, 10]);
        healed.ended(later, Pass::Ordinary, Reached::Reachable);
        assert!(healed.is_untouched());
    }

    #[test]
    fn one_probe_at_a_time_decides_for_all() {
        let start = Instant::now();
        let mut breaker = failing(start, &[0, 0, 0]);
        let due = start + PAUSE_FIRST;
        assert_eq!(breaker.pass(due, false), Ok(Pass::Probe));
        assert_eq!(breaker.pass(due, false).unwrap_err().again, Duration::ZERO);
        // An aborted trial: the next task may try.
        breaker.ended(due, Pass::Probe, Reached::Aborted);
        assert_eq!(breaker.pass(due, false), Ok(Pass::Probe));
        breaker.ended(due, Pass::Probe, Reached::Reachable);
        assert_eq!(breaker.pass(due, false), Ok(Pass::Ordinary));
    }

    #[test]
    fn the_pause_follows_the_absence() {
        let start = Instant::now();
        let mut breaker = failing(start, &[0, 0, 0]);
        let mut now = start;
        let mut pauses = Vec::new();
        while now < start + Duration::from_secs(1200) {
            now += breaker.open.unwrap().until.duration_since(now);
            let pass = breaker.pass(now, false).unwrap();
            assert_eq!(pass, Pass::Probe);
            breaker.ended(now, pass, Reached::Unreachable);
            let pause = breaker.open.unwrap().pause;
            let away = now.duration_since(start);
            assert!(
                pause <= (away / PAUSE_PART).max(PAUSE_FIRST),
                "{pause:?} after {away:?}"
            );
            pauses.push(pause);
        }
        assert!(pauses.is_sorted());
        assert_eq!(
            (pauses[0], *pauses.last().unwrap()),
            (PAUSE_FIRST, PAUSE_MAX)
        );
    }

    #[test]
    fn a_person_passes_and_moves_nothing_but_success() {
        let start = Instant::now();
        let mut breaker = failing(start, &[0, 0, 0]);
        let before = breaker.open;
        assert_eq!(breaker.pass(start, true), Ok(Pass::Asked));
        breaker.ended(start, Pass::Asked, Reached::Unreachable);
        assert_eq!(breaker.open, before);
        // An attempt that began before the breaker opened ends late.
        breaker.ended(start, Pass::Ordinary, Reached::Unreachable);
        assert_eq!(breaker.open, before);
        breaker.ended(start, Pass::Asked, Reached::Reachable);
        assert!(breaker.is_untouched());
    }

    #[test]
    fn old_failures_are_forgotten_and_an_open_one_is_not() {
        let start = Instant::now();
        let later = start + IN_A_ROW + PAUSE_FIRST;
        let mut old = failing(start, &[0, 0]);
        old.forget(later);
        assert!(old.is_untouched());
        let mut open = failing(start, &[0, 0, 0]);
        open.forget(later);
        assert!(!open.is_untouched());
    }
}
