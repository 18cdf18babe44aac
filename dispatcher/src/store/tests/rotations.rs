//! Changes of an admin's password: how the new password is recorded beside the old one, and which pool last reached
//! the server.

use super::*;

fn opening(version: u64) -> Opening {
    Opening {
        path: "db:root".parse().unwrap(),
        version,
        password: Secret::new("another"),
        pool: "pool1".parse().unwrap(),
        who: "root".to_owned(),
        started: at(0),
        settles_at: at(30),
        over_there: at(40),
    }
}

fn patched(
    field: &'static str,
    value: &'static str,
) -> impl FnOnce(Content) -> Result<Revised, crate::error::Problems> + Send + 'static {
    move |mut content| {
        content.data.insert(field.to_owned(), json!(value));
        let spec = secrets::parse(&content, 86_400)?;
        Ok(Revised { content, spec })
    }
}

#[tokio::test]
async fn a_rotation_stands_beside_the_old_password_until_it_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let path = || "db:root".parse().unwrap();
    let in_use = |done: Result<(), StoreError>| matches!(done, Err(StoreError::InUse(_)));
    assert!(
        in_use(store.open_rotation(opening(7)).await),
        "another version"
    );
    let twin = json!({"type": "postgresql"});
    add(&store, "db:twin", twin, base_data()).await.unwrap();
    assert!(
        in_use(store.open_rotation(opening(1)).await),
        "another's admin too"
    );
    store
        .delete_secret("db:twin".parse().unwrap())
        .await
        .unwrap();
    store.open_rotation(opening(1)).await.unwrap();
    assert!(in_use(store.open_rotation(opening(1)).await));

    // Until then the old password is in use.
    let base = store.base(path()).await.unwrap();
    assert_eq!(base.target.password.expose(), "hunter2");
    assert_eq!(base.linked.len(), 1);
    let open = store.rotations().await.unwrap();
    assert_eq!(open.len(), 1);
    assert_eq!(open[0].target.password.expose(), "hunter2");
    assert_eq!(open[0].password.expose(), "another");
    assert_eq!(open[0].pools[0].name.as_str(), "pool1");
    let update = async |field, value, second| {
        let done =
            store.update_secret(path(), patched(field, value), "root".to_owned(), at(second));
        done.await.map(drop)
    };
    assert!(in_use(update("host", "elsewhere", 31).await));
    assert!(in_use(update("password", "by hand", 29).await));
    assert!(matches!(
        store.delete_pool("pool1".parse().unwrap(), at(100)).await,
        Err(StoreError::InUse(_))
    ));

    let settles_at = open[0].settles_at;
    // The answer about an earlier rotation does not count for this rotation.
    let other = store.commit_rotation(path(), at(7), at(5)).await;
    assert!(other.unwrap().is_none());
    let record = store
        .commit_rotation(path(), settles_at, at(5))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((record.version, record.last_modified), (2, at(5)));
    let base = store.base(path()).await.unwrap();
    assert_eq!(base.target.password.expose(), "another");
    assert!(store.rotations().await.unwrap().is_empty());
    assert!(
        store
            .commit_rotation(path(), settles_at, at(6))
            .await
            .unwrap()
            .is_none()
    );

    // A rotation that did not happen leaves nothing.
    store.open_rotation(opening(2)).await.unwrap();
    let drop_it = async |settles_at| {
        let dropped = store
            .drop_rotation("db:root".to_owned(), settles_at, at(31))
            .await;
        dropped.unwrap()
    };
    assert!(!drop_it(at(7)).await, "that is another");
    assert!(drop_it(settles_at).await);
    assert!(!drop_it(settles_at).await);
    // If the password in force cannot be found out, an update of the password by the operator ends the rotation.
    store.open_rotation(opening(2)).await.unwrap();
    update("password", "by hand", 31).await.unwrap();
    assert!(store.rotations().await.unwrap().is_empty());
    let base = store.base(path()).await.unwrap();
    assert_eq!(base.target.password.expose(), "by hand");
}

