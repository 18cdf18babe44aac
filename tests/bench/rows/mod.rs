//! The groups of rows, in the order of the table.

mod callers;
mod create_role;
mod dispatchers;
mod due;
mod engines;
mod flat;
mod history;
mod issue;
mod live;
mod pools;
mod proxy;
mod revoke;

use crate::Bench;

/// A group: its name, and what it measures.
pub struct Group {
    pub name: &'static str,
    pub what: &'static str,
}

const fn group(name: &'static str, what: &'static str) -> Group {
    Group { name, what }
}

/// All groups.
pub const GROUPS: [Group; 12] = [
    group(
        "issue",
        "issue with 4096 SCRAM rounds: rate, latency, CPU, messages and bytes per lease",
    ),
    group("issue-1-round", "the same with 1 SCRAM round"),
    group("revoke", "early revoke of 5,000 accounts by prefix"),
    group(
        "due",
        "accounts that are due in the same second, and reads meanwhile",
    ),
    group(
        "live",
        "cost, memory and bytes at 0, 10,000 (FULL: 100,000) live leases; start with them",
    ),
    group(
        "rows",
        "pages, counts, reads and a start with 100,000 (FULL: 1,000,000) ended leases in the store",
    ),
    group("engines", "1, 2, 4, 8 engines, 20 ms from the database"),
    group(
        "dispatchers",
        "1, 2, 3 dispatchers, 1 ms from a store in PostgreSQL",
    ),
    group(
        "pools",
        "1 and 100 pools with an engine each, 2 dispatchers on a store in PostgreSQL",
    ),
    group(
        "createrole",
        "an admin with CREATEROLE on PostgreSQL 18, with 0, 1,000 and 5,000 live accounts",
    ),
    group(
        "callers",
        "clients without keep-alive; callers with wrong tokens",
    ),
    group(
        "proxy",
        "`mayfly proxy` beside pgbench at the server itself and PgBouncer in session mode",
    ),
];

/// Measures the rows of a group.
pub async fn run(name: &str, bench: &mut Bench) {
    match name {
        "issue" => issue::run(bench, name, 4096).await,
        "issue-1-round" => issue::run(bench, name, 1).await,
        "revoke" => revoke::run(bench, name).await,
        "due" => due::run(bench, name).await,
        "live" => live::run(bench, name).await,
        "rows" => history::run(bench, name).await,
        "engines" => engines::run(bench, name).await,
        "dispatchers" => dispatchers::run(bench, name).await,
        "pools" => pools::run(bench, name).await,
        "createrole" => create_role::run(bench, name).await,
        "callers" => callers::run(bench, name).await,
        "proxy" => proxy::run(bench, name).await,
        _ => unreachable!("{name} is no group"),
    }
}
