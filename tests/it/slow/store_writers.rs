//! An attacker who can write the store but has not the master key; and the two remedies after a leak: another root
//! token, another master key. With running dispatchers, and killed at each step.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mayfly_tests::liar::Liar;
use mayfly_tests::postgres::{Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;

/// A master key: 32 bytes, each a 7.
const ANOTHER: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";

/// A dispatcher with a store in PostgreSQL, and the name of its database.
async fn in_postgresql(settings: &[(&str, &str)]) -> (System, String) {
    let url = Server::pg15().store().await;
    let database = url.rsplit('/').next().unwrap().split('?').next().unwrap();
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, &url).unwrap();
    let mut all = vec![("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())];
    all.extend_from_slice(settings);
    let system = System::start_with(Rabbit::shared(), &all).await;
    (system, database.to_owned())
}

async fn furnished(system: &System) -> (Site, String, Engine) {
    let scenario = Scenario::on(Server::pg15()).attributes(json!({"share": true}));
    scenario.start_in(system).await
}

/// The store's owner writes a token, a pool's key and a lease's role.
#[tokio::test]
async fn the_stores_owner_is_not_root() {
    let (system, database) = in_postgresql(&[]).await;
    let owner = Server::pg15().superuser(&database).await;
    let (site, path, _engine) = furnished(&system).await;
    let pool = system.pool().await;
    let attacked = system.secret(&site, &pool, json!({})).await;
    let lease = system.issue(&path, Some(120)).await;

    let thiefs = system.api.with_token("a-token-of-the-thief-0123456789ab");
    let hash = "sha256('a-token-of-the-thief-0123456789ab'::bytea)";
    owner
        .batch_execute(&format!(
            "INSERT INTO tokens (id, hash, read, created, expiration) \
             SELECT 'thief', {hash}, '[\"*\"]', 0, 9000000000000"
        ))
        .await
        .unwrap();
    assert_eq!(thiefs.get("/v1/pools").await.0, 401);
    let (status, answer) = system.api.get("/v1/tokens/thief").await;
    assert_eq!(
        (status, &answer["error"]),
        (503, &json!("store_unavailable")),
        "{answer}"
    );
    owner
        .batch_execute(&format!(
            "DELETE FROM tokens WHERE id = 'thief'; \
             CREATE TABLE kept AS SELECT * FROM tokens WHERE id = 'root'; \
             UPDATE tokens SET hash = {hash} WHERE id = 'root'"
        ))
        .await
        .unwrap();
    assert_eq!(thiefs.get("/v1/pools").await.0, 401);
    owner
        .batch_execute("UPDATE tokens SET hash = (SELECT hash FROM kept) WHERE id = 'root'")
        .await
        .unwrap();

    // Without the check, tasks for this pool, with admins' passwords, would be sealed to the thief's key.
    owner
        .execute(
            "UPDATE pools SET public_key = $1 WHERE name = $2",
            &[&ANOTHER, &pool],
        )
        .await
        .unwrap();
    let (status, answer) = system.api.get(&format!("/v1/secrets/{attacked}")).await;
    assert_eq!(
        (status, &answer["error"]),
        (503, &json!("store_unavailable")),
        "{answer}"
    );
    // Outcomes of that pool cannot be read. No outcome of another pool waits behind them.
    let rogue = Liar::new(system.rabbit.url(), &system.key_file(&pool));
    for _ in 0..300 {
        rogue.outcome(&lease.lease, None, json!("absent")).await;
    }
    // Without the check, the role that a changed lease names would be ended.
    owner
        .execute(
            "UPDATE leases SET role = 'postgres', next_reconcile = 0 WHERE id = $1",
            &[&lease.lease],
        )
        .await
        .unwrap();
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", lease.lease))
        .await;
    assert_eq!(status, 503);

    // Other secrets still work.
    let other = system.issue(&path, Some(30)).await;
    assert_ne!(
        other.lease, lease.lease,
        "a refused lease is shared with nobody"
    );
    system.gone(&site, &other, seconds(45)).await;
    system
        .lease_becomes(&other.lease, "revoked", seconds(30))
        .await;
    let (status, compared) = system
        .api
        .post("/v1/leases/reconcile", json!({"dryRun": true}))
        .await;
    assert_eq!(status, 200, "{compared}");
    eventually("the refusals are counted", seconds(10), async || {
        let text = system.admin_text("/metrics").await;
        ["tokens", "pools", "leases"]
            .iter()
            .all(|table| {
                let of =
                    format!("mayfly_dispatcher_store_rows_refused_total{{table=\"{table}\"}} ");
                text.lines()
                    .any(|line| line.strip_prefix(&of).is_some_and(|count| count != "0"))
            })
            .then_some(())
    })
    .await;
    let log = std::fs::read_to_string(system.log()).unwrap();
    for row in [
        "tokens row thief",
        "tokens row root",
        &format!("pools row {pool}"),
    ] {
        assert!(log.contains(&format!("{row} is not authentic")), "{row}");
    }
}

fn new_root_token(system: &System, file: &Path) -> bool {
    let made = system.local(&["--new-root-token", file.to_str().unwrap()], &[]);
    made.status.success()
}

/// Every dispatcher refuses the old root token within a second.
async fn root_token(systems: &mut [&mut System]) {
    let old = systems[0].api.token.clone();
    let file = run_dir().join(format!("root-token-{}", word()));
    std::fs::write(&file, "there").unwrap();
    assert!(!new_root_token(systems[0], &file), "a file that exists");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "there");
    let link = run_dir().join(format!("link-{}", word()));
    std::os::unix::fs::symlink(run_dir().join("nowhere"), &link).unwrap();
    assert!(!new_root_token(systems[0], &link), "a link");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(
        systems[0].api.get("/v1/pools").await.0,
        200,
        "nothing is changed"
    );

    assert!(new_root_token(systems[0], &file));
    let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let new = std::fs::read_to_string(&file).unwrap().trim().to_owned();
    for system in systems {
        system.api = system.api.with_token(&new);
        assert_eq!(system.api.get("/v1/pools").await.0, 200);
        let before = system.api.with_token(&old);
        eventually("the old one is refused", seconds(1), async || {
            (before.get("/v1/pools").await.0 == 401).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn the_root_token_is_replaced_beside_a_dispatcher() {
    let mut system = System::start().await;
    root_token(&mut [&mut system]).await;
    system.kill_dispatcher();
    system.start_dispatcher().await;
    assert_eq!(system.api.get("/v1/pools").await.0, 200);
}

#[tokio::test]
async fn the_root_token_is_replaced_beside_two_dispatchers() {
    let (mut one, _) = in_postgresql(&[]).await;
    let mut two = one.beside(&[]);
    two.ready().await;
    root_token(&mut [&mut one, &mut two]).await;
}

/// Whether the store opens with the key in this file alone.
fn opens_with(system: &System, key: &str) -> bool {
    let alone = run_dir().join(format!("key-{}", word()));
    std::fs::write(&alone, key).unwrap();
    let settings = [
        ("MAYFLY__SEAL__KEY_FILE", alone.to_str().unwrap()),
        ("MAYFLY__SEAL__NEXT_KEY_FILE", "/nowhere"),
    ];
    system
        .local(&["--finish-upgrade"], &settings)
        .status
        .success()
}

/// Killed at any step, the store opens with exactly one of the two keys, and a start finds it.
#[tokio::test]
async fn a_renewal_of_the_master_key_is_killed() {
    let mut system = System::start().await;
    let (_site, path, _engine) = furnished(&system).await;
    let fault = run_dir().join(format!("fault-{}", word()));
    let armed = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let lease = system.issue(&path, Some(300)).await;
    let key = system.directory.join("data/master-key");
    let read = |file: &Path| std::fs::read_to_string(file).ok();
    for (step, is_renewed) in [
        ("rekey.key_written", false),
        ("rekey.resealed", false),
        ("rekey.committed", true),
        ("rekey.renamed", true),
    ] {
        let old = read(&key).unwrap();
        std::fs::write(&fault, format!("{step} kill")).unwrap();
        assert!(!system.try_rekey(&["master"], &armed).status.success());
        assert!(!fault.exists(), "{step} is not reached");
        // The running dispatcher continues, with the key in force.
        let again = system.issue(&path, Some(300)).await;
        assert_eq!(
            (&again.lease, &again.password),
            (&lease.lease, &lease.password),
            "{step}"
        );
        let next = read(&PathBuf::from(format!("{}.next", key.display())));
        let new = next.or_else(|| read(&key)).unwrap();
        assert_ne!(new, old, "{step}");
        assert_eq!(opens_with(&system, &new), is_renewed, "{step}");
        assert_eq!(opens_with(&system, &old), !is_renewed, "{step}");
        system.kill_dispatcher();
        system.start_dispatcher().await;
        system.broker_up().await;
        let kept = read(&key).unwrap();
        assert_eq!(kept, if is_renewed { new } else { old }, "{step}");
        let again = system.issue(&path, Some(300)).await;
        assert_eq!(again.password, lease.password, "{step}");
        assert!(again.login().await.is_ok(), "{step}");
    }
    // Files that were left behind do no harm.
    system.rekey(&["master"]);
    assert_eq!(
        system.issue(&path, Some(300)).await.password,
        lease.password
    );
}

/// While it is renewed, every read is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_master_key_is_renewed_under_load() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15()).start().await;
    let handle = tokio::runtime::Handle::current();
    let (enough, renewals) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut issued = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    system.rekey(&["master"]);
                    renewals.fetch_add(1, Ordering::Relaxed);
                    // SQLite does not queue writers. Without a pause the dispatcher might never have its turn.
                    std::thread::sleep(std::time::Duration::from_millis(300));
                }
            });
            // A failed read must not leave the other thread running: the scope would wait for it for ever.
            let issued = catch_unwind(AssertUnwindSafe(|| {
                let mut issued = Vec::new();
                while issued.len() < 15
                    || (renewals.load(Ordering::Relaxed) < 3 && issued.len() < 200)
                {
                    issued.push(handle.block_on(system.issue(&path, Some(20))));
                }
                issued
            }));
            enough.store(true, Ordering::Relaxed);
            issued.unwrap_or_else(|panic| resume_unwind(panic))
        })
    });
    let renewals = renewals.into_inner();
    assert!(renewals > 1, "{renewals}");
    issued.push(system.issue(&path, Some(20)).await);
    for credential in &issued {
        system.gone(&site, credential, seconds(40)).await;
    }
    let text = system.admin_text("/metrics").await;
    let refused = text
        .lines()
        .filter(|line| line.starts_with("mayfly_dispatcher_store_rows_refused_total"))
        .any(|line| !line.ends_with(" 0"));
    assert!(!refused, "{text}");
}

