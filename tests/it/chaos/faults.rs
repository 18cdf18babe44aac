//! The faults.

use std::time::{Duration, Instant};

use mayfly_tests::proxy::{Mode, Proxy};
use mayfly_tests::seconds;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rustix::process::Signal;

use super::world::{ENGINES, World};

/// Steps of the engine and of the dispatcher at which a fault can be armed.
pub(super) const ENGINE_STEPS: &[&str] = &[
    "create.delivered",
    "create.before_commit",
    "create.committed",
    "create.replied",
    "renew.delivered",
    "renew.committed",
    "renew.replied",
    "revoke.delivered",
    "revoke.login_taken",
    "revoke.sessions_ended",
    "revoke.dropped",
    "revoke.outcome_sent",
    "revoke.parked",
];
pub(super) const DISPATCHER_STEPS: &[&str] = &[
    "issue.recorded",
    "issue.before_parking",
    "issue.parked",
    "issue.sent",
    "issue.answered",
    "issue.decided",
    "renew.answered",
    "outcome.recorded",
];

impl World {
    /// One fault, until it is over.
    pub(super) async fn strike(&self, random: &mut StdRng) {
        let lasting = Duration::from_millis(random.random_range(300..3000));
        match random.random_range(0..100) {
            0..12 => {
                self.count("engine killed", Duration::ZERO);
                let which = random.random_range(0..ENGINES);
                self.engines.lock().await[which]
                    .process
                    .signal(Signal::KILL);
            }
            12..20 => {
                self.count("engine stopped", lasting);
                let which = random.random_range(0..ENGINES);
                self.engines.lock().await[which]
                    .process
                    .signal(Signal::STOP);
                tokio::time::sleep(lasting).await;
                self.engines.lock().await[which]
                    .process
                    .signal(Signal::CONT);
            }
            20..28 => {
                self.count("dispatcher killed", Duration::ZERO);
                self.system.lock().await.dispatcher().signal(Signal::KILL);
            }
            28..34 => {
                self.count("dispatcher stopped", lasting);
                self.system.lock().await.dispatcher().signal(Signal::STOP);
                tokio::time::sleep(lasting).await;
                self.system.lock().await.dispatcher().signal(Signal::CONT);
            }
            34..70 => self.arm(random).await,
            70..80 => {
                let (way, name) = self.way(random);
                self.count(&format!("{name} cut"), lasting);
                way.iter().for_each(|proxy| proxy.set(Mode::Cut));
                tokio::time::sleep(lasting).await;
                way.iter().for_each(|proxy| proxy.set(Mode::Pass));
            }
            80..90 => {
                let (way, name) = self.way(random);
                self.count(&format!("{name} swallows"), lasting);
                way.iter().for_each(|proxy| proxy.set(Mode::Hole));
                tokio::time::sleep(lasting).await;
                way.iter().for_each(|proxy| proxy.set(Mode::Pass));
            }
            90..95 => {
                self.count("database crashed", lasting);
                self.site.server.kill();
                tokio::time::sleep(lasting).await;
                self.site.server.start();
            }
            95..97 => {
                self.count("disk of the store full", lasting);
                self.fill_disk(lasting).await;
            }
            _ => self.strike_broker(random, lasting).await,
        }
    }

    /// A node of the broker crashes, or sleeps.
    async fn strike_broker(&self, random: &mut StdRng, lasting: Duration) {
        let rabbit = self.system.lock().await.rabbit.handle();
        let node = random.random_range(0..rabbit.nodes());
        let sleeps = rabbit.nodes() > 1 && random.random_bool(0.3);
        let kind = if sleeps { "stopped" } else { "crashed" };
        self.count(&format!("broker node {kind}"), lasting + seconds(8));
        tokio::task::spawn_blocking(move || {
            if sleeps {
                rabbit.signal(node, Signal::STOP);
            } else {
                rabbit.kill(node);
            }
            std::thread::sleep(lasting);
            if sleeps {
                rabbit.signal(node, Signal::CONT);
            } else {
                rabbit.start(node);
            }
        })
        .await
        .unwrap();
    }

    fn way(&self, random: &mut StdRng) -> (&[Proxy], &'static str) {
        use std::slice::from_ref;
        match random.random_range(0..4) {
            0 => (&self.to_broker[0], "dispatcher to broker"),
            1 => (&self.to_broker[1], "engines to broker"),
            2 => (from_ref(&self.to_dispatcher), "applications to dispatcher"),
            _ => (from_ref(&self.to_database), "engines to database"),
        }
    }

    /// Arms a fault at a named step, and waits a while for it to strike.
    pub(super) async fn arm(&self, random: &mut StdRng) {
        let of_engine = random.random_bool(0.65);
        let (file, steps) = if of_engine {
            (&self.engine_fault, ENGINE_STEPS)
        } else {
            (&self.dispatcher_fault, DISPATCHER_STEPS)
        };
        let step = steps.choose(random).unwrap();
        let (action, kind, lasting) = match random.random_range(0..10) {
            0..5 => ("kill".to_owned(), "killed", Duration::ZERO),
            _ => {
                // Also so long that a create commits after its revocation.
                let ms = *[200_u64, 1000, 4000, 9000].choose(random).unwrap();
                (format!("delay {ms}"), "delayed", Duration::from_millis(ms))
            }
        };
        let new = file.with_extension("new");
        std::fs::write(&new, format!("{step} {action}\n")).unwrap();
        std::fs::rename(&new, file).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < seconds(4) {
            if !file.exists() {
                self.count(&format!("at {step}: {kind}"), lasting);
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let _ = std::fs::remove_file(file);
    }

    /// Lets no file of the dispatcher grow, which is what a full disk comes to.
    pub(super) async fn fill_disk(&self, lasting: Duration) {
        let limit = |bytes: &str| {
            let system = self.system.try_lock();
            let pid = system.map(|system| system.dispatcher().id().to_string());
            if let Ok(pid) = pid {
                let _ = std::process::Command::new("prlimit")
                    .args(["--pid", &pid, &format!("--fsize={bytes}")])
                    .stderr(std::process::Stdio::null())
                    .status();
            }
        };
        limit("1024:unlimited");
        tokio::time::sleep(lasting).await;
        limit("unlimited:unlimited");
    }
}
