//! Early revocation of many accounts by one call.

use std::time::Instant;

use mayfly_tests::seconds;
use mayfly_tests::system::prefix;
use tokio_postgres::Client;

use crate::cpu::{Moment, Watched};
use crate::load::{self, Until};
use crate::report::Of;
use crate::stand::{Issuers, Stand, all_gone, postgres};
use crate::{Bench, ISSUERS, in_turn};

const ACCOUNTS: usize = 5_000;

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
    let number = bench.plan.number(ACCOUNTS);
    for repeat in 0..bench.plan.slow_repeats() {
        for of in in_turn(repeat, ISSUERS) {
            match (of, bao) {
                (Of::Mayfly, _) => {
                    stand.fill(path, number).await;
                    let watched = stand.watched(server);
                    let (row, published) =
                        (Row::begin(group, of, number, watched), published(stand));
                    let (status, body) = stand
                        .system
                        .api
                        .delete(&format!("/v1/leases?path={path}"))
                        .await;
                    assert_eq!(status, 200, "{body}");
                    row.end(bench, &root, &prefix(site)).await;
                    let each = (self::published(stand) - published) as f64 / number as f64;
                    bench
                        .report
                        .add(group, "messages published per ended account", "", of, each);
                }
                (Of::OpenBao, Some(bao)) => {
                    load::run(&bao.reads(), 16, Until::Count(number)).await;
                    let watched = vec![bao.watched(), postgres(server)];
                    let row = Row::begin(group, of, number, watched);
                    bao.revoke_all().await;
                    row.end(bench, &root, &bao.prefix()).await;
                }
                (Of::OpenBao, None) | (Of::Pgbench | Of::PgBouncer, _) => {}
            }
        }
    }
    issuers.end(&[]).await;
}

fn published(stand: &Stand) -> u64 {
    stand.system.rabbit.counter("messages_received_total")
}

/// One revocation of all accounts.
struct Row<'a> {
    group: &'a str,
    of: Of,
    number: usize,
    watched: Vec<Watched>,
    before: Moment,
    begun: Instant,
}

impl<'a> Row<'a> {
    fn begin(group: &'a str, of: Of, number: usize, watched: Vec<Watched>) -> Self {
        let before = Moment::of(&watched);
        Self {
            group,
            of,
            number,
            watched,
            before,
            begun: Instant::now(),
        }
    }

    /// The call was answered. Waits until the accounts are gone.
    async fn end(self, bench: &mut Bench, root: &Client, prefix: &str) {
        let mut add =
            |name: &str, unit, value| bench.report.add(self.group, name, unit, self.of, value);
        let answered = self.begun.elapsed().as_secs_f64();
        add(
            &format!("answer to the revocation of {}", self.number),
            "s",
            answered,
        );
        all_gone(root, prefix, seconds(200)).await;
        let rate = self.number as f64 / self.begun.elapsed().as_secs_f64();
        add(
            &format!("revocation of {}", self.number),
            "accounts/s",
            rate,
        );
        for (name, ms) in self.before.per_lease(&self.watched, self.number) {
            add(&format!("CPU per ended account, {name}"), "ms", ms);
        }
    }
}
