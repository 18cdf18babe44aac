//! What was counted, and what the faults excuse.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

/// Beyond a fault's own end: the AMQP heartbeat, a connect's time-out, a process's start.
pub(super) const AFTERMATH: Duration = Duration::from_secs(15);
/// How late an account may end with nothing in the way.
pub(super) const LATE: Duration = Duration::from_secs(3);

/// What was counted.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) faults: BTreeMap<String, u32>,
    pub(super) refused: BTreeMap<String, u32>,
    pub(super) issued: u32,
    pub(super) renewed: u32,
    pub(super) revoked: u32,
    pub(super) abandoned: u32,
    pub(super) logins: u32,
    pub(super) violations: Vec<String>,
    pub(super) late: Vec<Duration>,
    /// When something was in the way, its aftermath included.
    pub(super) trouble: Vec<(Timestamp, Timestamp)>,
}

impl Tally {
    pub(super) fn fault(&mut self, kind: &str, lasting: Duration) {
        *self.faults.entry(kind.to_owned()).or_default() += 1;
        let now = Timestamp::now();
        self.trouble.push((now, now + lasting + AFTERMATH));
    }

    /// How much of the time between two moments something was in the way.
    pub(super) fn trouble_in(&self, from: Timestamp, to: Timestamp) -> Duration {
        let mut spans: Vec<_> = self
            .trouble
            .iter()
            .map(|(begun, ended)| ((*begun).max(from), (*ended).min(to)))
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
}
