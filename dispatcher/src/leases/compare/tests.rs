//! Pages of leases and roles, the bounded list, and the word for each difference.

use super::*;
use mayfly_protocol::fixtures::{at, lease};
use proptest::collection::btree_set;
use proptest::prelude::*;

fn found(role: &str, end: i64) -> LedgerRole {
    LedgerRole {
        role: role.parse().unwrap(),
        installation: "00000000-0000-4000-8000-000000000001".parse().unwrap(),
        lease: LeaseId::random(),
        expiration: Some(at(end)),
        owns: false,
    }
}

proptest! {
    /// Each lease and each role is compared once, a lease in the same step as its role, in pages of any size.
    #[test]
    fn two_lists_are_compared_page_by_page(
        stored in btree_set("[a-c]{1,3}", 0..30),
        listed in btree_set("[a-c]{1,3}", 0..30),
        // Their rows are not authentic.
        forged in btree_set("[a-c]{1,3}", 0..30),
        (leases_in_page, roles_in_page) in (1..8_usize, 1..8_usize),
    ) {
        let (mut seen_leases, mut seen_roles) = (Vec::new(), Vec::new());
        let mut after = String::new();
        for _ in 0..100 {
            let rows: Vec<&String> = stored.iter().filter(|role| **role > after).take(leases_in_page).collect();
            let next = rows.last().filter(|_| rows.len() == leases_in_page).map(|last| (*last).clone());
            let mut leases: Vec<Lease> = rows.into_iter().filter(|role| !forged.contains(*role))
                .map(|role| Lease { role: role.parse().unwrap(), ..lease(State::Active) }).collect();
            let left: Vec<&String> = listed.iter().filter(|role| **role > after).collect();
            let mut page = Ledger {
                server: "s".to_owned(),
                now: at(0),
                roles: left.iter().take(roles_in_page).map(|role| found(role, 0)).collect(),
                more: left.len() > roles_in_page,
            };
            let until = cut(&mut leases, next, &mut page);
            for lease in &leases {
                let has_role = page.roles.iter().any(|role| role.role == lease.role);
                prop_assert_eq!(has_role, listed.contains(lease.role.as_str()));
            }
            seen_leases.extend(leases.into_iter().map(|lease| lease.role.to_string()));
            seen_roles.extend(page.roles.into_iter().map(|role| role.role.to_string()));
            match until {
                Some(role) => after = role,
                None => break,
            }
        }
        prop_assert!(seen_leases.iter().eq(stored.difference(&forged)), "{:?}", seen_leases);
        prop_assert!(seen_roles.iter().eq(&listed), "{:?}", seen_roles);
    }
}

/// However much differs, the answer is bounded, and counts all.
#[test]
fn the_list_of_differences_is_bounded() {
    let mut comparison = Comparison::default();
    for _ in 0..LISTED_MAX + 3 {
        comparison.differs(Difference {
            kind: "overdue",
            path: "db:x".parse().unwrap(),
            pool: "pool1".parse().unwrap(),
            role: "mayfly_x".parse().unwrap(),
            lease: None,
            installation: None,
            store_expiration: None,
            database_expiration: None,
            action: "none",
        });
    }
    assert_eq!(comparison.differences.len(), LISTED_MAX);
    assert_eq!(comparison.differences_total, LISTED_MAX + 3);
}

/// A server that two base secrets reach: the second reports what the first did not come to.
#[test]
fn a_role_is_reported_once_for_its_server() {
    let page = |roles: &[&str]| Ledger {
        server: "s".to_owned(),
        now: at(0),
        roles: roles.iter().map(|role| found(role, 0)).collect(),
        more: true,
    };
    let mut comparison = Comparison::default();
    let of = |pool: &str, address: &str| places(&pool.parse().unwrap(), address, "s");
    let there = || of("pool1", "db 5432");
    comparison.compared_to(there(), &page(&["a", "c"]));
    comparison.compared_to(there(), &page(&["a", "b"]));
    // An engine of another pool and address says that it is at the same server.
    comparison.compared_to(of("pool2", "rogue 5432"), &page(&["z"]));
    let was = |places, role: &str| comparison.was_compared(&places, &role.parse().unwrap());
    let was_there = |role| was(there(), role);
    assert!(was_there("a") && was_there("b") && was_there("c") && !was_there("d"));
    assert!(was(of("pool1", "alias 5432"), "c") && was(of("pool3", "db 5432"), "c"));
    assert!(!was(of("pool3", "alias 5432"), "a"));
    let elsewhere = places(&"pool1".parse().unwrap(), "db 5432", "other");
    assert!(!was(elsewhere, "a"));
}

#[test]
fn a_role_and_its_lease_differ_by_one_stable_word() {
    // Its end by the store is 60 s.
    let lease = lease;
    let table = [
        (60, Some(State::Active), true, None),
        (61, Some(State::Active), true, None),
        (62, Some(State::Active), true, Some("expiration_differs")),
        (49, Some(State::Active), true, Some("overdue")),
        (60, Some(State::Revoked), true, Some("settled_in_store")),
        // There is no date in the store yet.
        (90, Some(State::Pending), true, None),
        (60, None, true, Some("unknown_to_store")),
        // The role of another installation is that one's while it lives.
        (60, None, false, None),
        (50, None, false, Some("other_installation")),
    ];
    for (end, state, own, expected) in table {
        let lease = state.map(lease);
        let word = differs(&found("mayfly_x", end), lease.as_ref(), own, at(50));
        assert_eq!(word, expected, "{end} {state:?} {own}");
    }
}
