//! All windows of the protocol in one place. Engine and dispatcher take their numbers from here, so that no
//! engine begins a create after the time from which its absence counts as final.
//!
//! A request carries its deadline, by the dispatcher's clock. An honest request leaves its queue at that deadline.
//! The operator of the broker can record one and send it again at any time; then only the engine's own clock stops
//! it. So the windows allow for an engine's clock that is behind. An engine whose clock is further behind refuses
//! current requests too, so the fault is noticed.

use std::sync::OnceLock;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Declares [`Timing`] with its two sets of values, and [`Timing::rows`], from one list: name, standard value,
/// short value, meaning.
macro_rules! timing {
    ($($name:ident, $standard:expr, $short:expr, $meaning:literal;)*) => {
        /// The windows and pauses of the protocol.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct Timing {
            $(#[doc = $meaning] pub $name: Duration,)*
        }

        impl Timing {
            /// The values in use.
            pub const STANDARD: Self = Self { $($name: ms($standard),)* };
            /// Shorter values, for tests that wait until absence is final.
            pub const SHORT: Self = Self { $($name: ms($short),)* };

            /// Name, value and meaning of each, in the order of their declaration.
            pub fn rows(&self) -> Vec<(&'static str, Duration, &'static str)> {
                vec![$((stringify!($name), self.$name, $meaning),)*]
            }
        }
    };
}

timing! {
    clock_allowance, 4_000, 1_000, "Allowed difference between the clocks of dispatcher and engine, in either direction.";
    publish_limit, 5_000, 2_000, "Wait for a publish: a request may reach the broker this long after it was made.";
    create_budget, 10_000, 5_000, "Time from the delivery of a create or a rotation to its commit.";
    create_statement, 4_000, 2_000, "Time limit of one statement of a create; nothing begins in this last part of the budget.";
    commit_margin, 2_000, 2_000, "Margin for the broker and a COMMIT, in the time after which a create is over (`over_after`).";
    grant_within, 1_500, 1_000, "Time for pattern grants in a create; the rest follows in the background.";
    grant_until, 4_500, 2_500, "Age of a create at which its pattern grants end.";
    park_margin, 500, 500, "Added by the dispatcher to the delay of a parked end, so that it is due when it arrives.";
    due_margin, 250, 250, "Added by an engine to the delay of an end that came too early.";
    look_again, 4_000, 2_000, "Pause between looks for an account that is past its end and may still be made.";
    backoff_first, 1_000, 1_000, "Pause after the first failed try to end an account; it doubles, ±20 %.";
    backoff_max, 300_000, 300_000, "Longest pause between tries to end an account.";
    away_max, 4_000, 4_000, "Longest pause in the first 25 tries at an unreachable server.";
    full_pause, 300, 300, "Pause in the first 30 tries at a server without a free connection slot, ±20 %.";
    server_busy, 1_000, 1_000, "Pause of a revocation that was not tried because its server was busy, ±20 %.";
    reconcile_grace, 5_000, 5_000, "Delay of the reconciler after the usual messages.";
    reconcile_first, 5_000, 5_000, "Pause after the reconciler's first copy; it doubles.";
    reconcile_last, 300_000, 300_000, "Longest pause between the reconciler's copies.";
    doubtful_after, 600_000, 600_000, "Time after the deadline of an unanswered create, from which somebody may hold its credential.";
    retry_pause, 3_000, 3_000, "Time in which a second `lease retry` does nothing more.";
    ended_memory, 120_000, 120_000, "Minimum time for which an ended account is remembered, against a recorded create.";
    caller_memory, 120_000, 120_000, "Time for which a caller that has left is remembered, for a late answer.";
    rotation_answer, 10_000, 10_000, "Wait for an engine's answer in a rotation.";
    rotation_change, 6_000, 6_000, "Time from the latest begin of a password's change to its commit, by the database's clock.";
    heartbeat_every, 2_000, 2_000, "Pause between two heartbeats of an engine.";
    silence, 8_000, 8_000, "Silence after which an engine counts as gone.";
    drain_within, 25_000, 25_000, "Time limit of an engine's drain.";
}

