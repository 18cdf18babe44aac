//! Issuing at 1, 4, 16 and 64 in flight, by three systems in turn.

use crate::cpu::{Moment, Watched};
use crate::flame::Recording;
use crate::load::{self, Load, Target, Until};
use crate::pgbench::Pgbench;
use crate::report::Of;
use crate::stand::{Issuers, Stand, drop_roles, postgres};
use crate::{Bench, ISSUERS, in_turn};

const IN_FLIGHT: [usize; 4] = [1, 4, 16, 64];
/// The numbers of reads in flight of the second group, unless FULL is set.
const IN_FLIGHT_SHORT: [usize; 2] = [1, 16];
/// The load for which CPU, messages and bytes are counted.
const COUNTED: usize = 16;
/// Without this number of SCRAM rounds OpenBao cannot make accounts on PostgreSQL 15.
const OPENBAO_ROUNDS: u32 = 4096;

pub async fn run(bench: &mut Bench, group: &str, rounds: u32) {
    let issuers = Issuers::start(bench, rounds).await;
    let Issuers {
        server,
        stand,
        path,
        bao,
        ..
    } = &issuers;
    let pgbench = Pgbench::prepare(server).await;
    let in_flight: &[usize] = match rounds {
        1 if !bench.plan.full => &IN_FLIGHT_SHORT,
        _ => &IN_FLIGHT,
    };
    for repeat in 0..bench.plan.repeats {
        for &in_flight in in_flight {
            for of in in_turn(repeat, ISSUERS) {
                match (of, bao) {
                    (Of::Mayfly, _) => {
                        let target = stand.reads(path);
                        let mut watched = stand.watched(server);
                        watched.push(own());
                        let counted = (in_flight == COUNTED).then(|| Counted::begin(stand));
                        let stacks = counted.is_some().then(|| Recording::begin(&watched));
                        let load = measure(bench, group, of, &target, in_flight, &watched).await;
                        drop(stacks);
                        if let Some(counted) = counted {
                            counted.end(bench, group, stand, load.latencies.len());
                        }
                    }
                    (Of::OpenBao, Some(bao)) => {
                        let watched = [bao.watched(), postgres(server), own()];
                        measure(bench, group, of, &bao.reads(), in_flight, &watched).await;
                    }
                    (Of::OpenBao, None) | (Of::PgBouncer, _) => {}
                    (Of::Pgbench, _) => {
                        let watched = [postgres(server)];
                        let before = Moment::of(&watched);
                        let time = bench.plan.time();
                        let load =
                            tokio::task::block_in_place(|| pgbench.run(in_flight, rounds, time));
                        record(bench, group, of, in_flight, &load);
                        record_cpu(bench, group, of, in_flight, &load, &before, &watched);
                    }
                }
            }
        }
    }
    if rounds != OPENBAO_ROUNDS && bao.is_some() {
        eprintln!(
            "  OpenBao's accounts have {OPENBAO_ROUNDS} rounds here too: it has no setting for them"
        );
    }
    drop_roles(server, &pgbench.prefix).await;
    issuers.end(&[]).await;
}

/// The load generator.
fn own() -> Watched {
    let pid = i32::try_from(std::process::id()).unwrap();
    Watched {
        name: "load generator",
        pids: vec![pid],
        with_children: false,
    }
}

async fn measure(
    bench: &mut Bench,
    group: &str,
    of: Of,
    target: &Target,
    in_flight: usize,
    watched: &[Watched],
) -> Load {
    load::run(target, in_flight, Until::Count(in_flight * 2)).await;
    let before = Moment::of(watched);
    let load = load::run(target, in_flight, Until::Time(bench.plan.time())).await;
    record(bench, group, of, in_flight, &load);
    record_cpu(bench, group, of, in_flight, &load, &before, watched);
    load
}

fn record(bench: &mut Bench, group: &str, of: Of, in_flight: usize, load: &Load) {
    let mut add = |what: &str, unit, value| {
        bench.report.add(
            group,
            &format!("issue, {in_flight} in flight{what}"),
            unit,
            of,
            value,
        );
    };
    add("", "leases/s", load.rate());
    add(", p50", "ms", load.percentile(50));
    add(", p99", "ms", load.percentile(99));
}

fn record_cpu(
    bench: &mut Bench,
    group: &str,
    of: Of,
    in_flight: usize,
    load: &Load,
    before: &Moment,
    watched: &[Watched],
) {
    if in_flight != COUNTED {
        return;
    }
    let used = before.per_lease(watched, load.latencies.len());
    // PostgreSQL does the same work for all systems. The CPU of the load generator belongs to none of them.
    let others = used
        .iter()
        .filter(|(name, _)| !["PostgreSQL", "load generator"].contains(name));
    let rest: f64 = others.map(|(_, ms)| ms).sum();
    for (name, ms) in used {
        bench
            .report
            .add(group, &format!("CPU per lease, {name}"), "ms", of, ms);
    }
    if of != Of::Pgbench {
        bench
            .report
            .add(group, "CPU per lease, all but PostgreSQL", "ms", of, rest);
    }
}

/// Counters of the broker at a moment. They include heartbeats: an engine sends one each 2 s.
struct Counted {
    published: u64,
    bytes: u64,
}

impl Counted {
    fn begin(stand: &Stand) -> Self {
        let rabbit = &stand.system.rabbit;
        Self {
            published: rabbit.counter("messages_received_total"),
            bytes: rabbit.bytes_on_the_wire(),
        }
    }

    fn end(&self, bench: &mut Bench, group: &str, stand: &Stand, leases: usize) {
        let now = Self::begin(stand);
        // The leases of the warm-up were counted too.
        let leases = (leases + 2 * COUNTED) as f64;
        let published = (now.published - self.published) as f64 / leases;
        let bytes = (now.bytes - self.bytes) as f64 / leases;
        bench.report.add(
            group,
            "messages published per lease",
            "",
            Of::Mayfly,
            published,
        );
        bench.report.add(
            group,
            "bytes to and from the broker per lease",
            "B",
            Of::Mayfly,
            bytes,
        );
    }
}
