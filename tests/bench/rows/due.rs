//! Many accounts that are due in the same second: how late they end, and what a read costs meanwhile.

use std::time::{Duration, Instant};

use mayfly_tests::postgres::Admin;
use mayfly_tests::system::prefix;
use serde_json::json;
use tokio_postgres::Client;

use crate::cpu::Moment;
use crate::delays;
use crate::load::{self, TTL, Target, Until, percentile};
use crate::report::Of;
use crate::stand::{Issuers, Stand, count, drop_roles};
use crate::{Bench, ISSUERS, in_turn};

/// Accounts that are due together.
const TOGETHER: [usize; 2] = [1_000, 10_000];
/// OpenBao issues about 100 a second: a minute and a half for the larger number, only with FULL.
const OPENBAO_AT_MOST: usize = 1_000;
/// The shortest life of accounts that end together, in seconds. One that ends earlier than 54 s after its read is
/// looked for twice.
const LEAST_LIFE: u64 = 60;
/// Reads from which the rate of issuing is known.
const SAMPLE: usize = 100;
/// Time in which the messages of the larger number are parked.
const BROKER_LEAD: Duration = Duration::from_secs(30);
/// Accounts that end one by one.
const SINGLE: usize = 100;
/// Pause between two looks at the server. A figure is up to this much too late.
const LOOK: Duration = Duration::from_millis(10);
/// After this time the accounts are reported as not gone.
const PATIENCE: Duration = Duration::from_secs(300);

pub async fn run(bench: &mut Bench, group: &str) {
    let issuers = Issuers::start(bench, 1).await;
    let Issuers {
        server,
        site,
        stand,
        path,
        bao,
    } = &issuers;
    let root = server.superuser("postgres").await;
    let reads = stand.reads(&format!("{path}?ttl={TTL}"));
    // Probes live on, and are not counted.
    let other = server.site(Admin::Superuser).await;
    let probe = stand
        .secret(&other, server.port(), json!({"scramIterations": 1}))
        .await;
    let probe = stand.reads(&probe);
    // The first measurement is before thousands of messages are in the levels.
    single(bench, group, stand, path, &root, &prefix(site)).await;
    for together in TOGETHER {
        let number = bench.plan.number(together);
        let repeats = if together == TOGETHER[0] {
            bench.plan.slow_repeats()
        } else {
            1
        };
        for repeat in 0..repeats {
            for of in in_turn(repeat, ISSUERS) {
                match (of, bao) {
                    (Of::Mayfly, _) => {
                        let lead = lead_seconds(&probe, number).await;
                        let due = issue(&reads, number, lead).await;
                        let watched = stand.watched(server);
                        let before = Moment::of(&watched);
                        let (late, load) =
                            during(&probe, gone(&root, &prefix(site), number, due)).await;
                        record(bench, group, of, number, &late);
                        for (name, ms) in before.per_lease(&watched, number) {
                            let what = format!("CPU of each of {number} until then, {name}");
                            bench.report.add(group, &what, "ms", of, ms);
                        }
                        let what = format!("read while {number} end");
                        for percent in [50, 99] {
                            let ms = load.percentile(percent);
                            let what = format!("{what}, p{percent}");
                            bench.report.add(group, &what, "ms", of, ms);
                        }
                    }
                    (Of::OpenBao, Some(bao)) if bench.plan.full || together <= OPENBAO_AT_MOST => {
                        let lead = lead_seconds(&bao.reads(), number).await;
                        // The accounts of that measurement stay alive.
                        drop_roles(server, &bao.prefix()).await;
                        for ttl in 1..=lead {
                            bao.role(ttl).await;
                        }
                        let role = bao.role(lead).await;
                        let role = role.trim_end_matches(|digit: char| digit.is_ascii_digit());
                        let reads = bao.target(&format!("{role}{TTL}"));
                        let due = issue(&reads, number, lead).await;
                        record(
                            bench,
                            group,
                            of,
                            number,
                            &gone(&root, &bao.prefix(), number, due).await,
                        );
                    }
                    (Of::OpenBao | Of::Pgbench | Of::PgBouncer, _) => {}
                }
            }
        }
    }
    broker_alone(bench, group, stand).await;
    issuers.end(&[&other]).await;
}