impl Timing {
    /// The longest time from a create's deadline to the begin of its account's transaction, if an engine took it in
    /// time.
    pub const fn begun_after(&self) -> Duration {
        self.publish_limit.saturating_add(self.create_budget)
    }

    /// The time after a request's deadline from which it can have no effect. If an engine looks for an account after
    /// this time, by its own clock, the result is final.
    ///
    /// An engine whose clock is behind by the allowance can begin a request up to twice the allowance after the
    /// deadline, and commits within the budget. An engine whose clock is ahead by the allowance believes that much
    /// too early that the time has passed.
    pub const fn over_after(&self) -> Duration {
        self.clock_allowance
            .saturating_mul(3)
            .saturating_add(self.create_budget)
            .saturating_add(self.commit_margin)
    }

    /// Whether the windows fit into each other. The create that begins last commits before absence is final. A publish
    /// takes at most twice the clock allowance, so a late message of an honest dispatcher arrives no later than one
    /// from a slow clock.
    const fn is_sound(&self) -> bool {
        let committed = self.begun_after().saturating_add(self.create_statement);
        committed.as_millis() <= self.over_after().as_millis()
            && self.publish_limit.as_millis() <= self.clock_allowance.saturating_mul(2).as_millis()
            && self.create_statement.as_millis() < self.create_budget.as_millis()
            && self.grant_within.as_millis() < self.grant_until.as_millis()
            && self.heartbeat_every.as_millis() < self.silence.as_millis()
    }
}

const _: () = assert!(Timing::STANDARD.is_sound() && Timing::SHORT.is_sound());

static IN_FORCE: OnceLock<Timing> = OnceLock::new();

/// The windows in force in this process: [`Timing::STANDARD`], unless a test has set others.
pub fn timing() -> &'static Timing {
    IN_FORCE.get().unwrap_or(&Timing::STANDARD)
}

/// Sets the windows of this process, once, before anything has used them. Only builds with fault points do.
pub fn set_for_tests(timing: Timing) {
    let _ = IN_FORCE.set(timing);
}

/// Whether an engine may begin a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// The request is in time, so it may begin.
    Fresh,
    /// The request's deadline has passed by more than the allowance.
    Late,
    /// The request was made in the future: the engine's clock is behind by more than the allowance, and cannot tell
    /// an old request from a new one.
    FromTheFuture,
}

