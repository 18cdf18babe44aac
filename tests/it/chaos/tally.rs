//! The counts of a run, and the times in which something delayed the ends of accounts.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// An end that is later than this, without any fault, is worth an explanation.
pub(super) const SLOW: Duration = Duration::from_millis(1500);

/// Violations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    EarlyDeath,
    LateLogin,
    LateSession,
    LateRole,
    /// At the end.
    Left,
    Other,
}

/// What was counted.
#[derive(Default)]
pub(super) struct Tally {
    /// Maximum lateness of the end of an account, a session or a login without any fault.
    pub(super) late: Duration,
    pub(super) faults: BTreeMap<String, u32>,
    pub(super) refused: BTreeMap<String, u32>,
    /// Leases handed out.
    pub(super) issued: Vec<String>,
    pub(super) renewed: u32,
    pub(super) revoked: u32,
    pub(super) abandoned: u32,
    pub(super) logins: u32,
    /// Number of these logins after the end.
    pub(super) logins_refused: u32,
    /// Roles that appeared after a revocation had found them absent.
    pub(super) made_late: u32,
    pub(super) wrong: Vec<(Wrong, String)>,
    /// How late roles and sessions ended.
    pub(super) roles: Lateness,
    pub(super) sessions: Lateness,
    /// Events with their times, printed if something is wrong.
    pub(super) story: Vec<(Timestamp, String)>,
    trouble: Vec<Span>,
}

/// The times in which something delayed ends.
struct Span {
    begun: Timestamp,
    ended: Option<Timestamp>,
    is_of_broker: bool,
}

/// The life of an account.
#[derive(Clone, Copy)]
pub(super) struct Life {
    /// The time at which its end was parked, or later.
    pub(super) since: Timestamp,
    pub(super) end: Timestamp,
}

/// The lateness of ends.
#[derive(Default)]
pub(super) struct Lateness {
    pub(super) all: Vec<Duration>,
    /// Ends without any delay by a fault.
    pub(super) free: Vec<Duration>,
}

/// A fault that delays ends.
pub(super) struct Trouble(usize);

impl Tally {
    /// Nothing was counted yet. `late` is the maximum lateness without any fault.
    pub(super) fn new(late: Duration) -> Self {
        Self {
            late,
            ..Self::default()
        }
    }

    pub(super) fn wrong(&mut self, what: Wrong, words: String) {
        self.tell(format!("WRONG {what:?}: {words}"));
        self.wrong.push((what, words));
    }

    pub(super) fn tell(&mut self, words: String) {
        self.story.push((Timestamp::now(), words));
    }

    /// Notes that a fault begins to delay ends.
    pub(super) fn begins(&mut self, is_of_broker: bool) -> Trouble {
        self.trouble.push(Span {
            begun: Timestamp::now(),
            ended: None,
            is_of_broker,
        });
        Trouble(self.trouble.len() - 1)
    }

    /// The fault is over, except for its effect afterwards.
    pub(super) fn ends(&mut self, trouble: Trouble, aftermath: Duration) {
        self.trouble[trouble.0].ended = Some(Timestamp::now() + aftermath);
    }

    /// The part of the time between two timestamps in which a fault delayed ends.
    pub(super) fn trouble_in(&self, from: Timestamp, to: Timestamp) -> Duration {
        Self::covered(self.trouble.iter(), from, to)
    }

    /// How much later than `end` something that existed at `now` may be gone. Parked messages go down the delay
    /// levels; a broker that is unreachable meanwhile passes them on later by the same time.
    pub(super) fn excuse(&self, life: Life, now: Timestamp) -> Duration {
        let of_broker = self.trouble.iter().filter(|span| span.is_of_broker);
        self.trouble_in(life.end, now) + Self::covered(of_broker, life.since, life.end)
    }

    fn covered<'t>(
        spans: impl Iterator<Item = &'t Span>,
        from: Timestamp,
        to: Timestamp,
    ) -> Duration {
        let mut spans: Vec<_> = spans
            .map(|span| (span.begun.max(from), span.ended.unwrap_or(to).min(to)))
            .filter(|(begun, ended)| begun < ended)
            .collect();
        spans.sort();
        let (mut total, mut until) = (Duration::ZERO, from);
        for (begun, ended) in spans {
            let begun = begun.max(until);
            if ended > begun {
                total += ended.duration_since(begun).unsigned_abs();
                until = ended;
            }
        }
        total
    }

    /// Whether something of this life must be gone at `now`.
    pub(super) fn is_too_late(&self, life: Life, now: Timestamp) -> bool {
        let late = now.duration_since(life.end);
        late > SignedDuration::ZERO && late.unsigned_abs() > self.late + self.excuse(life, now)
    }

    /// Something of this life was gone at `now`, and existed at the last look.
    pub(super) fn ended(
        &mut self,
        which: fn(&mut Self) -> &mut Lateness,
        life: Life,
        seen: Timestamp,
        now: Timestamp,
    ) {
        let late = now.duration_since(life.end).max(SignedDuration::ZERO);
        let late = late.unsigned_abs();
        // A watcher that could not look does not know how late the end was.
        let is_sharp = now.duration_since(seen) < SignedDuration::from_secs(1);
        let free = is_sharp && self.excuse(life, now).is_zero();
        if free && late > SLOW {
            let Life { since, end } = life;
            self.tell(format!(
                "SLOW: of {since}, ended {end}, seen at {seen}, gone at {now}"
            ));
        }
        let lateness = which(self);
        lateness.all.push(late);
        if free {
            lateness.free.push(late);
        }
    }

    pub(super) fn count(&self, what: Wrong) -> usize {
        self.wrong.iter().filter(|(kind, _)| *kind == what).count()
    }
}

impl Lateness {
    /// Percentiles as text.
    pub(super) fn words(latenesses: &mut [Duration]) -> String {
        latenesses.sort();
        let percentile = |percent| {
            let at = latenesses.len().saturating_sub(1) * percent / 100;
            latenesses.get(at).map_or(0.0, Duration::as_secs_f64)
        };
        format!(
            "p50 {:.2}, p99 {:.2}, worst {:.2} of {}",
            percentile(50),
            percentile(99),
            percentile(100),
            latenesses.len()
        )
    }
}
