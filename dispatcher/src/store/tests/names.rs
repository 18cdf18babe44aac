//! Secrets, pools and tokens: names that resolve, what must stay, keys side by side.

use super::*;

#[tokio::test]
async fn names_are_resolved_and_what_is_needed_stays() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    add(&store, "plain", json!({}), json!({})).await.unwrap();
    for (linked, pool, field) in [
        ("nobody", "pool1", "attributes.linkConfig.linkedSecret"),
        ("plain", "pool1", "attributes.linkConfig.linkedSecret"),
        ("db:dyn", "pool1", "attributes.linkConfig.linkedSecret"),
        ("db:root", "pool2", "attributes.pool"),
    ] {
        match add(&store, "db:other", dynamic(linked, pool), json!({})).await {
            Err(StoreError::Invalid(problems)) => {
                assert_eq!(problems.keys().next().unwrap(), field)
            }
            other => panic!("{linked} {pool}: {other:?}"),
        }
    }
    assert!(matches!(
        add(&store, "db:dyn", json!({}), json!({})).await,
        Err(StoreError::Exists(_))
    ));
    assert!(matches!(
        store.delete_secret("db:root".parse().unwrap()).await,
        Err(StoreError::InUse(_))
    ));
    assert!(matches!(
        store.delete_pool("pool1".parse().unwrap(), at(100)).await,
        Err(StoreError::InUse(_))
    ));
    let read = store.read_secret("db:dyn".parse().unwrap()).await.unwrap();
    assert_eq!(read.base.unwrap().target.password.expose(), "hunter2");
    let log = directory.path().join("data/mayfly.db-wal");
    if log.exists() {
        let file = std::fs::read(log).unwrap();
        assert!(
            !file.windows(7).any(|bytes| bytes == b"hunter2"),
            "sealed at rest"
        );
    }
}

#[tokio::test]
async fn two_keys_of_a_pool_are_valid_side_by_side() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let name: mayfly_protocol::names::PoolName = "pool1".parse().unwrap();
    let old = store.pool(name.clone()).await.unwrap().public_key;
    let new = KeyPair::generate().public().clone();
    store
        .begin_key_rotation(name.clone(), new.clone(), 2)
        .await
        .unwrap();
    assert!(
        store
            .begin_key_rotation(name.clone(), new.clone(), 2)
            .await
            .is_err()
    );
    let both = store.pool(name.clone()).await.unwrap();
    assert_eq!(both.public_key, old);
    assert_eq!(both.keys(), [old.clone(), new.clone()]);
    let after = store.end_key_rotation(name.clone(), true).await.unwrap();
    assert_eq!(after.public_key, new);
    assert_eq!(after.keys(), [new], "the old key is of no use any more");
    assert_eq!(after.dispatcher_generation, 2);
    assert!(store.end_key_rotation(name, true).await.is_err());
}

#[tokio::test]
async fn an_expired_token_is_forgotten_after_a_week() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let token = |id: &str, end: i64| tokens::Token {
        id: id.to_owned(),
        read: vec!["db:*".parse().unwrap()],
        created: at(0),
        expiration: at(end),
        max_leases: None,
    };
    for (id, end) in [("early", 10), ("late", 1_000)] {
        let secret = Secret::new(format!("secret of {id}"));
        store.create_token(token(id, end), &secret).await.unwrap();
    }
    let week = 7 * 86_400;
    let kept = async || {
        let found = store.tokens(String::new(), 10).await.unwrap();
        found.into_iter().map(|token| token.id).collect::<Vec<_>>()
    };
    store.forget(at(week + 9), HISTORY).await.unwrap();
    assert_eq!(kept().await, ["early", "late"]);
    store.forget(at(week + 11), HISTORY).await.unwrap();
    assert_eq!(kept().await, ["late"]);
    // The root token has no end.
    store.forget(at(100 * week), HISTORY).await.unwrap();
    assert!(kept().await.is_empty());
}
