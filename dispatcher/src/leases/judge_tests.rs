//! Tests of what a found role can cause: a table, and arbitrary answers of another pool.
#![allow(clippy::unwrap_used)]

use super::*;
use mayfly_protocol::fixtures::{at, lease};
use mayfly_protocol::names::LeaseId;
use proptest::prelude::*;

const GRACE: Duration = Duration::from_secs(10);

fn installation() -> InstallationId {
    "00000000-0000-4000-8000-000000000001".parse().unwrap()
}

fn role(lease: &Lease, second: i64) -> LedgerRole {
    LedgerRole {
        role: lease.role.clone(),
        installation: installation(),
        lease: lease.id,
        expiration: Some(at(second)),
        owns: false,
    }
}

fn asked<'a>(pool: &'a PoolName, second: i64) -> Asked<'a> {
    Asked {
        installation: installation(),
        pool,
        base: "b",
        there: at(second),
        here: at(second),
        grace: GRACE,
        others_grace: GRACE,
    }
}

/// A lease in a state, and whether its account was seen to end.
fn ended(state: State, seen: bool) -> Lease {
    let mut lease = lease(state);
    lease.status.revoked_at = seen.then(|| at(40));
    lease
}

#[test]
fn only_what_is_over_is_looked_after() {
    let (own, other): (PoolName, PoolName) = ("pool1".parse().unwrap(), "pool2".parse().unwrap());
    // By the store the lease ends at 60 s. The first number is its end by the answer, the second is the present time.
    let table = [
        (
            ended(State::Active, false),
            60,
            65,
            Act::Nothing,
            Act::Nothing,
        ),
        (ended(State::Active, false), 60, 70, Act::Look, Act::Look),
        // Only the lease's own pool may report an earlier end than the store's.
        (ended(State::Active, false), 20, 30, Act::Look, Act::Nothing),
        (
            ended(State::Pending, false),
            20,
            30,
            Act::Look,
            Act::Nothing,
        ),
        (
            ended(State::Revoking, false),
            90,
            50,
            Act::Nothing,
            Act::Nothing,
        ),
        // The lease has ended. Its account exists again, with an end in the future.
        (ended(State::Revoking, true), 90, 50, Act::Look, Act::Look),
        (ended(State::Revoked, true), 90, 50, Act::Look, Act::Look),
        (ended(State::Failed, false), 90, 50, Act::Look, Act::Look),
        // The lease was detached.
        (
            ended(State::Revoked, false),
            90,
            50,
            Act::Nothing,
            Act::Nothing,
        ),
        (ended(State::Revoked, false), 20, 50, Act::Look, Act::Look),
    ];
    for (lease, end, now, by_own, by_other) in table {
        let words = format!("{:?} {end} {now}", lease.status.state);
        let found = role(&lease, end);
        assert_eq!(
            judge(&found, Some(&lease), &asked(&own, now)),
            by_own,
            "{words}"
        );
        assert_eq!(
            judge(&found, Some(&lease), &asked(&other, now)),
            by_other,
            "{words}"
        );
        // A role of another name, or of another installation, says nothing about the lease.
        let renamed = LedgerRole {
            role: "mayfly_y".parse().unwrap(),
            ..found.clone()
        };
        let stranger = LedgerRole {
            installation: InstallationId::random(),
            ..found
        };
        for lie in [renamed, stranger] {
            assert_eq!(
                judge(&lie, Some(&lease), &asked(&own, now)),
                Act::Nothing,
                "{words}"
            );
        }
    }
}

#[test]
fn what_nobody_knows_ends_by_its_own_date() {
    let pool: PoolName = "pool1".parse().unwrap();
    let unknown = role(&lease(State::Active), 60);
    assert_eq!(judge(&unknown, None, &asked(&pool, 69)), Act::Nothing);
    assert_eq!(judge(&unknown, None, &asked(&pool, 70)), Act::End);
    let stranger = LedgerRole {
        installation: InstallationId::random(),
        ..unknown.clone()
    };
    assert_eq!(judge(&stranger, None, &asked(&pool, 109)), Act::Nothing);
    assert_eq!(judge(&stranger, None, &asked(&pool, 110)), Act::End);
    let owner = LedgerRole {
        owns: true,
        ..stranger
    };
    assert_eq!(judge(&owner, None, &asked(&pool, 9999)), Act::Nothing);
    let eternal = LedgerRole {
        expiration: None,
        ..unknown
    };
    assert_eq!(judge(&eternal, None, &asked(&pool, 9999)), Act::Nothing);
}

proptest! {
    /// An engine of another pool may report anything: a lease that the store knows is never ended because of it. At
    /// most its own pool looks, and only if the store itself counts the lease as over.
    #[test]
    fn another_pools_word_changes_nothing(
        state in proptest::sample::select(State::ALL.to_vec()),
        seen in any::<bool>(),
        name in "[a-z_]{1,20}",
        same_name in any::<bool>(),
        own in any::<bool>(),
        owns in any::<bool>(),
        expiration in proptest::option::of(-1_000_000i64..1_000_000),
        there in -1_000_000i64..1_000_000,
        here in 0i64..500,
    ) {
        let lease = ended(state, seen);
        let pool: PoolName = "pool2".parse().unwrap();
        let mut asked = asked(&pool, here);
        asked.there = at(there);
        let found = LedgerRole {
            role: if same_name { lease.role.clone() } else { name.parse().unwrap() },
            installation: if own { installation() } else { InstallationId::random() },
            lease: lease.id,
            expiration: expiration.map(at),
            owns,
        };
        let act = judge(&found, Some(&lease), &asked);
        prop_assert_ne!(act, Act::End);
        if act == Act::Look {
            let is_over = match state {
                State::Failed => true,
                State::Revoked => true,
                State::Active => here >= 70,
                State::Revoking => seen,
                State::Pending => false,
            };
            prop_assert!(is_over, "a look at a lease that lives");
        }
        // The comment cannot name a future lease either: ids are random.
        prop_assert_ne!(LeaseId::random(), lease.id);
    }
}
