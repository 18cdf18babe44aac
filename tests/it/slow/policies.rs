//! Policies of the broker's operator that match Mayfly's queues too: the shipped policy has priority over them;
//! without it they are noticed, and `mayfly init --broker` sets it.

use std::os::unix::fs::PermissionsExt;

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};

/// This policy sends every dead-lettered message elsewhere than its level would.
const ASTRAY: &str = r#"{"dead-letter-routing-key": "elsewhere"}"#;

async fn furnished(rabbit: Rabbit) -> (System, Site, String, Engine) {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).broker(rabbit).start().await;
    (system, site, path, engine)
}

async fn overridden(system: &System) -> bool {
    let text = system.admin_text("/metrics").await;
    text.contains("\nmayfly_dispatcher_delays_overridden 1")
}

/// An account's end comes by the delay levels alone.
async fn ends_without_a_dispatcher(mut system: System, site: &Site, path: &str) {
    let credential = system.issue(path, Some(15)).await;
    system.kill_dispatcher();
    system.gone(site, &credential, seconds(60)).await;
}

/// The shipped policy keeps the operator's off the delay levels. Without it, the override is noticed at the start.
#[tokio::test]
async fn a_policy_for_all_queues_is_seen_and_outdone() {
    let rabbit = Rabbit::shared();
    rabbit.policy("all", ".*", ASTRAY, 10);
    let (system, site, path, _engine) = furnished(rabbit).await;
    eventually("it is seen", seconds(90), async || {
        overridden(&system).await.then_some(())
    })
    .await;
    assert!(system.logged().contains("mayfly init --broker"));
    system.rabbit.shipped_policies();
    eventually("it is seen to be over", seconds(90), async || {
        (!overridden(&system).await).then_some(())
    })
    .await;
    ends_without_a_dispatcher(system, &site, &path).await;
}

/// A shorter time to live makes delayed messages come early.
#[tokio::test]
async fn a_time_to_live_for_all_queues_is_seen() {
    let rabbit = Rabbit::shared();
    rabbit.policy("all", ".*", r#"{"message-ttl": 100}"#, 10);
    let system = System::start_on(rabbit).await;
    eventually("it is seen", seconds(90), async || {
        overridden(&system).await.then_some(())
    })
    .await;
}

async fn the_command_line_sets_it_right(release: &str) {
    let rabbit = Rabbit::with_management(release);
    rabbit.policy("all", ".*", ASTRAY, 2000);
    let (system, site, path, _engine) = furnished(rabbit).await;
    let file = system.directory.join("management-url");
    std::fs::write(&file, system.rabbit.management_url()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let cli = Cli { system: &system };
    let given = format!("@{}", file.display());
    let said = cli.ok(&["init", "--broker", &given]);
    assert!(said.contains("priority 2001"), "{said}");
    let refused = cli.fails(2, &["init", "--broker", &system.rabbit.management_url()]);
    assert!(refused.contains("command line"), "{refused}");

    // An operator policy applies together with any other policy.
    system
        .rabbit
        .operator_policy("limits", ".*", r#"{"expires": 3600000}"#);
    let said = eventually("it hears of the policy", seconds(30), async || {
        let output = cli.run(&["init", "--broker", &given]);
        let said = String::from_utf8(output.stdout).unwrap();
        (output.status.code() == Some(1)).then_some(said)
    })
    .await;
    assert!(
        said.contains(": operator policy `limits` overrides it: expires=3600000"),
        "{said}"
    );
    ends_without_a_dispatcher(system, &site, &path).await;
}

#[tokio::test]
async fn init_broker_outdoes_other_policies() {
    the_command_line_sets_it_right("").await;
}

#[tokio::test]
async fn init_broker_outdoes_other_policies_on_release_4() {
    the_command_line_sets_it_right("4").await;
}
