//! Explores the lease protocol within bounds that take seconds. `make model` explores further: MAYFLY_MODEL_FAULTS
//! adds faults to every case.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::time::Instant;

use mayfly_model::explore::{Report, explore};
use mayfly_model::{Bounds, Mistake, Protocol};

fn run(what: &str, bounds: Bounds) -> Report {
    let begun = Instant::now();
    let report = explore(&Protocol::new(bounds));
    println!(
        "{what}: {} states, {} steps, at most {} deep, {} at rest, {:.1} s",
        report.states,
        report.steps,
        report.depth,
        report.quiet,
        begun.elapsed().as_secs_f64()
    );
    report
}

fn holds(what: &str, mut bounds: Bounds) {
    bounds.faults +=
        std::env::var("MAYFLY_MODEL_FAULTS").map_or(0, |more| more.parse::<u8>().unwrap());
    let report = run(what, bounds);
    assert!(report.quiet > 0, "{what}: nothing comes to rest");
    if let Some(trace) = report.wrong {
        panic!("{what}: {trace:?}");
    }
}

fn fails(mistake: Mistake, why: &str, bounds: Bounds) {
    let report = run(
        &format!("{mistake:?}"),
        Bounds {
            mistake: Some(mistake),
            ..bounds
        },
    );
    let trace = report
        .wrong
        .unwrap_or_else(|| panic!("{mistake:?} goes unnoticed"));
    assert_eq!(trace.why, why, "{mistake:?}: {trace:?}");
    println!("  {} after {} steps", trace.why, trace.steps.len() - 1);
}

/// The bounds without faults. Tests add faults.
fn calm() -> Bounds {
    Bounds {
        faults: 0,
        ..Bounds::default()
    }
}

#[test]
fn one_fault_anywhere_ends_well() {
    holds(
        "one fault",
        Bounds {
            faults: 1,
            ..calm()
        },
    );
}

#[test]
fn a_broker_that_loses_everything_ends_well() {
    holds(
        "lost broker",
        Bounds {
            wipe: true,
            ..calm()
        },
    );
}

#[test]
fn renewals_and_revocations_asked_for_end_well() {
    holds(
        "renewal and revocation",
        Bounds {
            asks: true,
            renewals: 1,
            last: 6,
            ..calm()
        },
    );
}

#[test]
fn an_account_shorter_than_its_create_ends_well() {
    holds(
        "short account, renewed",
        Bounds {
            ttl: 1,
            renewals: 1,
            ..calm()
        },
    );
}

#[test]
fn every_limit_in_its_own_length_ends_well() {
    holds(
        "ticks of five seconds",
        Bounds {
            tick_seconds: 5,
            ttl: 3,
            last: 8,
            ..calm()
        },
    );
}

#[test]
fn other_clocks_end_well() {
    holds("database ahead", Bounds { skew: 2, ..calm() });
    holds(
        "database behind",
        Bounds {
            skew: -2,
            last: 7,
            ..calm()
        },
    );
}

#[test]
fn a_restored_store_ends_well() {
    holds(
        "restored store",
        Bounds {
            restore: true,
            sweep: true,
            ..calm()
        },
    );
}

#[test]
fn recorded_messages_end_well() {
    holds(
        "recorded messages",
        Bounds {
            replays: 1,
            asks: true,
            ..calm()
        },
    );
}

const EARLY: &str = "a credential in use died early";
const REVIVED: &str = "an account is there whose lease is over";
const STRANDED: &str = "from here nothing leads to rest any more";
const UNPARKED: &str = "a credential is out and its end is not parked";

#[test]
fn mistakes_are_noticed() {
    use Mistake::*;
    let one = Bounds {
        faults: 1,
        ..calm()
    };
    let renewed = Bounds {
        renewals: 1,
        ..calm()
    };
    fails(SettleOnFirstGone, UNPARKED, calm());
    fails(TrustOldNews, REVIVED, calm());
    fails(AnswerUnparked, UNPARKED, one.clone());
    fails(LookThenDrop, EARLY, renewed.clone());
    fails(ExpireAtSight, EARLY, calm());
    fails(ParkCopies, "messages multiply", calm());
    fails(
        NoReconciler,
        STRANDED,
        Bounds {
            wipe: true,
            ..one.clone()
        },
    );
    fails(SlowCreate, REVIVED, calm());
    fails(SayNothingUnheard, REVIVED, one.clone());
    fails(AckFirst, UNPARKED, one.clone());
    fails(BlindRenewal, EARLY, renewed.clone());
    fails(
        DropAnew,
        EARLY,
        Bounds {
            faults: 1,
            renewals: 1,
            ..calm()
        },
    );
    fails(
        TakeRecorded,
        REVIVED,
        Bounds {
            replays: 1,
            asks: true,
            ..calm()
        },
    );
}