#[tokio::test]
async fn a_base_secret_remembers_the_pool_that_reached_its_server() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let path = || "db:root".parse().unwrap();
    assert!(store.base(path()).await.unwrap().last.is_none());
    store
        .delete_secret("db:dyn".parse().unwrap())
        .await
        .unwrap();
    let base = store.base(path()).await.unwrap();
    assert!(base.linked.is_empty());
    assert_eq!(base.last.unwrap().name.as_str(), "pool1");
    store
        .delete_pool("pool1".parse().unwrap(), at(100))
        .await
        .unwrap();
    assert!(store.base(path()).await.unwrap().last.is_none());
    store.delete_secret(path()).await.unwrap();
    let missing = store.base("db:dyn".parse().unwrap()).await;
    assert!(matches!(missing, Err(StoreError::NotFound(_))));
}

#[tokio::test]
async fn both_passwords_are_kept_until_a_lease_was_made() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let path = || "db:root".parse().unwrap();
    let base = |version| BaseRef {
        id: "db:root".to_owned(),
        version,
    };
    // The password that is kept beside the present one, after the present one was refused.
    let doubted = async |version| {
        store.doubt_password(base(version), at(60)).await.unwrap();
        let found = store.doubts().await.unwrap();
        found.first().map(|one| one.password.expose().to_owned())
    };
    assert_eq!(doubted(1).await, None, "nothing is kept");
    store.open_rotation(opening(1)).await.unwrap();
    let changed = store.commit_rotation(path(), at(30), at(5)).await.unwrap();
    assert_eq!(changed.unwrap().version, 2);
    assert_eq!(doubted(1).await, None, "refused with the earlier one");
    assert_eq!(doubted(2).await.as_deref(), Some("hunter2"));
    let settle = async |version, other| {
        let settled = store.settle_doubt(path(), version, other, at(61)).await;
        settled.unwrap().map(|record| record.version)
    };
    // The server was unreachable for another reason.
    assert_eq!(settle(2, false).await, None);
    assert!(store.doubts().await.unwrap().is_empty());
    assert_eq!(doubted(2).await.as_deref(), Some("hunter2"));
    assert_eq!(settle(1, true).await, None, "of an answer that is too late");
    assert_eq!(settle(2, true).await, Some(3));
    let target = store.base(path()).await.unwrap().target;
    assert_eq!(target.password.expose(), "hunter2");
    assert!(store.doubts().await.unwrap().is_empty());
    assert_eq!(doubted(3).await.as_deref(), Some("another"), "and back");

    let made = async |n: i64, version| {
        let lease = Lease {
            id: LeaseId::random(),
            base: base(version),
            created: at(n),
            ..lease()
        };
        let conditions = Conditions::default();
        store.admit(lease.clone(), conditions, at(n)).await.unwrap();
        let created = Created {
            expiration: at(n + 60),
            server: "s".to_owned(),
            warnings: Vec::new(),
        };
        let event = Event::Created(created, "e1".parse().unwrap());
        store.apply(lease.id, event, at(n)).await.unwrap();
    };
    made(62, 2).await;
    made(60, 3).await;
    assert!(
        doubted(3).await.is_some(),
        "another version, or begun before"
    );
    made(62, 3).await;
    assert_eq!(doubted(3).await, None, "its password is in force");

    // A change that did not happen leaves its password too.
    store.open_rotation(opening(3)).await.unwrap();
    let dropped = store
        .drop_rotation("db:root".to_owned(), at(30), at(70))
        .await;
    assert!(dropped.unwrap());
    assert_eq!(doubted(3).await.as_deref(), Some("another"));
    // An update of the password by the operator ends this doubt.
    let by_hand = patched("password", "by hand");
    let done = store.update_secret(path(), by_hand, "root".to_owned(), at(71));
    done.await.unwrap();
    assert_eq!(doubted(4).await, None);
}
