//! Tests of a comparison: pages of leases and roles, the limited list, the word for each difference, and what is done
//! about it.

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

/// An engine of this pool answers at 50 s.
fn asked(pool: &PoolName) -> Asked<'_> {
    let grace = Duration::from_secs(10);
    Asked {
        installation: "00000000-0000-4000-8000-000000000001".parse().unwrap(),
        pool,
        base: "b",
        there: at(50),
        here: at(50),
        grace,
        others_grace: grace,
    }
}

proptest! {
    /// Each lease and each role is compared once, a lease in the same step as its role, in pages of any size.
    #[test]
    fn two_lists_are_compared_page_by_page(
        stored in btree_set("[a-c]{1,3}", 0..30),
        listed in btree_set("[a-c]{1,3}", 0..30),
        // The rows of these leases are not authentic.
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
    // By the store the lease ends at 60 s.
    let lease = lease;
    let table = [
        (60, Some(State::Active), true, None),
        (61, Some(State::Active), true, None),
        (62, Some(State::Active), true, Some("expiration_differs")),
        (49, Some(State::Active), true, Some("overdue")),
        (60, Some(State::Revoked), true, Some("settled_in_store")),
        // The store has no end yet.
        (90, Some(State::Pending), true, None),
        (60, None, true, Some("unknown_to_store")),
        // The role of another installation belongs to that installation while it lives.
        (60, None, false, None),
        (50, None, false, Some("other_installation")),
    ];
    for (end, state, own, expected) in table {
        let lease = state.map(lease);
        let word = differs(&found("mayfly_x", end), lease.as_ref(), own, at(50));
        assert_eq!(word, expected, "{end} {state:?} {own}");
    }
}

/// Which pool can report what differs, and what is done about it, at 50 s.
#[test]
fn a_difference_has_its_remedy() {
    let (own, other): (PoolName, PoolName) = ("pool1".parse().unwrap(), "pool2".parse().unwrap());
    // Each row has the pool that answers, the lease's state, the role's name and end, and what is found.
    let nothing = Some(None);
    let table = [
        (&own, Some(State::Active), "mayfly_x", 60, nothing),
        (
            &own,
            Some(State::Active),
            "mayfly_x",
            90,
            Some(Some(("expiration_differs", Remedy::CorrectStore))),
        ),
        // The lease is overdue by 5 s: the usual messages end it.
        (
            &own,
            Some(State::Active),
            "mayfly_x",
            45,
            Some(Some(("overdue", Remedy::Nothing))),
        ),
        (
            &own,
            Some(State::Active),
            "mayfly_x",
            40,
            Some(Some(("overdue", Remedy::EndAccount))),
        ),
        (
            &own,
            Some(State::Failed),
            "mayfly_x",
            90,
            Some(Some(("settled_in_store", Remedy::EndAccount))),
        ),
        // The lease was detached, and its account is left to its end.
        (
            &own,
            Some(State::Revoked),
            "mayfly_x",
            60,
            Some(Some(("settled_in_store", Remedy::Nothing))),
        ),
        // Another role has a comment with this lease.
        (
            &own,
            Some(State::Active),
            "mayfly_y",
            40,
            Some(Some(("unknown_to_store", Remedy::Nothing))),
        ),
        (
            &own,
            None,
            "mayfly_x",
            40,
            Some(Some(("unknown_to_store", Remedy::EndAccount))),
        ),
        (
            &own,
            None,
            "mayfly_x",
            60,
            Some(Some(("unknown_to_store", Remedy::Nothing))),
        ),
        // A report of another pool about a live lease does not count, whatever end it reports.
        (&other, Some(State::Active), "mayfly_x", 40, None),
        (&other, Some(State::Active), "mayfly_x", 90, None),
        // A settled lease has no account. If an account is found, it is ended.
        (
            &other,
            Some(State::Failed),
            "mayfly_x",
            90,
            Some(Some(("settled_in_store", Remedy::EndAccount))),
        ),
    ];
    for (pool, state, name, end, expected) in table {
        let known = state.map(lease);
        let compared = Compared::of(&found(name, end), known.as_ref(), &asked(pool));
        let difference = compared.as_ref().map(|compared| compared.difference);
        assert_eq!(difference, expected, "{pool} {state:?} {name} {end}");
        // Only the lease's own role shows that its account exists.
        let is_there = compared.is_some_and(|compared| compared.lease.is_some());
        let expected = state.is_some() && name == "mayfly_x" && expected.is_some();
        assert_eq!(is_there, expected, "{pool} {state:?} {name} {end}");
    }
}

/// A role of another installation belongs to that installation, even if its comment names a lease of this one.
#[test]
fn a_role_of_another_installation_proves_nothing_about_a_lease() {
    let pool = "pool1".parse().unwrap();
    let known = lease(State::Active);
    // The other installation may be slow: the role is ended only after five times the grace.
    for (end, owns, expected) in [
        (60, false, None),
        (45, false, Some(("other_installation", Remedy::Nothing))),
        (0, false, Some(("other_installation", Remedy::EndAccount))),
        (0, true, Some(("other_installation", Remedy::Nothing))),
    ] {
        let role = LedgerRole {
            installation: "00000000-0000-4000-8000-000000000002".parse().unwrap(),
            owns,
            ..found("mayfly_x", end)
        };
        let compared = Compared::of(&role, None, &asked(&pool)).unwrap();
        assert_eq!(compared.difference, expected, "{end} {owns}");
        let compared = Compared::of(&role, Some(&known), &asked(&pool)).unwrap();
        assert!(compared.lease.is_none());
        let remedy = compared.difference.map(|(_, remedy)| remedy);
        assert!(
            matches!(remedy, None | Some(Remedy::Nothing)),
            "{end} {owns}"
        );
    }
}

/// The lease has no account on its server.
#[test]
fn only_an_active_lease_of_this_server_lacks_its_account() {
    for (state, made_on, expected) in [
        (State::Active, Some("here"), true),
        // The engine that made the account did not report the server.
        (State::Active, None, true),
        (State::Active, Some("before"), false),
        (State::Pending, Some("here"), false),
        (State::Revoking, Some("here"), false),
        (State::Revoked, Some("here"), false),
        (State::Failed, None, false),
    ] {
        let mut lease = lease(state);
        lease.status.server = made_on.map(str::to_owned);
        assert_eq!(
            lacks_account(&lease, "here"),
            expected,
            "{state:?} {made_on:?}"
        );
    }
}