/// Seconds from the first read to the common end: half as long again as issuing takes, by a sample of reads, and the
/// shortest life.
async fn lead_seconds(reads: &Target, number: usize) -> u64 {
    let sample = load::run(reads, 16, Until::Count(SAMPLE)).await;
    LEAST_LIFE + (1.5 * number as f64 / sample.rate()).ceil() as u64
}

/// The time that the broker needs for the larger number, without a program of Mayfly. Ends by parked messages cannot
/// be sooner.
async fn broker_alone(bench: &mut Bench, group: &str, stand: &Stand) {
    let number = bench.plan.number(TOGETHER[1]);
    let late = delays::late(&stand.system.rabbit, number, BROKER_LEAD).await;
    let name = format!("RabbitMQ alone, {number} messages due in one second: last delivered after");
    let last = percentile(&late, 100) / 1000.0;
    bench.report.add(group, &name, "s", Of::Mayfly, last);
}

/// Issues accounts that are due in the same second, and waits until it begins.
async fn issue(reads: &Target, number: usize, lead_seconds: u64) -> Instant {
    let due = Instant::now() + Duration::from_secs(lead_seconds);
    load::run(&reads.clone().due(due), 16, Until::Count(number)).await;
    assert!(
        Instant::now() < due,
        "issuing {number} took longer than their life"
    );
    tokio::time::sleep_until(due.into()).await;
    due
}

/// For each account, the time from the second in which it was due until it was gone.
async fn gone(root: &Client, prefix: &str, number: usize, due: Instant) -> Vec<Duration> {
    let over = due + Duration::from_secs(1);
    let (mut late, mut left) = (Vec::new(), number);
    while left > 0 {
        assert!(
            over.elapsed() < PATIENCE,
            "{left} of {number} are not gone {PATIENCE:?} after their end"
        );
        tokio::time::sleep(LOOK).await;
        let now = count(root, prefix).await;
        late.resize(late.len() + left.saturating_sub(now), over.elapsed());
        left = now;
    }
    late
}

/// Reads one after another until the accounts are gone.
async fn during(
    probe: &Target,
    gone: impl Future<Output = Vec<Duration>>,
) -> (Vec<Duration>, load::Load) {
    let mut gone = std::pin::pin!(gone);
    let mut all = load::Load::default();
    loop {
        tokio::select! {
            late = &mut gone => {
                all.latencies.sort();
                return (late, all);
            }
            // A read that is not answered before all accounts are gone does not count.
            load = load::run(probe, 1, Until::Count(1)) => all.latencies.extend(load.latencies),
        }
    }
}

fn record(bench: &mut Bench, group: &str, of: Of, number: usize, late: &[Duration]) {
    let mut add = |what: &str, percent| {
        let name = format!("{number} due in one second: {what} gone after");
        bench
            .report
            .add(group, &name, "s", of, percentile(late, percent) / 1000.0);
    };
    add("half", 50);
    add("99 %", 99);
    add("last", 100);
}

/// Accounts that end one by one: the time from `VALID UNTIL` until each is gone.
async fn single(
    bench: &mut Bench,
    group: &str,
    stand: &Stand,
    path: &str,
    root: &Client,
    prefix: &str,
) {
    let number = bench.plan.number(SINGLE);
    for n in 0..number {
        let read = format!("/v1/secrets/{path}?ttl={}", 6 + n * 20 / number);
        stand.system.api.ok(&read).await;
    }
    let ends = "SELECT (extract(epoch FROM rolvaliduntil) * 1000)::bigint FROM pg_authid
        WHERE starts_with(rolname, $1) ORDER BY 1";
    let rows = root.query(ends, &[&prefix]).await.unwrap();
    let ends: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    let begun = Instant::now();
    let mut late = Vec::new();
    while late.len() < ends.len() {
        assert!(begun.elapsed() < PATIENCE, "single accounts are not gone");
        tokio::time::sleep(LOOK).await;
        let left = count(root, prefix).await;
        let now = jiff::Timestamp::now().as_millisecond();
        // Accounts end in the order in which they are due, except for a few ms.
        for end in &ends[late.len()..ends.len() - left.min(ends.len() - late.len())] {
            late.push(Duration::from_millis(u64::try_from(now - end).unwrap_or(0)));
        }
    }
    late.sort();
    for (what, percent) in [("p50", 50), ("p99", 99)] {
        let value = percentile(&late, percent) / 1000.0;
        bench.report.add(
            group,
            &format!("single accounts: gone after their end, {what}"),
            "s",
            Of::Mayfly,
            value,
        );
    }
}
