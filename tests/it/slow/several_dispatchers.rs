//! Several dispatchers with one store in PostgreSQL: to applications and engines they are one. Any of them may die,
//! sleep or lose the store's database without an effect on a lease.

#![allow(
    clippy::print_stdout,
    reason = "figures, for who asks for them with --nocapture"
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mayfly_tests::files_with;
use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinSet;

/// Two dispatchers on a store in `server`. Without sweeps, which would end what the reconciler should end.
async fn two(server: &Server, more: &[(&str, &str)]) -> ([System; 2], String) {
    let url = server.store().await;
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, &url).unwrap();
    let mut environment = vec![
        ("MAYFLY__STORE__URL_FILE", file.to_str().unwrap()),
        ("MAYFLY__LEASE__SWEEP_SECONDS", "86400"),
    ];
    environment.extend(more);
    let first = System::start_with(Rabbit::shared(), &environment).await;
    let second = first.beside(&[]);
    second.ready().await;
    first.broker_up().await;
    second.broker_up().await;
    ([first, second], url)
}

async fn furnished(system: &System) -> (Site, String, Engine) {
    let scenario = Scenario::on(Server::pg15()).attributes(json!({"maxTtl": 600}));
    scenario.start_in(system).await
}

/// The dispatcher that reconciles. There is exactly one.
async fn leader(systems: &[System; 2]) -> usize {
    eventually("one reconciles", seconds(30), async || {
        match (systems[0].reconciles().await, systems[1].reconciles().await) {
            (true, false) => Some(0),
            (false, true) => Some(1),
            (false, false) => None,
            (true, true) => panic!("two reconcile"),
        }
    })
    .await
}

/// Each dispatcher knows what the other does, and can continue it.
#[tokio::test]
async fn two_are_one() {
    let store = Server::own("");
    let ([one, two], url) = two(&store, &[]).await;
    let (site, path, engine) = furnished(&one).await;
    for system in [&one, &two] {
        eventually("both hear the engine", seconds(15), async || {
            let engines = system.api.ok("/v1/engines").await.to_string();
            engines.contains(&engine.name).then_some(())
        })
        .await;
    }

    let first = one.issue(&path, Some(60)).await;
    let lease = format!("/v1/leases/{}", first.lease);
    assert_eq!(two.api.ok(&lease).await["state"], "active");
    let (status, renewed) = two
        .api
        .post(&format!("{lease}/renew"), json!({"increment": 300}))
        .await;
    assert_eq!(status, 200, "{renewed}");
    assert_eq!(
        one.api.ok(&lease).await["expiration"],
        renewed["expiration"]
    );
    assert!(first.login().await.is_ok());
    let (status, _) = two.api.delete(&lease).await;
    assert!(status < 300, "{status}");
    one.gone(&site, &first, seconds(15)).await;
    // Settled when nothing can make the account again.
    one.lease_becomes(&first.lease, "revoked", seconds(60))
        .await;

    // The same read again, at the other dispatcher: the same account with the same password.
    let read = format!("/v1/secrets/{path}?ttl=4");
    let key = ("idempotency-key", "one");
    let (_, there) = one.api.get_with(&read, key).await;
    let (_, here) = two.api.get_with(&read, key).await;
    let (there, here) = (
        Credential::from_answer(&there),
        Credential::from_answer(&here),
    );
    assert_eq!(
        (&there.lease, &there.password),
        (&here.lease, &here.password)
    );
    assert!(here.login().await.is_ok());
    two.gone(&site, &here, seconds(20)).await;
    two.lease_becomes(&here.lease, "revoked", seconds(20)).await;

    // A pool that the other dispatcher has made.
    let pool = two.pool().await;
    let _engine = two.engine(&pool).await;
    let other = two.secret(&site, &pool, json!({})).await;
    let second = one.issue(&other, Some(3)).await;
    assert!(second.login().await.is_ok());

    // Nothing secret is in the store's database, nor is its own password in the log.
    store
        .superuser("postgres")
        .await
        .batch_execute("CHECKPOINT")
        .await
        .unwrap();
    let data = store.directory().join("data");
    let found = files_with(&data, path.as_bytes());
    assert!(!found.is_empty(), "the search finds what is there");
    for secret in [&site.password, &second.password, &one.api.token] {
        let found = files_with(&data, secret.as_bytes());
        assert!(found.is_empty(), "{found:?}");
    }
    let log = std::fs::read_to_string(one.log()).unwrap();
    let password = url.split([':', '@']).nth(2).unwrap();
    assert!(!log.contains(password));
    site.no_accounts(seconds(20)).await;
}

