//! A caller sees the account's absence as its end, not the end of the time in which its create could still commit (up
//! to 54 s after the read).

use std::time::Instant;

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_revoked_when_its_account_is_gone() {
    let (system, site, path, engine) = Scenario::on(Server::pg15())
        .attributes(json!({"maxLeases": 1}))
        .start()
        .await;
    let pool = engine.pool.clone();
    let cli = Cli { system: &system };

    let credential = system.issue(&path, Some(300)).await;
    let id = credential.lease.as_str();
    let begun = Instant::now();
    cli.ok(&["lease", "revoke", id, "--wait", "--timeout", "15"]);
    let took = begun.elapsed();
    assert!(took < seconds(15), "{took:?}");
    assert!(credential.is_refused().await);
    assert!(site.server.roles(&credential.username).await.is_empty());
    assert_eq!(cli.ok(&["lease", "show", id, "-f", "state"]), "revoked");
    let listed = async |state: &str| {
        let list = system.api.ok(&format!("/v1/leases?state={state}")).await;
        list["leases"].to_string().contains(id)
    };
    assert!(listed("revoked").await && !listed("revoking").await && !listed("failed").await);
    let said = cli.fails(1, &["lease", "retry", id]);
    assert!(said.contains("the lease is revoked"), "{said}");
    let said = cli.fails(1, &["lease", "renew", id, "--increment", "10"]);
    assert!(said.contains("it has ended"), "{said}");
    let counted = |state: &str, n: u32| {
        format!(r#"mayfly_dispatcher_leases{{pool="{pool}",state="{state}"}} {n}"#)
    };
    let settling = format!(r#"mayfly_dispatcher_leases_settling{{pool="{pool}"}} 1"#);
    eventually("it is counted so", seconds(10), async || {
        let metrics = system.admin_text("/metrics").await;
        let lines = [
            counted("revoked", 1),
            counted("revoking", 0),
            settling.clone(),
        ];
        lines
            .iter()
            .all(|line| metrics.contains(line))
            .then_some(())
    })
    .await;
    let status = system.api.ok("/v1/status").await;
    assert_eq!(status["pools"][0]["leases"]["revoking"], 0, "{status}");

    // The place of the ended lease is free, and a wait for all leases below a path ends likewise.
    let other = system.issue(&path, Some(300)).await;
    cli.ok(&[
        "lease",
        "revoke",
        "--path",
        &path,
        "--wait",
        "--timeout",
        "15",
    ]);
    assert!(site.server.roles(&other.username).await.is_empty());
    assert_eq!(system.lease(&other.lease).await["state"], "revoked");
    cli.ok(&["uninstall", "--yes"]);
    assert!(begun.elapsed() < seconds(50), "{:?}", begun.elapsed());
}
