//! Clients that open a connection for each request, and callers with wrong tokens.

use super::dispatchers::wrong_tokens;
use crate::load::{self, Target, Until};
use crate::report::Of;
use crate::stand::Issuers;
use crate::{Bench, ISSUERS, in_turn};

const IN_FLIGHT: usize = 16;

pub async fn run(bench: &mut Bench, group: &str) {
    let issuers = Issuers::start(bench, 1).await;
    let Issuers {
        stand, path, bao, ..
    } = &issuers;
    for repeat in 0..bench.plan.repeats {
        for of in in_turn(repeat, ISSUERS) {
            let reads = match (of, bao) {
                (Of::Mayfly, _) => stand.reads(path),
                (Of::OpenBao, Some(bao)) => bao.reads(),
                (Of::OpenBao, None) | (Of::Pgbench | Of::PgBouncer, _) => continue,
            };
            clients(bench, group, of, &reads).await;
        }
    }
    wrong_tokens(bench, group, stand, path).await;
    issuers.end(&[]).await;
}

async fn clients(bench: &mut Bench, group: &str, of: Of, reads: &Target) {
    for (what, target) in [
        ("with keep-alive", reads.clone()),
        ("without keep-alive", reads.clone().without_keep_alive()),
    ] {
        load::run(&target, IN_FLIGHT, Until::Count(IN_FLIGHT)).await;
        let load = load::run(&target, IN_FLIGHT, Until::Time(bench.plan.time())).await;
        let name = format!("issue, {IN_FLIGHT} in flight, {what}");
        bench.report.add(group, &name, "leases/s", of, load.rate());
        bench.report.add(
            group,
            &format!("{name}, p50"),
            "ms",
            of,
            load.percentile(50),
        );
    }
}