/// SIGKILL at each step of an issue, to the dispatcher that was called. The other one ends what it began, even if the
/// parked end is lost.
#[tokio::test]
async fn one_dies_in_the_middle_of_issuing() {
    let fault = run_dir().join(format!("fault-{}", word()));
    let ([one, mut two], _) = two(
        &Server::pg18(),
        &[("MAYFLY__CREATE__DEADLINE_SECONDS", "2")],
    )
    .await;
    let (site, path, _engine) = furnished(&one).await;
    one.issue(&path, Some(1)).await;
    for step in ["recorded", "sent", "answered", "decided"] {
        two.kill_dispatcher();
        two = one.beside(&[("MAYFLY_FAULT_FILE", fault.to_str().unwrap())]);
        two.ready().await;
        two.broker_up().await;
        std::fs::write(&fault, format!("issue.{step} kill")).unwrap();
        let read = format!("/v1/secrets/{path}?ttl=240");
        let answer = two.api.try_call(Method::GET, &read, None).await;
        assert!(answer.is_none(), "{step}: it was to be killed: {answer:?}");
        assert!(!fault.exists(), "{step}: the step was not reached");
        one.rabbit.lose_parked();
        // When the outcome is recorded, the account has an owner, at least by name, and an end.
        let recorded = step == "decided";
        eventually(
            &format!("{step}: nothing is pending"),
            seconds(40),
            async || {
                for state in ["pending", "revoking"] {
                    let list = one.api.ok(&format!("/v1/leases?state={state}")).await;
                    if list["length"] != 0 {
                        return None;
                    }
                }
                Some(())
            },
        )
        .await;
        let active = one.api.ok("/v1/leases?state=active").await;
        assert_eq!(
            active["length"],
            u64::from(recorded),
            "{step}: nobody got it"
        );
        if recorded {
            one.api.delete(&format!("/v1/leases?path={path}")).await;
        }
        site.no_accounts(seconds(30)).await;
    }
}

/// SIGKILL to the reconciling dispatcher, and the parked ends are lost. The other one takes over and ends what is
/// due.
#[tokio::test]
async fn the_one_that_reconciles_dies() {
    let (systems, _) = two(&Server::pg18(), &[]).await;
    let (site, path, _engine) = furnished(&systems[0]).await;
    let reconciling = leader(&systems).await;
    let kept = systems[0].issue(&path, Some(240)).await;
    let credential = systems[0].issue(&path, Some(6)).await;
    systems[0].rabbit.lose_parked();
    let [one, two] = systems;
    let (mut leading, other) = if reconciling == 0 {
        (one, two)
    } else {
        (two, one)
    };
    leading.kill_dispatcher();
    let killed = Instant::now();
    eventually("the other reconciles", seconds(20), async || {
        other.reconciles().await.then_some(())
    })
    .await;
    println!("the other reconciles after {:?}", killed.elapsed());
    other.gone(&site, &credential, seconds(40)).await;
    other
        .lease_becomes(&credential.lease, "revoked", seconds(20))
        .await;
    assert!(kept.login().await.is_ok(), "not before its time");

    // When it is back, it is the second, until the first is asked to end.
    leading.start_dispatcher().await;
    let systems = [other, leading];
    assert_eq!(leader(&systems).await, 0);
    let [mut other, leading] = systems;
    other.stop_dispatcher();
    eventually("the lead is given up", seconds(20), async || {
        leading.reconciles().await.then_some(())
    })
    .await;
    leading.api.delete(&format!("/v1/leases?path={path}")).await;
    site.no_accounts(seconds(30)).await;
}

/// The store's database crashes and comes back. Callers get errors, leases end meanwhile, and both dispatchers
/// continue without help.
#[tokio::test]
async fn the_stores_database_is_away() {
    let store = Server::own("");
    let (systems, _) = two(&store, &[]).await;
    let (site, path, _engine) = furnished(&systems[0]).await;
    let short = systems[0].issue(&path, Some(4)).await;
    let kept = systems[1].issue(&path, Some(120)).await;
    store.kill();
    for system in &systems {
        let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (503, Some("store_unavailable")),
            "{body}"
        );
        eventually("it says that it is not ready", seconds(15), async || {
            (!system.is_ready().await).then_some(())
        })
        .await;
    }
    systems[0].gone(&site, &short, seconds(20)).await;
    store.start();
    for system in &systems {
        system.ready().await;
        let again = system.issue(&path, Some(3)).await;
        assert!(again.login().await.is_ok());
        system
            .lease_becomes(&short.lease, "revoked", seconds(30))
            .await;
    }
    assert!(kept.login().await.is_ok());
    leader(&systems).await;
    systems[0]
        .api
        .delete(&format!("/v1/leases?path={path}"))
        .await;
    site.no_accounts(seconds(30)).await;
}

