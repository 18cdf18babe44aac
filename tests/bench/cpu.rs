//! CPU time of processes, from /proc/PID/stat (proc(5)): fields 14 to 17, in clock ticks of 10 ms.

use std::time::Duration;

/// Processes that are counted as one.
pub struct Watched {
    pub name: &'static str,
    pub pids: Vec<i32>,
    /// Whether their children count, also those that have ended: a PostgreSQL server has one for each connection.
    pub with_children: bool,
}

impl Watched {
    /// The CPU time until now.
    pub fn used(&self) -> Duration {
        let mut ticks = 0;
        let children = if self.with_children {
            all()
        } else {
            Vec::new()
        };
        for pid in &self.pids {
            if let Some(stat) = Stat::of(*pid) {
                ticks += stat.own + if self.with_children { stat.reaped } else { 0 };
            }
            ticks += children
                .iter()
                .filter(|stat| stat.parent == *pid)
                .map(|stat| stat.own)
                .sum::<u64>();
        }
        Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }
}

/// CPU times of several systems at one time.
pub struct Moment(Vec<Duration>);

impl Moment {
    /// The CPU times that these systems have used until now.
    pub fn of(watched: &[Watched]) -> Self {
        Self(watched.iter().map(Watched::used).collect())
    }

    /// CPU time since this measurement, in ms for each of `leases` leases, in the order of `watched`.
    pub fn per_lease(&self, watched: &[Watched], leases: usize) -> Vec<(&'static str, f64)> {
        let now = Self::of(watched).0;
        let used = now
            .iter()
            .zip(&self.0)
            .map(|(now, then)| now.saturating_sub(*then));
        let each = used.map(|used| used.as_secs_f64() * 1000.0 / leases.max(1) as f64);
        watched.iter().map(|one| one.name).zip(each).collect()
    }
}

struct Stat {
    parent: i32,
    /// CPU time of the process, in ticks.
    own: u64,
    /// CPU time of the children that have ended, in ticks.
    reaped: u64,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may have spaces. After it comes field 3.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own: ticks(14)? + ticks(15)?,
            reaped: ticks(16)? + ticks(17)?,
        })
    }
}

fn all() -> Vec<Stat> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Stat::of).collect()
}

/// Resident memory of a process in MB (10^6 bytes), of now or at most since its start.
pub fn resident_mb(pid: i32, highest: bool) -> f64 {
    let name = if highest { "VmHWM:" } else { "VmRSS:" };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib * 1024.0 / 1e6
}

/// Lets the highest resident memory of a process begin at the present value (proc(5), clear_refs).
pub fn forget_highest(pid: i32) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}
