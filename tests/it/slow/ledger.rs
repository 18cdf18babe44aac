//! The database as ledger: the store is lost or old, the broker has lost its messages, and still nothing outlives its
//! TTL and nothing in use dies. Each test has a server of its own: a sweep looks at all of it.

use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::process::run;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System, prefix};
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::{Value, json};

/// Sweeps every second, for accounts that ended a second ago.
const OFTEN: &[(&str, &str)] = &[
    ("MAYFLY__LEASE__SWEEP_SECONDS", "1"),
    ("MAYFLY__LEASE__SWEEP_GRACE_SECONDS", "1"),
];
const NEVER: &[(&str, &str)] = &[("MAYFLY__LEASE__SWEEP_SECONDS", "86400")];

async fn furnished(sweep: &[(&str, &str)]) -> (System, Site, String, Engine) {
    let (system, site, path, engine) = Scenario::on(Server::own("")).settings(sweep).start().await;
    (system, site, path, engine)
}

async fn roles(site: &Site) -> usize {
    site.accounts().await.len()
}

/// A role that looks like one of a lease, but is not Mayfly's.
async fn stranger(site: &Site, name: &str, comment: &str) {
    let text = format!(
        "CREATE ROLE {name} LOGIN VALID UNTIL '2020-01-01'; COMMENT ON ROLE {name} IS '{comment}'"
    );
    site.admin().await.batch_execute(&text).await.unwrap();
}

/// Store, keys and broker are gone; a new dispatcher with a new store knows nothing.
#[tokio::test]
async fn the_store_and_the_broker_are_lost() {
    let (mut system, site, path, engine) = furnished(OFTEN).await;
    let short = system.issue(&path, Some(4)).await;
    let long = system.issue(&path, Some(120)).await;
    let owner = system.issue(&path, Some(4)).await;
    site.server
        .superuser(&site.name)
        .await
        .batch_execute(&format!(
            "CREATE TABLE public.kept (n int); ALTER TABLE public.kept OWNER TO \"{}\"",
            owner.username
        ))
        .await
        .unwrap();
    let bystander = format!("{}bystander", prefix(&site));
    stranger(&site, &bystander, "mayfly:lease:not ours").await;
    system.kill_dispatcher();
    engine.process.kill();
    system.rabbit.wipe();
    std::fs::remove_dir_all(system.directory.join("data")).unwrap();
    system.start_dispatcher().await;
    let token = std::fs::read_to_string(system.directory.join("data/root-token")).unwrap();
    system.api = system.api.with_token(token.trim());
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    system.secret(&site, &pool, json!({})).await;
    system.gone(&site, &short, seconds(20)).await;
    assert!(long.login().await.is_ok(), "a live credential died");
    let left = site.accounts().await;
    assert_eq!(
        left.len(),
        3,
        "the live one, the owner of a table, a stranger: {left:?}"
    );
    // A person decides about objects of another installation's account.
    let (_, found) = system
        .api
        .post("/v1/leases/reconcile", json!({"dryRun": true}))
        .await;
    let of = |role: &str| {
        let list = found["differences"].as_array().unwrap();
        list.iter().find(|one| one["role"] == role).cloned()
    };
    let owner = of(&owner.username).expect("it is listed");
    assert_eq!(owner["kind"], "other_installation");
    assert!(owner["installation"].is_string(), "{owner}");
    assert!(of(&bystander).is_none(), "{found}");
}

