//! Rows that an attacker forges for a purpose: to be root, to read a pool's tasks, to pass the store off as older.

use super::*;

/// The row that names the master key, and says whether an upgrade is in progress.
#[tokio::test]
async fn a_store_cannot_be_passed_off_as_an_older_one() {
    for (what, attack) in [
        ("deleted", "DELETE FROM meta WHERE key = 'sealing'"),
        (
            "no code",
            "UPDATE meta SET mac = NULL WHERE key = 'sealing'",
        ),
        (
            "an upgrade",
            "UPDATE meta SET value = CAST(value || ' upgrade 9000000000000' AS BLOB) WHERE key = 'sealing'",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let place = place(directory.path());
        let (store, _, lock) = Store::open(&place).unwrap();
        furnish(&store).await;
        let forge = "UPDATE pools SET public_key = 'forged', mac = NULL";
        let attack = attack.to_owned();
        store
            .run(move |connection| {
                connection.execute(&attack, NONE)?;
                connection.execute(forge, NONE)?;
                Ok(())
            })
            .await
            .unwrap();
        let refused = store.all_pools().await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{what}");
        store.close().await;
        drop(lock);
        match Store::open(&place) {
            Err(OpenError::Key { reason, .. }) => {
                assert!(
                    reason.contains("row `sealing` of the store's table `meta`"),
                    "{what}: {reason}"
                );
            }
            other => panic!("{what}: {:?}", other.map(|_| ())),
        }
    }
}

/// The attacks of the issue, by what they are after.
#[tokio::test]
async fn a_written_hash_is_no_token_and_a_written_key_no_pools() {
    let victim = Victim::new().await;
    let thiefs = Secret::new("a-token-of-the-thief-0123456789ab");
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, thiefs.expose().as_bytes());
    let hash = Cell::Blob(hash.as_ref().to_vec());
    let insert = "INSERT INTO tokens (id, hash, created) VALUES ('root2', ?1, 0)".to_owned();
    assert!(victim.attack(vec![(insert, vec![hash.clone()])]).await);
    assert!(victim.store.bearer(thiefs.clone()).await.unwrap().is_none());
    let delete = "DELETE FROM tokens WHERE id = 'root2'".to_owned();
    let update = "UPDATE tokens SET hash = ?1 WHERE id = 'root'".to_owned();
    assert!(
        victim
            .attack(vec![(delete, vec![]), (update, vec![hash])])
            .await
    );
    assert!(victim.store.bearer(thiefs).await.unwrap().is_none());

    let key = KeyPair::generate().public().to_base64();
    let update = "UPDATE pools SET public_key = ?1 WHERE name = 'pool1'".to_owned();
    assert!(victim.attack(vec![(update, vec![Cell::Text(key)])]).await);
    let refused = victim
        .store
        .pool("pool1".parse().unwrap())
        .await
        .unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("pools row pool1 is not authentic"),
        "{refused}"
    );
    let left = victim.store.all_pools().await.unwrap();
    assert_eq!(left.len(), 2, "the others stand");
    let issue = victim.store.read_secret("db:dyn".parse().unwrap()).await;
    assert!(matches!(issue, Err(StoreError::Unusable(_))), "{issue:?}");
    let other = victim.store.read_secret("db2:dyn".parse().unwrap()).await;
    assert!(other.is_ok(), "{other:?}");
}

/// A refused lease is not looked for in every turn of the reconciler.
#[tokio::test]
async fn a_refused_lease_is_put_off_and_harms_no_other() {
    let victim = Victim::new().await;
    let [ours, _] = &victim.leases[..] else {
        panic!("two leases")
    };
    let second = Lease {
        id: LeaseId::random(),
        role: "mayfly_9".parse().unwrap(),
        ..ours.clone()
    };
    let conditions = Conditions::default();
    victim
        .store
        .admit(second.clone(), conditions, at(0))
        .await
        .unwrap();
    let update = "UPDATE leases SET role = 'postgres' WHERE id = ?1".to_owned();
    let id = Cell::Text(ours.id.to_string());
    assert!(victim.attack(vec![(update, vec![id])]).await);
    let due = async |now| {
        let claimed = victim.store.claim_due(
            "pool1".parse().unwrap(),
            vec!["pool1".parse().unwrap()],
            1,
            now,
            0.0,
        );
        claimed.await.unwrap()
    };
    let mut claimed = Vec::new();
    for turn in 0..3 {
        claimed.extend(due(at(100_000 + turn)).await);
    }
    assert_eq!(claimed.len(), 1, "{claimed:?}");
    assert_eq!(claimed[0].lease.id, second.id);
    let next = format!("SELECT next_reconcile FROM leases WHERE id = '{}'", ours.id);
    let next = victim.rows(next).await;
    let minutes = at(100_000 + 300).as_millisecond();
    assert!(
        matches!(next[0][0], Cell::Int(next) if next >= minutes),
        "it is put off: {next:?}"
    );
}
