//! A server in the place of the lease store's: it is sent no password, unless the URL asks for that.

use std::process::Command;

use mayfly_tests::process::{binary, free_port};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::rogue::{Rogue, Wants};
use mayfly_tests::{eventually, run_dir, seconds, word};

/// Each rogue asks for another kind of login. The dispatcher says in its log why it gives up.
#[tokio::test]
async fn a_rogue_store_learns_nothing() {
    let amqp = Rabbit::shared().url();
    for (wants, tls, options, heard) in [
        (Wants::Password, true, "sslmode=require", ""),
        (Wants::Password, false, "sslmode=disable", ""),
        (Wants::Md5, true, "sslmode=require", ""),
        (Wants::Scram, true, "sslmode=require", ""),
        (Wants::Nothing, true, "sslmode=require", ""),
        (
            Wants::Password,
            true,
            "sslmode=require&require_auth=password",
            "hunter2",
        ),
    ] {
        let rogue = Rogue::start(wants, tls).await;
        let directory = run_dir().join(format!("rogue-store-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let log = directory.join("log");
        let mut command = Command::new(binary("mayfly-dispatcher"));
        command
            .env("MAYFLY__AMQP__URL", &amqp)
            .env("MAYFLY__DATA_DIR", directory.join("data"))
            .env("MAYFLY__HTTP__LISTEN", format!("127.0.0.1:{}", free_port()))
            .env(
                "MAYFLY__ADMIN__LISTEN",
                format!("127.0.0.1:{}", free_port()),
            )
            .env(
                "MAYFLY__STORE__URL",
                format!(
                    "postgres://app:hunter2@127.0.0.1:{}/mayfly?{options}",
                    rogue.port
                ),
            )
            .stderr(std::fs::File::create(&log).unwrap());
        let mut dispatcher = command.spawn().unwrap();
        eventually("it begins a login", seconds(20), async || {
            (rogue.logins() > 0).then_some(())
        })
        .await;
        let what = format!("{wants:?}, {options}");
        if heard.is_empty() {
            eventually("it says why", seconds(20), async || {
                let log = std::fs::read_to_string(&log).unwrap();
                assert!(!log.contains("hunter2"), "{log}");
                (log.contains("require_auth") || log.contains("verify-full")).then_some(())
            })
            .await;
            let heard = rogue.heard();
            assert!(
                heard.is_empty(),
                "{what}: {:?}",
                String::from_utf8_lossy(&heard)
            );
        } else {
            eventually("it is sent what was asked for", seconds(20), async || {
                String::from_utf8_lossy(&rogue.heard())
                    .contains(heard)
                    .then_some(())
            })
            .await;
        }
        let _ = dispatcher.kill();
        dispatcher.wait().unwrap();
    }
}