/// The store is restored from a backup. It does not know the leases made after the backup. Leases that ended since
/// are live in it. A lease that was being made then has been handed out.
async fn restored(
    (mut system, site, path, engine): (System, Site, String, Engine),
    back_up: impl AsyncFn(&System),
    restore: impl AsyncFn(&System),
) {
    let ended = system.issue(&path, Some(30)).await;
    let live = system.issue(&path, Some(280)).await;
    // The backup is made in the middle of an issue.
    engine.process.signal(rustix::process::Signal::STOP);
    let api = system.api.clone();
    let secret = format!("/v1/secrets/{path}?ttl=280");
    let pending = tokio::spawn(async move { api.ok(&secret).await });
    eventually("its lease is recorded", seconds(5), async || {
        let found = system
            .api
            .ok(&format!("/v1/leases?path={path}&state=pending"))
            .await;
        (found["length"] == 1).then_some(())
    })
    .await;
    back_up(&system).await;
    engine.process.signal(rustix::process::Signal::CONT);
    let handed_out = Credential::from_answer(&pending.await.unwrap());
    let since = system.issue(&path, Some(8)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", ended.lease))
        .await;
    system.gone(&site, &ended, seconds(5)).await;
    system.kill_dispatcher();
    system.rabbit.wipe();
    restore(&system).await;
    system.start_dispatcher().await;
    system.broker_up().await;
    system.gone(&site, &since, seconds(20)).await;
    system
        .lease_becomes(&ended.lease, "revoked", seconds(60))
        .await;
    for credential in [&live, &handed_out] {
        assert!(credential.login().await.is_ok(), "a live credential died");
        let corrected = "the store has the database's date";
        let lease = eventually(corrected, seconds(20), async || {
            let lease = system.lease(&credential.lease).await;
            let end: jiff::Timestamp = lease["expiration"].as_str()?.parse().unwrap();
            let off = end.duration_since(credential.expiration).abs();
            (off.as_secs() < 1).then_some(lease)
        })
        .await;
        assert_eq!(lease["state"], "active", "{lease}");
    }
    assert_eq!(roles(&site).await, 2);
    for credential in [&live, &handed_out] {
        system
            .api
            .delete(&format!("/v1/leases/{}", credential.lease))
            .await;
        system.gone(&site, credential, seconds(5)).await;
    }
}

#[tokio::test]
async fn the_store_is_restored_from_a_backup() {
    let furnished = furnished(OFTEN).await;
    let backup = furnished.0.directory.join("backup");
    restored(
        furnished,
        async |system| system.backup(&backup),
        async |system| system.restore(&backup),
    )
    .await;
}

/// The backup and the restore are made with PostgreSQL's own tools, into another database.
#[tokio::test]
async fn the_store_is_restored_by_pg_restore() {
    let server = Server::own("");
    let store = server.store().await;
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, &store).unwrap();
    let settings = [
        OFTEN,
        &[("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())],
    ]
    .concat();
    let furnished = furnished(&settings).await;
    let backup = furnished.0.directory.join("backup");
    let backup = backup.to_str().unwrap();
    restored(
        furnished,
        async |_| {
            let dump = ["--format=custom", "--file", backup, &store];
            run(&server.program("pg_dump"), &dump);
        },
        async |system| {
            let fresh = server.store().await;
            let restore = ["--no-owner", "--exit-on-error", "--dbname", &fresh, backup];
            run(&server.program("pg_restore"), &restore);
            std::fs::write(&file, &fresh).unwrap();
            system.mark_restored();
        },
    )
    .await;
}

/// A lease was detached and its pool deleted, and the account exists: the engines of another pool that reach the
/// server end it, and other accounts past their end.
#[tokio::test]
async fn an_account_whose_pool_is_gone() {
    let (system, site, path, engine) = furnished(OFTEN).await;
    let left = system.issue(&path, Some(5)).await;
    let pool = system.lease(&left.lease).await["pool"].clone();
    engine.process.kill();
    for gone in [
        format!("/v1/secrets/{path}?leases=detach"),
        format!("/v1/secrets/db:{}:root", site.name),
        format!("/v1/pools/{}", pool.as_str().unwrap()),
    ] {
        let (status, body) = system.api.delete(&gone).await;
        assert_eq!(status, 204, "{gone}: {body}");
    }
    assert_eq!(roles(&site).await, 1);
    // By its name this role comes after the other in the ledger.
    let installation = system.api.ok("/v1/status").await["installation"].clone();
    let late = format!("{}zz", prefix(&site));
    let comment = format!(
        "mayfly:lease:{}:01890a5d-ac96-774b-bcce-b302099a8058",
        installation.as_str().unwrap()
    );
    stranger(&site, &late, &comment).await;
    let other = system.pool().await;
    let _engine = system.engine(&other).await;
    system.secret(&site, &other, json!({})).await;
    system.gone(&site, &left, seconds(15)).await;
    eventually("the one behind it is gone", seconds(10), async || {
        (roles(&site).await == 0).then_some(())
    })
    .await;
}

/// Settled in the store, and the account exists; the comparison shows what each side knows before it changes
/// anything.
#[tokio::test]
async fn what_differs_is_shown_and_set_right() {
    let (mut system, site, path, _engine) = furnished(NEVER).await;
    let kept = system.issue(&path, Some(120)).await;
    let vanished = system.issue(&path, Some(120)).await;
    let moved = system.issue(&path, Some(120)).await;
    let forgotten = system.issue(&path, Some(9)).await;
    let detached = format!("/v1/leases/{}?detach=true", forgotten.lease);
    let (status, lease) = system.api.delete(&detached).await;
    assert_eq!(
        (status, lease["state"].as_str()),
        (200, Some("revoked")),
        "{lease}"
    );
    assert!(
        lease["lastError"]
            .as_str()
            .unwrap()
            .starts_with("detached by root")
    );
    system.rabbit.wipe();
    let admin = site.server.superuser("postgres").await;
    for text in [
        format!(
            "DROP OWNED BY \"{0}\"; DROP ROLE \"{0}\"",
            vanished.username
        ),
        format!("ALTER ROLE \"{}\" VALID UNTIL '2100-01-01'", moved.username),
    ] {
        admin.batch_execute(&text).await.unwrap();
    }
    tokio::time::sleep(seconds(10)).await;
    // The dispatcher declares the pool's queues again, and the engine finds them.
    let of_pool = system.lease(&kept.lease).await["pool"].clone();
    let of_pool = format!("/v1/pools/{}", of_pool.as_str().unwrap());
    eventually("the broker is whole again", seconds(45), async || {
        let (status, pool) = system.api.get(&of_pool).await;
        (status == 200 && pool["engines"] == 1).then_some(())
    })
    .await;
    system.broker_up().await;
    // If a level is deleted, the dispatcher parks all ends again. If only messages are lost, the comparison alone
    // shows it.
    system.rabbit.lose_parked();
    let ask = async |dry_run: bool| -> Value {
        let body = json!({"dryRun": dry_run});
        let (status, found) = system.api.post("/v1/leases/reconcile", body).await;
        assert_eq!(status, 200, "{found}");
        assert_eq!(found["unreachable"], json!([]));
        found
    };
    let expected = [
        (&vanished, "account_missing"),
        (&moved, "expiration_differs"),
        (&forgotten, "settled_in_store"),
    ];
    // A second base secret names the same server by another name, and another installation has an account on it.
    let mut data = site.data();
    data["host"] = json!("localhost");
    let base = format!("db:{}:again", site.name);
    let body = json!({"attributes": {"type": "postgresql"}, "data": data});
    system
        .api
        .create(&format!("/v1/secrets/{base}"), body)
        .await;
    let linked = json!({"linkType": "dynamic", "linkedSecret": base});
    let pool = system.lease(&kept.lease).await["pool"].clone();
    system
        .secret(&site, pool.as_str().unwrap(), json!({"linkConfig": linked}))
        .await;
    let text = format!(
        "CREATE ROLE {0} VALID UNTIL '2100-01-01'; COMMENT ON ROLE {0} IS \
         'mayfly:lease:01890a5d-ac96-774b-bcce-b302099a8057:01890a5d-ac96-774b-bcce-b302099a8058'",
        format!("{}alive", prefix(&site))
    );
    site.admin().await.batch_execute(&text).await.unwrap();
    for _ in 0..2 {
        let found = ask(true).await;
        assert_eq!(
            (&found["roles"], &found["leases"], &found["messagesMissing"]),
            (&json!(4), &json!(3), &json!(3)),
            "{found}"
        );
        let list = found["differences"].as_array().unwrap();
        assert_eq!(list.len(), 3, "{found}");
        for (credential, kind) in &expected {
            let one = list
                .iter()
                .find(|one| one["role"] == credential.username.as_str());
            assert_eq!(
                one.unwrap_or_else(|| panic!("{kind}: {found}"))["kind"],
                *kind
            );
        }
    }
    assert_eq!(ask(false).await["differences"].as_array().unwrap().len(), 3);
    system.gone(&site, &forgotten, seconds(5)).await;
    system
        .lease_becomes(&vanished.lease, "revoked", seconds(70))
        .await;
    eventually("the row has the database's date", seconds(5), async || {
        let lease = system.lease(&moved.lease).await;
        lease["expiration"]
            .as_str()
            .unwrap()
            .starts_with("2100")
            .then_some(())
    })
    .await;
    let found = ask(true).await;
    assert_eq!(found["differences"], json!([]));
    assert_eq!(found["messagesMissing"], json!(0), "{found}");
    // The parked end is enough: nothing is left to reconcile.
    let soon = system.issue(&path, Some(12)).await;
    system.rabbit.lose_parked();
    let found = ask(false).await;
    assert!(found["messagesMissing"].as_u64() > Some(0), "{found}");
    eventually("the ends are parked again", seconds(10), async || {
        let messages = ask(true).await["messages"].as_u64();
        (messages >= Some(3)).then_some(())
    })
    .await;
    system.kill_dispatcher();
    system.gone(&site, &soon, seconds(20)).await;
    assert!(kept.login().await.is_ok());
}