/// One dispatcher is stopped in the middle of a transaction, while it has the lock that the other waits for.
#[tokio::test]
async fn one_that_sleeps_does_not_stop_the_other() {
    let ([one, two], url) = two(&Server::pg18(), &[]).await;
    let (site, path, _engine) = furnished(&one).await;
    let database = url
        .rsplit('/')
        .next()
        .unwrap()
        .split('?')
        .next()
        .unwrap()
        .to_owned();
    let mut holding = Server::pg18().superuser(&database).await;
    let held = holding.transaction().await.unwrap();
    // Tokens can be read, but not written.
    held.batch_execute("LOCK TABLE tokens IN SHARE MODE")
        .await
        .unwrap();
    let asking = two.api.clone();
    let asked = tokio::spawn(async move {
        let token = json!({"read": ["db:*"], "ttl": 3600});
        asking.post("/v1/tokens", token).await
    });
    let watching = Server::pg18().superuser("postgres").await;
    // Only such a request writes tokens, and only the second dispatcher got one.
    let state = async |state: &str| {
        let sql = format!(
            "SELECT 1 FROM pg_stat_activity WHERE datname = '{database}' \
             AND application_name = 'mayfly-dispatcher' AND query LIKE 'INSERT INTO public.tokens%' AND {state}"
        );
        !watching.query(&sql, &[]).await.unwrap().is_empty()
    };
    eventually(
        "its transaction waits for the table",
        seconds(20),
        async || state("wait_event = 'relation'").await.then_some(()),
    )
    .await;
    two.dispatcher().signal(Signal::STOP);
    held.rollback().await.unwrap();
    eventually("it is in the middle of it", seconds(10), async || {
        state("state = 'idle in transaction'").await.then_some(())
    })
    .await;
    let started = Instant::now();
    let credential = one.issue(&path, Some(4)).await;
    println!("the other waited {:?}", started.elapsed());
    // Without a limit on idle transactions it would wait until the other wakes.
    assert!(started.elapsed() < seconds(40), "{:?}", started.elapsed());
    assert!(credential.login().await.is_ok());
    eventually("the other reconciles", seconds(20), async || {
        one.reconciles().await.then_some(())
    })
    .await;
    one.gone(&site, &credential, seconds(20)).await;

    // When it wakes, its lost transaction is an error for the caller, and nothing more.
    two.dispatcher().signal(Signal::CONT);
    let (status, body) = asked.await.unwrap();
    assert_eq!(status, 503, "{body}");
    two.ready().await;
    two.broker_up().await;
    let credential = two.issue(&path, Some(2)).await;
    assert!(credential.login().await.is_ok());
    let systems = [one, two];
    leader(&systems).await;
    site.no_accounts(seconds(20)).await;
}

/// A dispatcher with another master key does not start, and reports why.
#[tokio::test]
async fn another_key_opens_nothing() {
    let ([one, _two], url) = two(&Server::pg18(), &[]).await;
    let key = one.directory.join("another-key");
    std::fs::write(&key, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").unwrap();
    let third = one.beside(&[("MAYFLY__SEAL__KEY_FILE", key.to_str().unwrap())]);
    eventually("it ends", seconds(20), async || {
        (!third.dispatcher().is_alive()).then_some(())
    })
    .await;
    let log = std::fs::read_to_string(one.log()).unwrap();
    assert!(log.contains("this master key does not open the store"));
    let password = url.split([':', '@']).nth(2).unwrap();
    assert!(!log.contains(password));
    assert_eq!(one.api.get("/v1/pools").await.0, 200);
}

/// Each is replaced as in a Deployment: a new one is ready, reads go to it, SIGTERM to the old one.
#[tokio::test(flavor = "multi_thread")]
async fn they_roll_under_load() {
    let server = Server::own("");
    let (mut running, _) = two(&server, &[]).await;
    let (site, path, _engine) = furnished(&running[0]).await;
    let read = format!("/v1/secrets/{path}?ttl=3");
    let balancer = Arc::new(Mutex::new([running[0].api.clone(), running[1].api.clone()]));
    let rolled = Arc::new(AtomicBool::new(false));
    let mut applications = JoinSet::new();
    for n in 0..8 {
        let (balancer, rolled, read) = (balancer.clone(), rolled.clone(), read.clone());
        applications.spawn(async move {
            let mut answers = Vec::new();
            while !rolled.load(Ordering::Relaxed) {
                let api = balancer.lock().unwrap()[(n + answers.len()) % 2].clone();
                let (status, answer) = api.get(&read).await;
                answers.push((status, answer));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answers
        });
    }
    let mut replaced = Vec::new();
    for place in 0..2 {
        let next = running[1 - place].beside(&[]);
        next.ready().await;
        next.broker_up().await;
        balancer.lock().unwrap()[place] = next.api.clone();
        let mut old = std::mem::replace(&mut running[place], next);
        // While its own reads are still in progress.
        old = tokio::task::spawn_blocking(move || {
            old.stop_dispatcher();
            old
        })
        .await
        .unwrap();
        // The broker ends with the first.
        replaced.push(old);
    }
    rolled.store(true, Ordering::Relaxed);
    let answers = applications.join_all().await.concat();
    println!(
        "{} reads while two dispatchers were replaced",
        answers.len()
    );
    let lost: Vec<_> = answers
        .iter()
        .filter(|(status, _)| *status != 200)
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
    assert!(answers.len() > 20, "that was no load");
    leader(&running).await;
    site.no_accounts(seconds(15)).await;
}
