//! A process is killed, or stopped for some time, at each named step of an issue, a renewal and a revocation. The
//! fault happens, nothing is left and nothing is lost in the end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::process::Process;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System, open_leases};
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;

use crate::chaos::faults::{DISPATCHER_STEPS, ENGINE_STEPS, arm};

/// How long a stopped process sleeps; longer than the create deadline.
const PAUSE: Duration = Duration::from_millis(2500);
/// Life of the accounts, in seconds.
const TTL: u64 = 20;

#[derive(Clone, Copy, PartialEq)]
enum Blow {
    Kill,
    Stop,
}

#[derive(Clone, Copy, PartialEq)]
enum Who {
    Engine,
    Dispatcher,
}

struct World {
    system: System,
    engine: Engine,
    site: Site,
    pool: String,
    path: String,
    fault: PathBuf,
    who: Who,
    blow: Blow,
    /// Leases with a holder of the credential.
    handed_out: Vec<String>,
}

impl World {
    async fn new(who: Who, blow: Blow) -> Self {
        let fault = run_dir().join(format!("fault-{}", word()));
        let mut environment = vec![("MAYFLY__CREATE__DEADLINE_SECONDS", "2")];
        if who == Who::Dispatcher {
            environment.push(("MAYFLY_FAULT_FILE", fault.to_str().unwrap()));
        }
        let (system, site, path, pool) = Scenario::on(Server::pg18())
            .settings(&environment)
            .attributes(json!({"maxTtl": 600}))
            .start_without_engine()
            .await;
        let engine = start_engine(&system, &pool, who, &fault);
        engine.ready().await;
        Self {
            system,
            engine,
            site,
            pool,
            path,
            fault,
            who,
            blow,
            handed_out: Vec::new(),
        }
    }

    fn another_engine(&self) -> Engine {
        start_engine(&self.system, &self.pool, self.who, &self.fault)
    }

    fn struck(&self) -> &Process {
        match self.who {
            Who::Engine => &self.engine.process,
            Who::Dispatcher => self.system.dispatcher(),
        }
    }

    async fn read(&self) -> Option<Credential> {
        let read = format!("/v1/secrets/{}?ttl={TTL}", self.path);
        let (status, answer) = self.system.api.try_call(Method::GET, &read, None).await?;
        (status == 200).then(|| Credential::from_answer(&answer))
    }

    /// Sends requests that pass the step. A caller may get no answer, or an error; a caller with a credential can use
    /// it.
    async fn come_by(&self, step: &str, held: &Credential) -> Option<Credential> {
        let lease = format!("/v1/leases/{}", held.lease);
        let call = async |method, path: &str, body| {
            self.system.api.try_call(method, path, body).await;
        };
        match step.split('.').next().unwrap() {
            "create" | "issue" => {
                let credential = self.read().await?;
                assert!(credential.login().await.is_ok(), "{step}");
                return Some(credential);
            }
            "renew" => {
                let body = Some(json!({"increment": TTL}));
                call(Method::POST, &format!("{lease}/renew"), body).await;
                assert!(held.login().await.is_ok(), "{step}");
            }
            "revoke" | "outcome" => call(Method::DELETE, &lease, None).await,
            "revoke_below" => {
                let below = format!("/v1/leases?path={}", self.path);
                call(Method::DELETE, &below, None).await;
            }
            _ => panic!("no way to {step} is known here"),
        }
        None
    }

    async fn strike(&mut self, step: &str) {
        let held = self.system.issue(&self.path, Some(TTL)).await;
        let word = match self.blow {
            Blow::Kill => "kill",
            Blow::Stop => "stop",
        };
        arm(&self.fault, &format!("{step} {word}"));
        let striking = async {
            eventually(&format!("{step} is struck"), seconds(20), async || {
                let process = self.struck();
                let is_struck = match self.blow {
                    Blow::Kill => !process.is_alive(),
                    Blow::Stop => process.is_stopped(),
                };
                is_struck.then_some(())
            })
            .await;
            assert!(!self.fault.exists(), "{step}: struck by something else");
            match (self.blow, self.who) {
                // Another engine starts while the caller still waits.
                (Blow::Kill, Who::Engine) => Some(self.another_engine()),
                (Blow::Kill, Who::Dispatcher) => None,
                (Blow::Stop, _) => {
                    // The pause is long enough for a caller to stop waiting.
                    tokio::time::sleep(PAUSE).await;
                    self.struck().signal(Signal::CONT);
                    None
                }
            }
        };
        let (got, other) = tokio::join!(self.come_by(step, &held), striking);
        let leases = [Some(held), got].into_iter().flatten();
        self.handed_out.extend(leases.map(|one| one.lease));
        if let Some(other) = other {
            self.engine = other;
        }
        if self.blow == Blow::Kill && self.who == Who::Dispatcher {
            self.system.start_dispatcher().await;
        }
        self.system.broker_up().await;
        self.engine.ready().await;
    }

    /// Everything that was begun ends without help.
    async fn end(&self) {
        eventually("nothing is left", seconds(90), async || {
            let status = self.system.api.ok("/v1/status").await;
            if open_leases(&status) != 0 {
                return None;
            }
            let roles = self.site.accounts().await;
            let is_over = roles.is_empty() && self.system.rabbit.messages("mayfly.v1.") == 0;
            is_over.then_some(())
        })
        .await;
        for held in &self.handed_out {
            let lease = self.system.lease(held).await;
            assert_eq!(lease["state"], "revoked", "{lease}");
        }
    }
}

fn start_engine(system: &System, pool: &str, who: Who, fault: &Path) -> Engine {
    match who {
        Who::Engine => system.engine_with(pool, &[("MAYFLY_FAULT_FILE", fault.to_str().unwrap())]),
        Who::Dispatcher => system.engine_unready(pool),
    }
}

async fn each_step(who: Who, blow: Blow) {
    let mut world = World::new(who, blow).await;
    let steps = match who {
        Who::Engine => ENGINE_STEPS,
        Who::Dispatcher => DISPATCHER_STEPS,
    };
    for step in steps {
        world.strike(step).await;
    }
    world.end().await;
}

#[tokio::test]
async fn an_engine_is_killed_at_each_step() {
    each_step(Who::Engine, Blow::Kill).await;
}

#[tokio::test]
async fn an_engine_is_stopped_at_each_step() {
    each_step(Who::Engine, Blow::Stop).await;
}

#[tokio::test]
async fn a_dispatcher_is_killed_at_each_step() {
    each_step(Who::Dispatcher, Blow::Kill).await;
}

#[tokio::test]
async fn a_dispatcher_is_stopped_at_each_step() {
    each_step(Who::Dispatcher, Blow::Stop).await;
}
