//! An engine's machine is suspended during a task: all of its clocks stand still, as in a paused virtual machine.
//! When it continues, it assumes that no time has passed. What the dispatcher has declared undone meanwhile must not
//! happen then.

use std::path::PathBuf;

use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, run_dir, seconds, word};
use rustix::process::Signal;
use serde_json::json;

use super::rotate::{comes_to_its_end, old_password_works, rotating, still_works};

/// An engine whose clocks can be set back, and that stops at a step.
struct Sleeper {
    engine: Engine,
    clocks: PathBuf,
    fault: PathBuf,
}

impl Sleeper {
    async fn start(system: &System, pool: &str) -> Self {
        let (clocks, fault) = (
            run_dir().join(format!("clock-{}", word())),
            run_dir().join(format!("fault-{}", word())),
        );
        std::fs::write(&clocks, "+0s\n").unwrap();
        let library = std::fs::read_dir("/usr/lib")
            .unwrap()
            .map(|found| found.unwrap().path().join("faketime/libfaketime.so.1"))
            .find(|path| path.exists())
            .expect("install libfaketime with `make setup-test`");
        let environment = [
            ("LD_PRELOAD", library.to_str().unwrap()),
            ("FAKETIME_TIMESTAMP_FILE", clocks.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            // libfaketime does not change this clock. The engine behaves as if this clock stood still.
            ("MAYFLY_FAULT_BOOTTIME", "stands still"),
            ("MAYFLY_FAULT_FILE", fault.to_str().unwrap()),
        ];
        let engine = system.engine_with(pool, &environment);
        engine.ready().await;
        Self {
            engine,
            clocks,
            fault,
        }
    }

    fn falls_asleep_at(&self, step: &str) {
        std::fs::write(&self.fault, format!("{step} stop")).unwrap();
    }

    async fn sleeps(&self) -> std::time::Instant {
        eventually("the engine is suspended", seconds(40), async || {
            (!self.fault.exists()).then_some(())
        })
        .await;
        std::time::Instant::now()
    }

    /// Continues, with clocks that stood still since then.
    fn wakes(&self, since: std::time::Instant) {
        let behind = since.elapsed().as_secs() + 1;
        std::fs::write(&self.clocks, format!("-{behind}s\n")).unwrap();
        self.engine.process.signal(Signal::CONT);
    }
}

/// The log of all processes from now on.
struct Log<'a> {
    system: &'a System,
    from: usize,
}

impl<'a> Log<'a> {
    fn of(system: &'a System) -> Self {
        let from = std::fs::metadata(system.log()).unwrap().len();
        Self {
            system,
            from: usize::try_from(from).unwrap(),
        }
    }

    /// Waits for a line with one of these. Returns which.
    async fn says<'w>(&self, words: &[&'w str]) -> &'w str {
        eventually(
            &format!("the log says one of {words:?}"),
            seconds(60),
            async || {
                let log = std::fs::read(self.system.log()).unwrap();
                let log = String::from_utf8_lossy(&log[self.from..]).into_owned();
                words.iter().find(|word| log.contains(**word)).copied()
            },
        )
        .await
    }
}

/// The dispatcher has found that the change did not happen. Then the engine wakes, and still has to make the change.
async fn a_rotation_is_slept_over(server: Server) {
    let system = System::start().await;
    let site: Site = server.site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let sleeper = Sleeper::start(&system, &pool).await;
    let path = system.secret(&site, &pool, json!({})).await;
    // The engine's connection is open: the engine sleeps before it reads the database's clock.
    sleeper.falls_asleep_at("rotate.before_change");
    let rotation = rotating(&system, &site);
    let asleep = sleeper.sleeps().await;
    let (status, answer) = rotation.await.unwrap();
    assert!(status >= 500, "{status} {answer}");
    // The broker gives the request to the next engine, which may do it until 4 s after its deadline of 10 s. The
    // answer can come earlier: the broker may notice the silent engine before that.
    tokio::time::sleep_until((asleep + seconds(16)).into()).await;
    let _other = system.engine(&pool).await;
    comes_to_its_end(&system, &site).await;
    let words = || {
        let log = system.logged();
        let about = |line: &&str| {
            ["password", "rotat", "request"]
                .iter()
                .any(|word| line.contains(word))
        };
        log.lines().filter(about).collect::<Vec<_>>().join("\n")
    };
    assert!(old_password_works(&site).await, "{}", words());
    let log = Log::of(&system);
    sleeper.wakes(asleep);
    let (not, done) = (
        "the admin's password was not changed",
        "changed the admin's password",
    );
    assert_eq!(log.says(&[done, not]).await, not);
    assert!(
        old_password_works(&site).await,
        "it was changed after it was called undone"
    );
    still_works(&system, &site, &path).await;
}

#[tokio::test]
async fn a_rotation_is_slept_over_on_15() {
    a_rotation_is_slept_over(Server::pg15()).await;
}

#[tokio::test]
async fn a_rotation_is_slept_over_on_18() {
    a_rotation_is_slept_over(Server::pg18()).await;
}

/// The lease has failed for good. Then the engine wakes, and still has to make the account.
async fn a_create_is_slept_over(server: Server) {
    let system = System::start_with(
        Rabbit::shared(),
        &[("MAYFLY__CREATE__DEADLINE_SECONDS", "5")],
    )
    .await;
    let site: Site = server.site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let sleeper = Sleeper::start(&system, &pool).await;
    let path = system.secret(&site, &pool, json!({})).await;
    // After this account the engine knows the database's clock.
    let first = system.issue(&path, Some(5)).await;
    sleeper.falls_asleep_at("create.delivered");
    // The answer comes at the deadline, long after the engine fell asleep.
    let asleep = std::time::Instant::now();
    let (status, answer) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert!(status >= 500, "{status} {answer}");
    sleeper.sleeps().await;
    let _other = system.engine(&pool).await;
    system.gone(&site, &first, seconds(60)).await;
    system.settled().await;
    let log = Log::of(&system);
    sleeper.wakes(asleep);
    // No request except this one fails.
    let (not, made) = ("a request failed", "made an account");
    assert_eq!(
        log.says(&[made, not]).await,
        not,
        "an account was made after its lease had failed for good"
    );
    assert_eq!(site.accounts().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_create_is_slept_over_on_15() {
    a_create_is_slept_over(Server::pg15()).await;
}

#[tokio::test]
async fn a_create_is_slept_over_on_18() {
    a_create_is_slept_over(Server::pg18()).await;
}
