//! When a message arrived, by clocks of this machine. Both stop while a virtual machine is paused, so what must not
//! happen late is bounded by the database's clock too, see
//! [`mayfly_protocol::task::Create::not_after`].

use std::time::{Duration, Instant};

/// The time of an arrival, by two clocks.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    at: Instant,
    /// Since the machine was started, with the time it was suspended (clock_gettime(2),
    /// `CLOCK_BOOTTIME`), which [`Instant`] leaves out.
    since_boot: Duration,
}

impl Arrival {
    /// The present, by both clocks.
    pub fn now() -> Self {
        Self {
            at: Instant::now(),
            since_boot: since_boot(),
        }
    }

    /// An arrival that is earlier by `by`. A clock that cannot go back that far is left as it is, or becomes 0.
    pub fn earlier(self, by: Duration) -> Self {
        Self {
            at: self.at.checked_sub(by).unwrap_or(self.at),
            since_boot: self.since_boot.saturating_sub(by),
        }
    }

    /// Time since the arrival, including the time that the machine was suspended.
    pub fn elapsed(&self) -> Duration {
        let awake = self.at.elapsed();
        awake.max(since_boot().saturating_sub(self.since_boot))
    }

    /// The time by the clock of timers.
    pub fn instant(&self) -> Instant {
        self.at
    }
}

#[cfg(target_os = "linux")]
fn since_boot() -> Duration {
    // For tests of a machine whose clocks all stand still.
    #[cfg(feature = "fault-points")]
    if std::env::var_os("MAYFLY_FAULT_BOOTTIME").is_some() {
        return Duration::ZERO;
    }
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// On other systems only [`Instant`] counts.
#[cfg(not(target_os = "linux"))]
fn since_boot() -> Duration {
    Duration::ZERO
}
