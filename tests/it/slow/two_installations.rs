//! Two installations on one virtual host would take each other's answers: the second is refused, with the name of the
//! first, and its operator can replace the first on purpose.

use std::process::Command;

use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use mayfly_tests::postgres::Server;
use mayfly_tests::process::{Process, binary, free_port};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};

const OWNER: &str = "mayfly.v1.dispatcher.owner";

/// Another installation with the same virtual host.
struct Other {
    directory: std::path::PathBuf,
    url: std::path::PathBuf,
    admin: u16,
}

impl Other {
    fn beside(system: &System) -> Self {
        let directory = run_dir().join(format!("other-{}", word()));
        std::fs::create_dir(&directory).unwrap();
        Self {
            directory,
            url: system.directory.join("amqp-url"),
            admin: free_port(),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("mayfly-dispatcher"));
        command
            .args(arguments)
            .env("MAYFLY__AMQP__URL_FILE", &self.url)
            .env("MAYFLY__DATA_DIR", self.directory.join("data"))
            .env("MAYFLY__HTTP__LISTEN", "127.0.0.1:0")
            .env("MAYFLY__ADMIN__LISTEN", format!("127.0.0.1:{}", self.admin));
        command
    }

    /// Runs the dispatcher to its end. Returns its exit status and its output.
    async fn ended(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = self.command(arguments);
        let ended = tokio::task::spawn_blocking(move || command.output().unwrap());
        // A process that is accepted would run for ever.
        let ended = tokio::time::timeout(seconds(60), ended);
        let output = ended.await.expect("it is not refused").unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        (
            output.status.code(),
            said + &String::from_utf8(output.stderr).unwrap(),
        )
    }
}

async fn installation(system: &System) -> String {
    let status = system.api.ok("/v1/status").await;
    status["installation"].as_str().unwrap().to_owned()
}

/// Every read gets its answer: nobody else takes one.
async fn reads_work(system: &System, path: &str) {
    for _ in 0..4 {
        assert!(system.issue(path, Some(120)).await.login().await.is_ok());
    }
}

#[tokio::test]
async fn a_second_installation_is_refused_by_name() {
    let (mut system, _site, path, _engine) = Scenario::on(Server::pg15()).start().await;
    let ours = installation(&system).await;

    let other = Other::beside(&system);
    let (code, said) = other.ended(&[]).await;
    assert_eq!(code, Some(1), "{said}");
    for word in [
        &*ours,
        "--take-over-broker",
        "amqp.url",
        "virtual host `test-",
    ] {
        assert!(said.contains(word), "{word} is not in\n{said}");
    }
    // The message names the dispatcher's own installation too.
    let theirs = said.split("is of the installation ").nth(1).unwrap();
    let theirs = theirs.split(':').next().unwrap().to_owned();
    assert_ne!(theirs, ours);
    reads_work(&system, &path).await;

    // The same installation is accepted: with another master key, after a restart, on a wiped broker.
    system.rekey(&["master"]);
    system.stop_dispatcher();
    system.start_dispatcher().await;
    system.broker_up().await;
    system.rabbit.wipe();
    eventually("the broker is furnished again", seconds(30), async || {
        system.rabbit.has("delay.L00").then_some(())
    })
    .await;
    let (code, said) = other.ended(&[]).await;
    assert!(code == Some(1) && said.contains(&ours), "{said}");

    system.broker_up().await;
    eventually("a read works again", seconds(40), async || {
        let (status, _) = system.api.get(&format!("/v1/secrets/{path}")).await;
        (status == 200).then_some(())
    })
    .await;
    // While the virtual host is in use, nobody can replace its owner. Afterwards the operator can.
    let (code, said) = other.ended(&["--take-over-broker"]).await;
    assert!(
        code == Some(1) && said.contains("dispatchers of the other installation are connected"),
        "{said}"
    );
    system.stop_dispatcher();
    let (code, said) = other.ended(&["--take-over-broker"]).await;
    assert!(code == Some(0) && said.contains(&theirs), "{said}");
    let (code, said) = other.ended(&["--take-over-broker"]).await;
    assert!(code == Some(0) && said.contains("already"), "{said}");
    let log = other.directory.join("log");
    let running = Process::start(&other.command(&[]), &log);
    eventually("the other one has the broker", seconds(30), async || {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        said.contains("connected to the broker").then_some(())
    })
    .await;
    system.start_dispatcher_unready();
    eventually("the replaced one ends", seconds(30), async || {
        (!system.dispatcher().is_alive()).then_some(())
    })
    .await;
    let said = system.logged();
    assert!(said.contains(&theirs) && running.is_alive(), "{said}");
}

/// A broker suddenly belongs to another installation, for example because it was wiped while two installations waited
/// for it. The running dispatcher leaves it, reports that, and returns when the broker belongs to its own
/// installation again.
#[tokio::test]
async fn a_running_dispatcher_leaves_another_s_virtual_host() {
    let system = System::start().await;
    system.broker_up().await;
    let ours = installation(&system).await;
    let theirs = "01900000-0000-7000-8000-000000000001";
    let admin = Connection::connect(&system.rabbit.url(), ConnectionProperties::default())
        .await
        .unwrap();
    let channel = admin.create_channel().await.unwrap();
    channel
        .exchange_delete(OWNER.into(), ExchangeDeleteOptions::default())
        .await
        .unwrap();
    let mut arguments = FieldTable::default();
    let name = AMQPValue::LongString(format!("mayfly.v1.dispatcher.{theirs}").into());
    arguments.insert("alternate-exchange".into(), name);
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    channel
        .exchange_declare(OWNER.into(), ExchangeKind::Fanout, durable, arguments)
        .await
        .unwrap();
    eventually("it says whose it is", seconds(30), async || {
        let said = system.admin_text("/readyz").await;
        (said.contains(theirs) && said.contains(&ours)).then_some(())
    })
    .await;
    let metrics = system.admin_text("/metrics").await;
    assert!(metrics.contains("\nmayfly_dispatcher_broker_up 0"));
    channel
        .exchange_delete(OWNER.into(), ExchangeDeleteOptions::default())
        .await
        .unwrap();
    eventually("it is back", seconds(30), async || {
        system.is_ready().await.then_some(())
    })
    .await;
    assert!(system.dispatcher().is_alive());
    system.broker_up().await;
}
