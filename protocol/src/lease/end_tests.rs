//! The end of a lease: renewals move it, and the database's clock may differ from the dispatcher's.

use super::*;
use crate::fixtures::*;

#[test]
fn renewals_move_the_end_forward_only() {
    let mut lease = lease(State::Pending);
    lease.status = next(&lease, created(), at(0)).status;
    assert_eq!(lease.renewable_until(), at(600), "counted from its making");
    for (event, end) in [
        (Event::Renewed(at(90)), 90),
        (Event::Renewed(at(80)), 90),
        (not_due(70), 90),
        (not_due(120), 120),
    ] {
        lease.status = next(&lease, event, at(50)).status;
        assert_eq!(lease.status.expiration, Some(at(end)));
        assert_eq!(
            lease.status.next_reconcile,
            Some(at(end) + timing().reconcile_grace)
        );
    }
}

#[test]
fn the_databases_clock_may_be_another() {
    for skew in [-3600, 0, 3600] {
        let mut lease = lease(State::Pending);
        let event = Event::Created(
            Created {
                expiration: at(1 + 60 + skew),
                server: "here".to_owned(),
                warnings: vec![],
            },
            engine(),
        );
        lease.status = next(&lease, event, at(1)).status;
        assert_eq!(lease.status.to_store_clock(at(61 + skew)), at(61));
        assert_eq!(
            lease.status.next_reconcile,
            Some(at(61) + timing().reconcile_grace)
        );
        lease.status = next(&lease, Event::Renewed(at(90 + skew)), at(50)).status;
        assert_eq!(
            lease.status.next_reconcile,
            Some(at(90) + timing().reconcile_grace)
        );
        // The clock was set right meanwhile.
        let event = Event::NotDue {
            until: at(100),
            left: Some(Duration::from_secs(30)),
        };
        lease.status.engine = None;
        lease.status = next(&lease, event, at(70)).status;
        assert_eq!(
            lease.status.next_reconcile,
            Some(at(100) + timing().reconcile_grace)
        );
    }
}

#[test]
fn a_date_that_is_cut_says_nothing_about_the_clock() {
    let (until, now) = (Timestamp::MAX, at(50));
    let left = until.duration_since(now).unsigned_abs();
    let event = Event::NotDue {
        until,
        left: Some(left),
    };
    let status = next(&lease(State::Active), event, now).status;
    assert_eq!(status.skew_ms, 0);
    assert!(status.expiration.unwrap() < until);
}
