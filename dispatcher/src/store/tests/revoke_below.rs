//! The end of all leases below a path: in steps, recorded between them, and only of those that were meant.

use super::*;
use crate::store::sql::NONE;

async fn issued(store: &Store, second: i64, created_by: &str) -> LeaseId {
    let lease = Lease {
        id: LeaseId::random(),
        created: at(second),
        created_by: created_by.to_owned(),
        ..lease()
    };
    let conditions = Conditions::default();
    store.admit(lease.clone(), conditions, at(0)).await.unwrap();
    store.apply(lease.id, created(), at(0)).await.unwrap();
    lease.id
}

fn request(created_by: Option<&str>) -> RevokeBelow {
    let path = "db".parse().unwrap();
    let only = created_by.map(str::to_owned);
    RevokeBelow::new(path, only, "root".to_owned(), at(10))
}

async fn state(store: &Store, id: LeaseId) -> State {
    store.lease(id).await.unwrap().status.state
}

#[tokio::test]
async fn it_goes_on_from_what_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(issued(&store, 1, "root").await);
    }
    let later = issued(&store, 11, "root").await;
    let first = store.mark_below(request(None), 2, at(12)).await.unwrap();
    assert_eq!((first.count, first.access.len()), (2, 2));
    assert!(first.rest.is_some());
    // The process dies here. Another process finds what is left.
    let found = store.recorded_below().await.unwrap();
    assert_eq!(found, [first.rest.unwrap()]);
    let second = store.mark_below(found[0].clone(), 2, at(13)).await.unwrap();
    let third = store
        .mark_below(second.rest.unwrap(), 2, at(14))
        .await
        .unwrap();
    assert_eq!((second.count, third.count), (2, 1));
    assert!(third.rest.is_none());
    assert_eq!(store.recorded_below().await.unwrap(), []);
    for id in ids {
        assert_eq!(state(&store, id).await, State::Revoking);
    }
    assert_eq!(
        state(&store, later).await,
        State::Active,
        "it was not meant"
    );
    // The step is repeated, as after a crash between the commit and the message. It finds nothing.
    let again = store.mark_below(found[0].clone(), 2, at(15)).await.unwrap();
    assert!(again.count == 0 && again.rest.is_none());
}

#[tokio::test]
async fn it_is_for_the_leases_of_its_caller() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let own = issued(&store, 1, "t1").await;
    let others = issued(&store, 1, "t2").await;
    let marked = store
        .mark_below(request(Some("t1")), 9, at(12))
        .await
        .unwrap();
    assert_eq!(marked.count, 1);
    assert_eq!(state(&store, own).await, State::Revoking);
    assert_eq!(state(&store, others).await, State::Active);
}

/// The reconciler repeats the end of the thousandth lease later than that of the first.
#[tokio::test]
async fn an_end_is_repeated_when_its_turn_has_come() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    for _ in 0..3 {
        issued(&store, 1, "root").await;
    }
    let mut again = Vec::new();
    let mut rest = Some(request(None));
    while let Some(request) = rest.take() {
        let marked = store.mark_below(request, 1, at(12)).await.unwrap();
        rest = marked.rest;
        again.extend(
            marked
                .access
                .iter()
                .map(|one| one.lease.status.next_reconcile),
        );
    }
    assert!(again.is_sorted() && again[0] < again[2], "{again:?}");
}

/// With the broker away the reconciler sends the first message: for the last of many leases as soon as for one.
#[tokio::test]
async fn the_end_of_the_last_lease_does_not_wait_longer_than_ten_seconds() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    for _ in 0..2 {
        issued(&store, 1, "root").await;
    }
    let first = store.mark_below(request(None), 1, at(12)).await.unwrap();
    let mut rest = first.rest.clone().unwrap();
    rest.set_marked(1_000_000);
    let last = store.mark_below(rest, 1, at(12)).await.unwrap();
    let again = |marked: &Marked| marked.access[0].lease.status.next_reconcile.unwrap();
    let later = again(&last).duration_since(again(&first));
    assert_eq!(later, jiff::SignedDuration::from_secs(10));
}

/// Who can write the store makes rows of leases useless. They are passed over, and hold up no other.
#[tokio::test]
async fn rows_that_were_changed_hold_up_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(issued(&store, 1, "root").await);
    }
    ids.sort();
    for bent in &ids[..3] {
        let sql = format!("UPDATE leases SET database = 'another' WHERE id = '{bent}'");
        store
            .run(move |connection| Ok(connection.execute(&sql, NONE)?))
            .await
            .unwrap();
    }
    let mut rest = Some(request(None));
    let mut steps = 0;
    while let Some(request) = rest.take() {
        rest = store.mark_below(request, 1, at(12)).await.unwrap().rest;
        steps += 1;
        assert!(steps <= 5, "it does not end");
    }
    assert_eq!(state(&store, ids[3]).await, State::Revoking);
}

/// The same for the leases of one path, as at the deletion of its secret.
#[tokio::test]
async fn rows_that_were_changed_hold_up_no_others_of_their_path() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(issued(&store, 1, "root").await);
    }
    ids.sort();
    for bent in &ids[..3] {
        let sql = format!("UPDATE leases SET database = 'another' WHERE id = '{bent}'");
        store
            .run(move |connection| Ok(connection.execute(&sql, NONE)?))
            .await
            .unwrap();
    }
    let (mut next, mut count, mut refused) = (Some(String::new()), 0, 0);
    while let Some(after) = next {
        let path = "db:dyn".parse().unwrap();
        let some = store.end_some(path, OfState::Live, Event::RevokeAsked, after, 2, at(12));
        let some = some.await.unwrap();
        (count, refused) = (count + some.count, refused + some.refused);
        next = some.after;
    }
    assert_eq!((count, refused), (2, 3));
    assert_eq!(state(&store, ids[3]).await, State::Revoking);
    assert_eq!(state(&store, ids[4]).await, State::Revoking);
}

/// Who can write the store plants a request, and copies a recorded one to another key: neither is carried out.
#[tokio::test]
async fn a_planted_request_is_not_carried_out() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    for _ in 0..2 {
        issued(&store, 1, "root").await;
    }
    let recorded = store.mark_below(request(None), 1, at(12)).await.unwrap();
    let planted = serde_json::to_string(&request(None)).unwrap();
    let bytes = match store.slots.is_some() {
        true => format!("decode('{}', 'hex')", hex(planted.as_bytes())),
        false => format!("x'{}'", hex(planted.as_bytes())),
    };
    let texts = [
        format!("INSERT INTO meta (key, value) VALUES ('revoke-below:planted', {bytes})"),
        "INSERT INTO meta (key, value, mac) SELECT 'revoke-below:copied', value, mac FROM meta WHERE key LIKE 'revoke-below:%' AND mac IS NOT NULL".to_owned(),
    ];
    for sql in texts {
        store
            .run(move |connection| Ok(connection.execute(&sql, NONE)?))
            .await
            .unwrap();
    }
    let found = store.recorded_below().await.unwrap();
    assert_eq!(found, [recorded.rest.unwrap()]);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
