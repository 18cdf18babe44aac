//! What each message costs in instructions and heap blocks, counted by valgrind: the same on a busy machine. The
//! limits are those of a debug build, in which cryptography is optimized: the number of blocks itself, and a tenth
//! more instructions than were counted. A change that raises a figure on purpose raises its limit here; a change
//! that lowers one should lower it.

use std::process::Command;

use jiff::Timestamp;

use crate::names::LeaseId;
use crate::seal::KeyPair;
use crate::task::{Create, Head, Kind};

/// `OPERATION NUMBER`: [`work`] does it this number of times more than once.
const VARIABLE: &str = "MAYFLY_COST_OF";
/// Repeats that are counted. With more of them the figures change by less than 1 %.
const REPEATS: u64 = 10;

struct Limit {
    operation: &'static str,
    /// Instructions (callgrind).
    instructions: u64,
    /// Blocks taken from the heap (dhat).
    blocks: u64,
}

const LIMITS: [Limit; 3] = [
    Limit {
        operation: "seal",
        instructions: 3_680_000,
        blocks: 17,
    },
    Limit {
        operation: "open",
        instructions: 3_140_000,
        blocks: 24,
    },
    Limit {
        operation: "parse",
        instructions: 44_600,
        blocks: 18,
    },
];

const CREATE: &str = r#"{"lease": "LEASE", "installation": "INSTALLATION",
    "target": {"host": "db.example.com", "port": 5432, "username": "admin", "password": "P@ssword!", "database": "app", "sslmode": "require"},
    "database": "app", "role": "mayfly_0123456789abcdef", "ttl_seconds": 3600, "connection_limit": 20,
    "verifier": "SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "grants": [{"what": "SELECT", "where": "*.*"}]}"#;

/// The task of every operation: it runs under valgrind, and here once.
#[test]
fn work() {
    let asked = std::env::var(VARIABLE).unwrap_or("all 1".to_owned());
    let (operation, number) = asked.split_once(' ').unwrap();
    let number: u64 = number.parse().unwrap();
    let times = |name| {
        let more = operation == name || operation == "all";
        1 + if more { number } else { 0 }
    };
    let (dispatcher, engine) = (KeyPair::generate(), KeyPair::generate());
    let lease = LeaseId::random();
    let head = Head {
        kind: Kind::Create,
        pool: "pool1".parse().unwrap(),
        lease: Some(lease),
        issued: Timestamp::now(),
        deadline: None,
        attempt: 0,
        settling: false,
        traceparent: String::new(),
    };
    let text = CREATE.replace("LEASE", &lease.to_string()).replace(
        "INSTALLATION",
        &crate::names::InstallationId::random().to_string(),
    );
    let mut create: Option<Create> = None;
    for _ in 0..times("parse") {
        create = Some(serde_json::from_str(&text).unwrap());
    }
    let create = create.unwrap();
    let mut sealed = Vec::new();
    for _ in 0..times("seal") {
        sealed = head.seal(&dispatcher, engine.public(), &create).unwrap();
    }
    for _ in 0..times("open") {
        let opened: Create = head.open(&engine, dispatcher.public(), &sealed).unwrap();
        assert_eq!(opened.lease, lease);
    }
}

#[test]
fn costs_of_messages_are_within_limits() {
    let base = [count("callgrind", "none"), count("dhat", "none")];
    let mut wrong = Vec::new();
    for limit in &LIMITS {
        for (n, (tool, most)) in [("callgrind", limit.instructions), ("dhat", limit.blocks)]
            .into_iter()
            .enumerate()
        {
            let each = count(tool, limit.operation).saturating_sub(base[n]) / REPEATS;
            println!("{} {tool}: {each}, at most {most}", limit.operation);
            if each > most || each == 0 {
                wrong.push(format!(
                    "{} {tool}: {each}, at most {most}",
                    limit.operation
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Instructions or heap blocks of a run of [`work`].
fn count(tool: &str, operation: &str) -> u64 {
    let output = Command::new("valgrind")
        .arg(format!("--tool={tool}"))
        .arg(format!("--{tool}-out-file=/dev/null"))
        .arg(std::env::current_exe().unwrap())
        .args(["cost_tests::work", "--exact", "--test-threads=1"])
        .env(VARIABLE, format!("{operation} {REPEATS}"))
        .output()
        .expect("valgrind is missing: run `make setup-test`");
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{printed}");
    // `==1== Collected : 12345`, `==1== Total:     1,234 bytes in 56 blocks`
    let line = match tool {
        "callgrind" => "Collected :",
        _ => "Total:",
    };
    let line = printed.lines().find_map(|text| text.split_once(line));
    let rest = line.unwrap_or_else(|| panic!("{printed}")).1;
    let number = rest.split(" in ").last().unwrap().trim();
    let number = number.split(' ').next().unwrap().replace(',', "");
    number.parse().unwrap()
}
