//! Leases, events and revocations for the tests of this crate and of the programs.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;

use crate::grant::OwnedObjects;
use crate::lease::{BaseRef, Event, Lease, State, Status};
use crate::names::{EngineName, InstallationId, LeaseId};
use crate::secret::Secret;
use crate::target::{SslMode, Target};
use crate::task::{Created, Failure, FailureCode, Revoke, RevokeMode};

/// A timestamp, in seconds after the creation of [`lease`].
pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

/// A lease that was created at 0 s; its create ends at 30 s, and absence is final at 54 s.
pub fn lease(state: State) -> Lease {
    let mut status = Status::begin(at(30));
    status.state = state;
    if matches!(state, State::Active | State::Revoking | State::Revoked) {
        status.expiration = Some(at(60));
        status.server = Some("here".to_owned());
    }
    if state.is_settled() {
        status.next_reconcile = None;
    }
    Lease {
        id: LeaseId::random(),
        path: "db:dyn".parse().unwrap(),
        pool: "pool1".parse().unwrap(),
        role: "mayfly_x".parse().unwrap(),
        base: BaseRef {
            id: "b".to_owned(),
            version: 1,
        },
        database: "app".to_owned(),
        owned_objects: OwnedObjects::Reassign,
        traceparent: String::new(),
        created: at(0),
        created_by: "root".to_owned(),
        secret_version: 1,
        ttl_seconds: 60,
        max_ttl_seconds: 600,
        create_deadline: at(30),
        status,
    }
}

/// The admin connection of a server.
pub fn target() -> Target {
    Target {
        host: "h".to_owned(),
        port: 1,
        database: "d".to_owned(),
        username: "u".to_owned(),
        password: Secret::new("p"),
        sslmode: SslMode::Disable,
        auth: Default::default(),
        channel_binding: None,
        sslrootcert: None,
        sslcert: None,
        sslkey: None,
    }
}

/// A revocation that is due at the account's end, and whose create can no longer commit.
pub fn revocation() -> Revoke {
    Revoke {
        lease: LeaseId::random(),
        installation: InstallationId::random(),
        target: target(),
        role: "r".parse().unwrap(),
        mode: RevokeMode::Expire,
        owned_objects: OwnedObjects::Reassign,
        server: None,
        place: None,
        window_ms: 0,
        copy: false,
        asked: false,
        reads_batches: true,
        others: vec![],
    }
}

/// The name of an engine.
pub fn engine() -> EngineName {
    "e1".parse().unwrap()
}

/// The account was made, and ends at 60 s.
pub fn created() -> Event {
    Event::Created(
        Created {
            expiration: at(60),
            server: "here".to_owned(),
            warnings: vec![],
        },
        engine(),
    )
}

/// An engine found the account gone on a server, at this second.
pub fn found_gone(server: &str, second: i64, conclusive: bool) -> Event {
    Event::Gone {
        at: at(second),
        server: server.to_owned(),
        by: engine(),
        conclusive,
        seen: at(second),
    }
}

/// The account ends at a second.
pub fn not_due(second: i64) -> Event {
    Event::NotDue {
        until: at(second),
        left: None,
    }
}

/// An operator detached the lease.
pub fn detached() -> Event {
    Event::Detached {
        by: "root".to_owned(),
    }
}

/// An engine found the account gone at 61 s, when its create could no longer commit.
pub fn gone(server: &str) -> Event {
    found_gone(server, 61, true)
}

/// A try to end the account failed.
pub fn failing(code: FailureCode) -> Event {
    Event::Failing {
        failure: Failure::new(code, "no"),
        attempts: 1,
        again: Some(Duration::from_secs(2)),
    }
}

/// Anything that can happen to a lease.
pub fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(created()),
        Just(Event::NothingMade),
        Just(Event::GivenUp),
        Just(Event::MaybeHeld),
        Just(Event::RevokeAsked),
        Just(Event::RetryAsked),
        Just(detached()),
        (0i64..500).prop_map(|second| Event::Renewed(at(second))),
        Just(gone("here")),
        Just(gone("there")),
        (0i64..99, any::<bool>()).prop_map(|(second, sure)| found_gone("here", second, sure)),
        (0i64..500).prop_map(not_due),
        Just(failing(FailureCode::DatabaseUnreachable)),
        Just(failing(FailureCode::ForeignRole)),
    ]
}
