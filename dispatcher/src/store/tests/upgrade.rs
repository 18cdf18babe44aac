//! A store of a version that did not authenticate its rows, and what becomes of it.

use super::*;
use crate::store::authentic::TABLES;
use crate::store::sealer::{FIRST_FORM, Sealing};
use crate::store::sql::NONE;
use crate::store::{keys, reseal};

/// Makes the store one of the previous version: sealed in the first form, without codes.
async fn made_older(store: &Store) {
    let older = store.run(|connection| {
        let older = Sealing {
            upgrade_until: Some(Timestamp::MAX),
            ..connection.sealing()?
        };
        reseal::all(connection, &older)?;
        for table in TABLES {
            connection.execute(&format!("UPDATE {} SET mac = NULL", table.name), NONE)?;
        }
        connection.execute("DELETE FROM meta WHERE key = 'sealing'", NONE)?;
        Ok(())
    });
    older.await.unwrap();
    store.close().await;
}

/// The form of every sealed secret, and how many rows have no code.
async fn forms(store: &Store) -> (Vec<u8>, u64) {
    let found = store.run(|connection| {
        let rows = connection.prepare("SELECT data FROM secrets ORDER BY id")?;
        let rows = rows.query(NONE)?;
        let forms = rows.iter().map(|row| Ok(row.get::<Vec<u8>>(0)?[0]));
        let without = "SELECT count(*) FROM secrets WHERE mac IS NULL";
        let without = connection.query_row(without, NONE, |row| row.get(0))?;
        Ok((forms.collect::<Result<_, StoreError>>()?, without))
    });
    found.await.unwrap()
}

/// What a dispatcher of the previous version writes.
async fn written_by_an_older(store: &Store, token: &str) -> Secret {
    let secret = Secret::new(format!("{token}-012345678901234567890123456789"));
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, secret.expose().as_bytes());
    let (token, hash) = (token.to_owned(), hash.as_ref().to_vec());
    let insert = store.run(move |connection| {
        connection.execute(
            "INSERT INTO tokens (id, hash, read, created, expiration) VALUES (?1, ?2, '[\"db:*\"]', 0, 9000000000000)",
            sql::params![token, hash],
        )?;
        Ok(())
    });
    insert.await.unwrap();
    secret
}

async fn is_token(store: &Store, token: &Secret) -> bool {
    store.bearer(token.clone()).await.unwrap().is_some()
}

#[tokio::test]
async fn an_older_store_is_upgraded() {
    let directory = tempfile::tempdir().unwrap();
    let place = tested(directory.path()).await;
    let (store, before, lock) = Store::open(&place).unwrap();
    furnish(&store).await;
    let earlier = written_by_an_older(&store, "earlier").await;
    assert!(
        !is_token(&store, &earlier).await,
        "a new store has no upgrade"
    );
    made_older(&store).await;
    drop(lock);
    assert!(
        finish_upgrade(&place).is_err(),
        "no dispatcher of this version started yet"
    );

    let (store, after, _lock) = Store::open(&place).unwrap();
    assert_eq!(before.installation, after.installation);
    assert!(is_token(&store, &earlier).await);
    let read = async |store: &Store| store.read_secret("db:dyn".parse().unwrap()).await;
    assert!(read(&store).await.is_ok());
    let later = written_by_an_older(&store, "later").await;
    let Backend::Postgres(_) = place.backend else {
        assert!(!is_token(&store, &later).await, "nobody else had it open");
        assert_eq!(forms(&store).await, (vec![2, 2], 0));
        return;
    };
    // Both versions write rows that the other version can read.
    let (another, ..) = Store::open(&place).unwrap();
    assert!(is_token(&store, &later).await && is_token(&another, &later).await);
    add(&another, "plain", json!({}), json!({})).await.unwrap();
    assert_eq!(forms(&store).await, (vec![FIRST_FORM; 3], 2));

    assert!(finish_upgrade(&place).unwrap());
    assert!(!finish_upgrade(&place).unwrap());
    for store in [&store, &another] {
        assert!(
            is_token(store, &later).await,
            "what was written until then counts"
        );
        assert!(read(store).await.is_ok());
        let late = written_by_an_older(store, "late").await;
        assert!(!is_token(store, &late).await);
        let delete = "DELETE FROM tokens WHERE id = 'late'";
        store
            .run(|connection| Ok(connection.execute(delete, NONE)?))
            .await
            .unwrap();
    }
    assert_eq!(forms(&store).await, (vec![2; 3], 0));
    assert!(Store::open(&place).is_ok());
}

#[tokio::test]
async fn an_upgrade_ends_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let place = tested(directory.path()).await;
    let Backend::Postgres(_) = place.backend else {
        return;
    };
    let (store, ..) = Store::open(&place).unwrap();
    furnish(&store).await;
    made_older(&store).await;
    let (store, ..) = Store::open(&place).unwrap();
    let (another, ..) = Store::open(&place).unwrap();
    // One row cannot be opened. This does not delay the end of the upgrade.
    let over = store.run(|connection| {
        connection.execute(
            "UPDATE secrets SET data = ?1 WHERE path = 'db:dyn'",
            [vec![1_u8; 40]],
        )?;
        let over = Sealing {
            upgrade_until: Some(connection.now()),
            ..connection.sealing()?
        };
        keys::record(connection, &over)
    });
    over.await.unwrap();
    for store in [&another, &store] {
        let late = written_by_an_older(store, "late").await;
        assert!(!is_token(store, &late).await);
        let delete = "DELETE FROM tokens WHERE id = 'late'";
        store
            .run(|connection| Ok(connection.execute(delete, NONE)?))
            .await
            .unwrap();
        let base = store.base("db:root".parse().unwrap()).await;
        assert!(
            matches!(base, Err(StoreError::Unusable(_))),
            "a pool of it is refused: {base:?}"
        );
        let root = store.describe_secret("db:root".parse().unwrap()).await;
        assert!(root.is_ok(), "{root:?}");
        let broken = store
            .describe_secret("db:dyn".parse().unwrap())
            .await
            .unwrap_err();
        assert!(
            broken
                .to_string()
                .contains("secrets row db:dyn is not authentic"),
            "{broken}"
        );
    }
}
