//! The store moves: from a SQLite file to PostgreSQL with `--copy-store`, and back to an older copy with `--backup`
//! and `--restore`. No account dies early, none outlives its end, and no two stores are in use.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use mayfly_tests::postgres::Server;
use mayfly_tests::process::binary;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn refused(output: &Output, why: &str) {
    let said = said(output);
    assert!(
        output.status.code() == Some(1) && said.contains(why),
        "{why} is not in\n{said}"
    );
}

/// The dispatcher's program with its settings, without a broker: a command on the store needs none.
fn bare(system: &System, store: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("mayfly-dispatcher"));
    command
        .args(arguments)
        .env("MAYFLY__DATA_DIR", system.directory.join("data"));
    if !store.is_empty() {
        command.env("MAYFLY__STORE__URL_FILE", store);
    }
    command
}

#[tokio::test]
async fn the_store_moves_to_postgresql_with_its_leases() {
    let fault = run_dir().join(format!("fault-{}", word()));
    let faults = ("MAYFLY_FAULT_FILE", fault.to_str().unwrap());
    let (mut system, site, path, engine) = Scenario::on(Server::pg15())
        .attributes(json!({"maxTtl": 3600}))
        .start()
        .await;
    let kept = system.issue(&path, Some(300)).await;
    let ended = system.issue(&path, Some(300)).await;
    let due = system.issue(&path, Some(45)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", ended.lease))
        .await;
    system.gone(&site, &ended, seconds(20)).await;
    let before = system.api.ok("/v1/status").await["installation"].clone();

    let file = run_dir().join(format!("store-url-{}", word()));
    let url = Server::pg15().store().await;
    std::fs::write(&file, &url).unwrap();
    let to = file.to_str().unwrap();
    // The move is refused while a dispatcher runs, and with a password on the command line.
    let output = system.local(&["--copy-store", to], &[]);
    refused(&output, "another dispatcher is running with this store");
    let output = system.local(&["--copy-store", &url], &[]);
    refused(&output, "a password on the command line");
    system.stop_dispatcher();

    // A move over another store is refused too.
    let other = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&other, Server::pg15().store().await).unwrap();
    let other_settings = [("MAYFLY__STORE__URL_FILE", other.to_str().unwrap())];
    drop(System::start_with(Rabbit::shared(), &other_settings).await);
    let output = system.local(&["--copy-store", other.to_str().unwrap()], &[]);
    refused(&output, "it is not empty");

    // If the move is killed before the old store is marked, nothing has changed. If it is killed after that, neither
    // store can be used, and the same command completes the move.
    std::fs::write(&fault, "copy.copied kill").unwrap();
    assert!(
        !system
            .local(&["--copy-store", to], &[faults])
            .status
            .success()
    );
    assert!(!fault.exists(), "the step was not reached");
    system.start_dispatcher().await;
    system.stop_dispatcher();
    std::fs::write(&fault, "copy.marked kill").unwrap();
    assert!(
        !system
            .local(&["--copy-store", to], &[faults])
            .status
            .success()
    );
    assert!(!fault.exists(), "the step was not reached");
    let output = system.local(&[], &[]);
    refused(&output, "moved to");
    refused(
        &system.local(&["--copy-store", other.to_str().unwrap()], &[]),
        "already",
    );
    let output = bare(&system, "", &["--copy-store", to]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    // A further run has nothing to do.
    let output = system.local(&["--copy-store", to], &[]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(kept.login().await.is_ok(), "the account died in the move");

    // The old store is refused. The new store has everything.
    refused(&system.local(&[], &[]), "it was moved to");
    let moved = system.beside(&[("MAYFLY__STORE__URL_FILE", to)]);
    moved.ready().await;
    moved.broker_up().await;
    let status = moved.api.ok("/v1/status").await;
    assert_eq!(status["installation"], before);
    for (lease, state) in [(&kept.lease, "active"), (&ended.lease, "revoked")] {
        assert_eq!(moved.lease(lease).await["state"], state);
    }
    let renew = format!("/v1/leases/{}/renew", kept.lease);
    let (status, answer) = moved.api.post(&renew, json!({"increment": 900})).await;
    assert_eq!(status, 200, "{answer}");
    let fresh = moved.issue(&path, Some(120)).await;
    assert!(fresh.login().await.is_ok());
    moved.gone(&site, &due, seconds(60)).await;
    moved
        .lease_becomes(&due.lease, "revoked", seconds(30))
        .await;
    for lease in [&kept, &fresh] {
        let (status, _) = moved
            .api
            .delete(&format!("/v1/leases/{}", lease.lease))
            .await;
        assert!(status < 300);
        moved.gone(&site, lease, seconds(20)).await;
    }
    assert!(site.accounts().await.is_empty());
    drop(engine);

    // The store is moved back into a file while the dispatcher runs. From then on the dispatcher cannot use its
    // store.
    let back = run_dir().join(format!("back-{}.db", word()));
    let target = format!("sqlite:{}", back.display());
    let output = moved.local(&["--copy-store", &target], &[]);
    assert!(output.status.success(), "{}", said(&output));
    eventually("its store is gone", seconds(20), async || {
        (!moved.is_ready().await).then_some(())
    })
    .await;
    drop(moved);
    let again = system.beside(&[("MAYFLY__STORE__URL", &target)]);
    again.ready().await;
    assert_eq!(again.lease(&kept.lease).await["id"], json!(kept.lease));
}

/// A row that an attacker wrote into the store is not copied.
#[tokio::test]
async fn a_store_with_a_row_of_a_stranger_is_not_moved() {
    let (server, file) = (
        Server::pg15(),
        run_dir().join(format!("store-url-{}", word())),
    );
    let url = server.store().await;
    std::fs::write(&file, &url).unwrap();
    let settings = [("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())];
    let mut system = System::start_with(Rabbit::shared(), &settings).await;
    let token = system
        .api
        .create("/v1/tokens", json!({"read": ["db:*"], "ttl": 3600}))
        .await;
    let id = token["id"].as_str().unwrap().to_owned();
    system.stop_dispatcher();
    let database = url.rsplit('/').next().unwrap().split('?').next().unwrap();
    let stranger = server.superuser(database).await;
    let write = format!("UPDATE public.tokens SET read = '[\"**\"]' WHERE id = '{id}'");
    stranger.batch_execute(&write).await.unwrap();
    let target = run_dir().join(format!("copy-{}.db", word()));
    let target = format!("sqlite:{}", target.display());
    let output = system.local(&["--copy-store", &target], &[]);
    refused(&output, &format!("tokens row {id}"));
    // A dispatcher with the old store still works.
    system.start_dispatcher().await;
}

#[tokio::test]
async fn a_checked_copy_comes_back() {
    let (mut system, site, path, _engine) = Scenario::on(Server::pg15()).start().await;
    let kept = system.issue(&path, Some(300)).await;
    let copies = system.directory.join("copies");
    std::fs::create_dir(&copies).unwrap();
    let to = copies.to_str().unwrap();
    let listed = || {
        let all = std::fs::read_dir(&copies).unwrap();
        let mut all: Vec<_> = all.map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    };
    // The directory has two old copies and the rest of an unfinished one. After the next copy the two newest are
    // kept.
    for name in ["mayfly-20200101T000000Z.db", "mayfly-20210101T000000Z.db"] {
        std::fs::write(copies.join(name), "old").unwrap();
    }
    std::fs::write(copies.join("mayfly-20220101T000000Z.db.partial"), "").unwrap();
    std::fs::write(copies.join("mayfly-notes.db"), "mine").unwrap();
    let output = bare(&system, "", &["--backup", to, "--keep", "2"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let left = listed();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(left[0].ends_with("mayfly-20210101T000000Z.db"));
    assert!(
        left[2].ends_with("mayfly-notes.db"),
        "what is not a copy stays"
    );
    let copy = left[1].to_str().unwrap();

    // A copy through standard output and input works too.
    let piped = bare(&system, "", &["--backup", "-"]).output().unwrap();
    assert!(piped.status.success() && piped.stdout.starts_with(b"SQLite format 3\0"));
    let refusal = system.local(&["--restore", copy], &[]);
    refused(&refusal, "another dispatcher is running with this store");

    let later = system.issue(&path, Some(40)).await;
    system.stop_dispatcher();
    // A copy that is damaged is refused, and the store is as it was.
    let mut damaged = piped.stdout.clone();
    damaged.truncate(damaged.len() / 2);
    let broken = system.directory.join("broken.db");
    std::fs::write(&broken, damaged).unwrap();
    let output = system.local(&["--restore", broken.to_str().unwrap()], &[]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    system.start_dispatcher().await;
    assert_eq!(system.lease(&later.lease).await["state"], "active");
    system.stop_dispatcher();

    let mut restoring = bare(&system, "", &["--restore", "-"]);
    let mut restoring = restoring.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = restoring.stdin.take().unwrap();
    input.write_all(&piped.stdout).unwrap();
    drop(input);
    assert!(restoring.wait().unwrap().success());
    system.start_dispatcher().await;
    system.broker_up().await;
    assert_eq!(system.lease(&kept.lease).await["state"], "active");
    let (status, _) = system.api.get(&format!("/v1/leases/{}", later.lease)).await;
    assert_eq!(status, 404, "it was made after the copy");
    assert!(kept.login().await.is_ok(), "a live account died");
    // The account's own message ends it.
    system.gone(&site, &later, seconds(60)).await;
    let kept_aside = std::fs::read_dir(system.directory.join("data")).unwrap();
    let kept_aside = kept_aside.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().contains(".db.before-")
    });
    assert!(kept_aside.count() > 0, "the earlier store is kept");
}
