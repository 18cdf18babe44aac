//! An admin without superuser rights on PostgreSQL 18: each account adds a membership row for its maker.

use mayfly_tests::postgres::{Admin, Server};
use serde_json::json;

use crate::Bench;
use crate::load::{self, Until};
use crate::report::Of;
use crate::stand::Stand;

/// Accounts that each admin has.
const LIVE: [usize; 3] = [0, 1_000, 5_000];
const ADMINS: [(&str, Admin); 2] = [
    ("superuser", Admin::Superuser),
    ("CREATEROLE", Admin::CreateRole),
];

pub async fn run(bench: &mut Bench, group: &str) {
    let server = Server::pg18();
    let stand = Stand::start(2, &[]).await;
    let mut secrets = Vec::new();
    for (name, admin) in ADMINS {
        let site = server.site(admin).await;
        let path = stand
            .secret(&site, server.port(), json!({"scramIterations": 1}))
            .await;
        secrets.push((name, path, site));
    }
    let mut filled = 0;
    for live in LIVE {
        let number = if live == 0 {
            0
        } else {
            bench.plan.number(live)
        };
        for (name, path, _) in &secrets {
            if number > filled {
                let load = stand.fill(path, number - filled).await;
                let row = format!("admin is {name}, up to {number} live, 16 in flight");
                bench
                    .report
                    .add(group, &row, "leases/s", Of::Mayfly, load.rate());
            }
        }
        filled = number;
        for _ in 0..bench.plan.repeats {
            for (name, path, _) in &secrets {
                load::run(&stand.reads(path), 1, Until::Count(5)).await;
                let load = load::run(&stand.reads(path), 1, Until::Count(50)).await;
                for (what, percent) in [("p50", 50), ("p99", 99)] {
                    let row = format!("admin is {name}, {number} live, issue, {what}");
                    bench
                        .report
                        .add(group, &row, "ms", Of::Mayfly, load.percentile(percent));
                }
            }
        }
    }
    let sites: Vec<_> = secrets.iter().map(|(_, _, site)| site).collect();
    stand.end(&sites).await;
}
