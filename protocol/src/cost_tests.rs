//! What each message costs in instructions and heap blocks, counted by valgrind: the same on a busy machine. The
//! limits are those of a debug build, in which cryptography is optimized: the number of blocks itself, and a tenth
//! more instructions than were counted. A change that raises a figure on purpose raises its limit here; a change
//! that lowers one should lower it.

use std::process::Command;

use jiff::Timestamp;

use crate::names::LeaseId;
use crate::seal::{Form, KeyPair};
use crate::task::{Create, Head, Kind};

/// `OPERATION NUMBER`: [`work`] repeats it this number of times.
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

/// Sealing a create, opening it and parsing it. Each line is two or three starts under valgrind, of 2 s each.
const LIMITS: [Limit; 2] = [
    Limit {
        operation: "shared",
        instructions: 319_000,
        blocks: 42,
    },
    Limit {
        operation: "alone",
        instructions: 6_830_000,
        blocks: 41,
    },
];

const CREATE: &str = r#"{"lease": "LEASE", "installation": "INSTALLATION",
    "target": {"host": "db.example.com", "port": 5432, "username": "admin", "password": "P@ssword!", "database": "app", "sslmode": "require"},
    "database": "app", "role": "mayfly_0123456789abcdef", "ttl_seconds": 3600, "connection_limit": 20,
    "verifier": "SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "grants": [{"what": "SELECT", "where": "*.*"}]}"#;

/// Every operation once, and one of them again and again. `shared` uses an encapsulation that is there already, as
/// all messages of a minute but the first do. It runs under valgrind, and here once.
#[test]
fn work() {
    let asked = std::env::var(VARIABLE).unwrap_or("none 0".to_owned());
    let (operation, number) = asked.split_once(' ').unwrap();
    let number: u64 = number.parse().unwrap();
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
    let installation = crate::names::InstallationId::random().to_string();
    let text = CREATE.replace("LEASE", &lease.to_string());
    let text = text.replace("INSTALLATION", &installation);
    let create: Create = serde_json::from_str(&text).unwrap();
    let seal = |form| {
        let sealed = head.seal_request(form, &dispatcher, engine.public(), &create, None);
        sealed.unwrap()
    };
    let open = |sealed: &[u8]| {
        let opened: Create = head.open(&engine, dispatcher.public(), sealed).unwrap();
        assert_eq!(opened.lease, lease);
    };
    let (alone, shared) = (seal(Form::Alone), seal(Form::Shared));
    open(&alone);
    open(&shared);
    match operation {
        "alone" => repeated(number, || open(&seal(Form::Alone))),
        "shared" => repeated(number, || open(&seal(Form::Shared))),
        _ => assert_eq!(operation, "none"),
    }
}

/// callgrind counts only here: a program's start takes a varying number of instructions.
#[inline(never)]
fn repeated(number: u64, mut operation: impl FnMut()) {
    for _ in 0..number {
        operation();
    }
}

#[test]
fn costs_of_messages_are_within_limits() {
    let base = count("dhat", "none");
    let mut wrong = Vec::new();
    for limit in &LIMITS {
        let blocks = count("dhat", limit.operation).saturating_sub(base);
        let instructions = count("callgrind", limit.operation);
        for (what, counted, most) in [
            ("instructions", instructions, limit.instructions),
            ("blocks", blocks, limit.blocks),
        ] {
            let each = counted / REPEATS;
            let line = format!("{}: {each} {what}, at most {most}", limit.operation);
            println!("{line}");
            if each > most || each == 0 {
                wrong.push(line);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Instructions or heap blocks of a run of [`work`].
fn count(tool: &str, operation: &str) -> u64 {
    let mut command = Command::new("valgrind");
    command
        .arg(format!("--tool={tool}"))
        .arg(format!("--{tool}-out-file=/dev/null"));
    if tool == "callgrind" {
        command.arg("--toggle-collect=*cost_tests::repeated*");
    }
    let output = command
        .arg(std::env::current_exe().unwrap())
        .args(["cost_tests::work", "--exact", "--test-threads=1"])
        .env(VARIABLE, format!("{operation} {REPEATS}"))
        .output()
        .expect("valgrind is missing: run `make setup-test`");
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{printed}");
    // The line is `==1== Collected : 12345`, or `==1== Total:     1,234 bytes in 56 blocks`.
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