/// Judges a request that was sealed at `issued` and ends at `deadline`, both by the dispatcher's clock, at `now`
/// by the engine's clock. A request without a deadline is late.
pub fn freshness(issued: Timestamp, deadline: Option<Timestamp>, now: Timestamp) -> Freshness {
    let allowance = SignedDuration::try_from(timing().clock_allowance);
    let allowance = allowance.unwrap_or(SignedDuration::MAX);
    if issued.duration_since(now) > allowance {
        Freshness::FromTheFuture
    } else if deadline.is_none_or(|deadline| now.duration_since(deadline) > allowance) {
        Freshness::Late
    } else {
        Freshness::Fresh
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(1_000_000_000 + ms).unwrap()
    }

    fn millis(duration: Duration) -> i64 {
        i64::try_from(duration.as_millis()).unwrap()
    }

    #[test]
    fn what_an_engine_begins_is_over_before_absence_is_final() {
        let deadline = at(30_000);
        let allowed = millis(timing().clock_allowance);
        let over = millis(timing().over_after() - timing().create_budget);
        for skew in -allowed..=allowed {
            if skew % 100 != 0 {
                continue;
            }
            for after in (-30_000..60_000).step_by(100) {
                let engine = at(30_000 + after + skew);
                let begins = freshness(at(0), Some(deadline), engine) == Freshness::Fresh;
                // Another engine, whose clock is ahead, may already believe that the create is over.
                assert!(
                    !begins || after < over - allowed,
                    "skew {skew}, {after} ms after"
                );
                assert!(
                    begins || after > 0,
                    "an honest one is refused: skew {skew}, {after}"
                );
            }
        }
    }

    #[test]
    fn a_clock_that_is_farther_off_shows() {
        let past = at(-1) - timing().clock_allowance;
        let deadline = Some(at(30_000));
        assert_eq!(freshness(at(0), deadline, past), Freshness::FromTheFuture);
        assert_eq!(freshness(at(0), None, at(0)), Freshness::Late);
    }

    /// A difference of exactly the allowance is still allowed, in both directions.
    #[test]
    fn the_allowance_is_inclusive() {
        let allowed = timing().clock_allowance;
        let (issued, deadline) = (at(0), at(30_000));
        let tick = Duration::from_millis(1);
        for (now, expected) in [
            (issued - allowed, Freshness::Fresh),
            (issued - allowed - tick, Freshness::FromTheFuture),
            (deadline + allowed, Freshness::Fresh),
            (deadline + allowed + tick, Freshness::Late),
        ] {
            assert_eq!(freshness(issued, Some(deadline), now), expected, "{now}");
        }
    }

    /// Each inequality of the windows is needed: a set that breaks only one of them is refused.
    #[test]
    fn windows_that_do_not_fit_are_refused() {
        type Breaks = fn(&mut Timing);
        let breaks: [(&str, Breaks); 5] = [
            ("what begins last commits too late", |t| {
                t.commit_margin = Duration::ZERO;
                t.clock_allowance = ms(2_500);
            }),
            ("published later than a slow clock allows", |t| {
                t.publish_limit = t.clock_allowance * 2 + ms(1);
                t.commit_margin = ms(60_000);
            }),
            ("a statement as long as the budget", |t| {
                t.create_statement = t.create_budget;
                t.commit_margin = ms(60_000);
            }),
            ("patterns end when they begin", |t| {
                t.grant_within = t.grant_until;
            }),
            ("each pause between heartbeats is a silence", |t| {
                t.heartbeat_every = t.silence;
            }),
        ];
        for (why, change) in breaks {
            let mut timing = Timing::STANDARD;
            change(&mut timing);
            assert!(!timing.is_sound(), "{why}");
        }
        // The limits themselves are allowed.
        let mut timing = Timing::STANDARD;
        timing.publish_limit = timing.clock_allowance * 2;
        assert!(timing.is_sound());
        timing.create_statement = timing.create_budget - ms(1);
        timing.commit_margin = ms(60_000);
        assert!(timing.is_sound());
        // What begins last commits exactly when absence becomes final.
        let mut timing = Timing::STANDARD;
        timing.clock_allowance = ms(2_500);
        timing.commit_margin = ms(1_500);
        assert!(timing.is_sound());
    }

    #[test]
    fn rows_name_every_window_once() {
        let rows = Timing::STANDARD.rows();
        assert_eq!(
            rows[0],
            (
                "clock_allowance",
                Timing::STANDARD.clock_allowance,
                "Allowed difference between the clocks of dispatcher and engine, in either direction."
            )
        );
        assert_eq!(rows.len(), 27);
    }

    /// The table in ARCHITECTURE.md has the values in force.
    #[test]
    fn architecture_has_this_table() {
        let text = include_str!("../../ARCHITECTURE.md");
        for (name, value, meaning) in Timing::STANDARD.rows() {
            let row = format!("| `{name}` | {} | {meaning} |", shown(value));
            assert!(
                text.contains(&row),
                "ARCHITECTURE.md lacks the line:\n{row}"
            );
        }
    }

    fn shown(value: Duration) -> String {
        match value.as_millis() {
            ms if ms >= 60_000 => format!("{} min", ms / 60_000),
            ms if ms % 1000 == 0 => format!("{} s", ms / 1000),
            ms if ms > 1000 => format!("{} s", ms as f64 / 1000.0),
            ms => format!("{ms} ms"),
        }
    }
}
