//! Which reads get a lease of their own, which get an existing lease, and which get none.

use super::*;

#[tokio::test]
async fn quotas_are_exact_and_say_when_a_place_frees_up() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let conditions = || Conditions {
        most_of_secret: Some(3),
        most_of_secret_and_caller: Some(2),
        ..Conditions::default()
    };
    let by = |who: &str| Lease {
        created_by: who.to_owned(),
        ..lease()
    };
    let many = (0..8).map(|_| store.admit(by("a"), conditions(), at(0)));
    let placed = futures_util::future::join_all(many).await;
    assert_eq!(placed.iter().filter(|placed| placed.is_ok()).count(), 2);
    let Err(StoreError::Quota { message, until }) =
        placed.into_iter().find(Result::is_err).unwrap()
    else {
        panic!("another error");
    };
    assert!(
        message.starts_with("maxLeasesPerCaller of `db:dyn`: 2 of 2"),
        "{message}"
    );
    assert_eq!(until, Some(at(60)));
    let third = by("b");
    store
        .admit(third.clone(), conditions(), at(0))
        .await
        .unwrap();
    let refused = store.admit(by("c"), conditions(), at(0)).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("maxLeases of `db:dyn`: 3 of 3")
    );
    store
        .apply(third.id, Event::NothingMade, at(1))
        .await
        .unwrap();
    store.admit(by("c"), conditions(), at(0)).await.unwrap();
    let of_token = Conditions {
        most_of_caller: Some(1),
        ..Conditions::default()
    };
    let refused = store.admit(by("c"), of_token, at(0)).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("maxLeases of this token: 1 of 1")
    );
}

#[tokio::test]
async fn a_read_of_the_same_name_finds_its_lease() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let named = |key: &str| Conditions {
        key: Some(key.to_owned()),
        ..Conditions::default()
    };
    let first = lease();
    let place =
        async |lease: Lease, key: &str| store.admit(lease, named(key), at(0)).await.unwrap();
    assert_eq!(place(first.clone(), "k").await, Admission::New);
    assert_eq!(place(lease(), "k").await, Admission::Known(first.id));
    assert_eq!(place(lease(), "l").await, Admission::New);
    let stranger = Lease {
        created_by: "somebody".to_owned(),
        ..lease()
    };
    assert_eq!(
        place(stranger, "k").await,
        Admission::New,
        "keys are a caller's own"
    );
    // Nobody got a credential, so the read begins again.
    store.apply(first.id, Event::GivenUp, at(31)).await.unwrap();
    let second = lease();
    assert_eq!(place(second.clone(), "k").await, Admission::New);
    store.apply(second.id, created(), at(0)).await.unwrap();
    store
        .apply(second.id, Event::RevokeAsked, at(2))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), "k").await,
        Admission::Known(second.id),
        "somebody got one"
    );
}

#[tokio::test]
async fn a_shared_lease_is_the_callers_own_and_lives_long_enough() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let shared = || Conditions {
        share_for: Some(std::time::Duration::from_secs(30)),
        ..Conditions::default()
    };
    let first = lease();
    let place =
        async |lease: Lease, second: i64| store.admit(lease, shared(), at(second)).await.unwrap();
    let short = Lease {
        ttl_seconds: 29,
        ..lease()
    };
    assert_eq!(place(short, 0).await, Admission::New);
    assert_eq!(
        place(first.clone(), 0).await,
        Admission::New,
        "the other will not live for long enough"
    );
    let trial = Lease {
        secret_version: lease::NOBODYS_VERSION,
        ..lease()
    };
    let placed = store.admit(trial, Conditions::default(), at(0)).await;
    assert_eq!(placed.unwrap(), Admission::New);
    assert_eq!(
        place(lease(), 0).await,
        Admission::Known(first.id),
        "also while it is made, and none that is made for trial"
    );
    let doubtful = lease();
    let placed = store
        .admit(doubtful.clone(), Conditions::default(), at(0))
        .await;
    assert_eq!(placed.unwrap(), Admission::New);
    store
        .apply(doubtful.id, Event::MaybeHeld, at(0))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), 0).await,
        Admission::Known(first.id),
        "not one that no engine is known to have made"
    );
    store.apply(first.id, created(), at(0)).await.unwrap();
    assert_eq!(place(lease(), 30).await, Admission::Known(first.id));
    let stranger = Lease {
        created_by: "somebody".to_owned(),
        ..lease()
    };
    assert_eq!(place(stranger, 0).await, Admission::New);
    let changed = Lease {
        secret_version: 2,
        ..lease()
    };
    assert_eq!(
        place(changed, 0).await,
        Admission::New,
        "its grants may be others"
    );
    let later = lease();
    assert_eq!(
        place(later.clone(), 31).await,
        Admission::New,
        "too little life is left"
    );
    store.apply(later.id, created(), at(32)).await.unwrap();
    store
        .apply(later.id, Event::RevokeAsked, at(33))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), 30).await,
        Admission::Known(first.id),
        "not one that is revoked"
    );
}