/// Several dispatchers with key files of their own: the next key is distributed, the store is resealed, and the
/// earlier key is removed.
#[tokio::test]
async fn a_master_key_that_is_handed_out_is_taken_up_by_all() {
    let file = |what: &str| run_dir().join(format!("{what}-{}", word()));
    let (next, copy, late) = (file("next"), file("copy"), file("late"));
    std::fs::write(&next, ANOTHER).unwrap();
    let (one, _) = in_postgresql(&[("MAYFLY__SEAL__NEXT_KEY_FILE", next.to_str().unwrap())]).await;
    let own = one.directory.join("data/master-key");
    let old = std::fs::read_to_string(&own).unwrap();
    std::fs::write(&copy, &old).unwrap();
    let mut two = one.beside(&[
        ("MAYFLY__SEAL__KEY_FILE", copy.to_str().unwrap()),
        ("MAYFLY__SEAL__NEXT_KEY_FILE", late.to_str().unwrap()),
    ]);
    two.ready().await;
    two.broker_up().await;
    let (_site, path, _engine) = furnished(&one).await;
    let lease = one.issue(&path, Some(300)).await;

    one.rekey(&["master"]);
    assert_eq!(one.issue(&path, Some(300)).await.password, lease.password);
    assert_eq!(
        std::fs::read_to_string(&own).unwrap(),
        old,
        "no file is touched"
    );
    assert!(!opens_with(&one, &old) && opens_with(&one, ANOTHER));
    // A dispatcher that did not get the key reports that, and continues as soon as it has the key.
    eventually("it misses the key", seconds(10), async || {
        let (status, _) = two.api.get("/v1/pools").await;
        (status == 503).then_some(())
    })
    .await;
    std::fs::write(&late, ANOTHER).unwrap();
    eventually("it has the key", seconds(10), async || {
        let (status, _) = two.api.get("/v1/pools").await;
        (status == 200).then_some(())
    })
    .await;
    assert_eq!(two.issue(&path, Some(300)).await.password, lease.password);
    // The new key replaces the old key.
    std::fs::rename(&late, &copy).unwrap();
    two.kill_dispatcher();
    two.start_dispatcher().await;
    two.broker_up().await;
    assert_eq!(two.issue(&path, Some(300)).await.password, lease.password);
    assert!(
        !one.try_rekey(&["master"], &[]).status.success(),
        "it is in force already"
    );
}
