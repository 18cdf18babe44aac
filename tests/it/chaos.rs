//! The fault suite. Real processes, a broker and a database of their own, and faults at random from
//! a seed that is printed: processes killed and stopped, at random and at every named step of an
//! issue, a renewal and a revocation; the ways between them cut and swallowing; broker, database
//! and disk gone for a while. What must hold is looked at from outside. A short form runs with
//! `make test`; `make chaos` runs ten minutes, and the outages with their figures.

#![allow(clippy::print_stdout, reason = "its figures")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::proxy::{Mode, Proxy};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System, prefix};
use mayfly_tests::{eventually, seconds};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use serde_json::json;
use tokio::sync::Mutex as Gate;

const ENGINES: usize = 3;
/// Beyond a fault's own end: the AMQP heartbeat, a connect's time-out, a process's start.
const AFTERMATH: Duration = Duration::from_secs(15);
/// How late an account may end with nothing in the way.
const LATE: Duration = Duration::from_secs(3);

/// Steps of the engine and of the dispatcher at which a fault can be armed.
const ENGINE_STEPS: &[&str] = &[
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
const DISPATCHER_STEPS: &[&str] = &[
    "issue.recorded",
    "issue.before_parking",
    "issue.parked",
    "issue.sent",
    "issue.answered",
    "issue.decided",
    "renew.answered",
    "outcome.recorded",
];

/// What was counted.
#[derive(Default)]
struct Tally {
    faults: BTreeMap<String, u32>,
    refused: BTreeMap<String, u32>,
    issued: u32,
    renewed: u32,
    revoked: u32,
    abandoned: u32,
    logins: u32,
    violations: Vec<String>,
    late: Vec<Duration>,
    /// When something was in the way, its aftermath included.
    trouble: Vec<(Timestamp, Timestamp)>,
}

impl Tally {
    fn fault(&mut self, kind: &str, lasting: Duration) {
        *self.faults.entry(kind.to_owned()).or_default() += 1;
        let now = Timestamp::now();
        self.trouble.push((now, now + lasting + AFTERMATH));
    }

    /// How much of the time between two moments something was in the way.
    fn trouble_in(&self, from: Timestamp, to: Timestamp) -> Duration {
        let mut spans: Vec<_> = self
            .trouble
            .iter()
            .map(|(begun, ended)| ((*begun).max(from), (*ended).min(to)))
            .filter(|(begun, ended)| begun < ended)
            .collect();
        spans.sort();
        let (mut total, mut until) = (Duration::ZERO, from);
        for (begun, ended) in spans {
            let begun = begun.max(until);
            if ended > begun {
                total += ended.duration_since(begun).unsigned_abs();
                until = ended;
            }
        }
        total
    }
}

/// An account somebody holds.
#[derive(Clone)]
struct Held {
    credential: Credential,
    end: Timestamp,
    /// Its end was asked for: from then on it may go.
    revoked: bool,
    /// A renewal was asked for and not answered: it may end later than known.
    unsure: bool,
}

struct World {
    system: Gate<System>,
    engines: Gate<Vec<Engine>>,
    site: Site,
    pool: String,
    path: String,
    api: mayfly_tests::api::Api,
    to_broker: [Proxy; 2],
    to_database: Proxy,
    engine_environment: Vec<(String, String)>,
    dispatcher_fault: std::path::PathBuf,
    engine_fault: std::path::PathBuf,
    tally: Mutex<Tally>,
    held: Mutex<BTreeMap<String, Held>>,
    calm: AtomicBool,
}

fn port_of(url: &str) -> u16 {
    let place = url.rsplit('@').next().unwrap();
    let port = place.split(['/', '?']).next().unwrap().rsplit(':').next();
    port.unwrap().parse().unwrap()
}

impl World {
    async fn new() -> Arc<Self> {
        let rabbit = Rabbit::own();
        let server = Server::own("");
        let broker_port = port_of(&rabbit.url());
        let to_broker = [Proxy::to(broker_port).await, Proxy::to(broker_port).await];
        let to_database = Proxy::to(server.port()).await;
        let through = |proxy: &Proxy, name: &str| {
            let url = rabbit
                .url()
                .replace(&format!(":{broker_port}"), &format!(":{}", proxy.port));
            let file = rabbit.directory().join(name);
            std::fs::write(&file, url).unwrap();
            file
        };
        let dispatcher_url = through(&to_broker[0], "url-of-dispatcher");
        let engine_url = through(&to_broker[1], "url-of-engines");
        let dispatcher_fault = rabbit.directory().join("fault-of-dispatcher");
        let engine_fault = rabbit.directory().join("fault-of-engines");
        let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
        let system = System::start_with(
            rabbit,
            &[
                ("MAYFLY__AMQP__URL_FILE", &text(&dispatcher_url)),
                ("MAYFLY_FAULT_FILE", &text(&dispatcher_fault)),
                ("MAYFLY__CREATE__DEADLINE_SECONDS", "8"),
                ("MAYFLY__LEASE__SWEEP_SECONDS", "10"),
                ("MAYFLY__LEASE__SWEEP_GRACE_SECONDS", "20"),
                ("MAYFLY__LOG__LEVEL", "info"),
            ],
        )
        .await;
        let site = server.site(Admin::CreateRole).await;
        let pool = system.pool().await;
        let engine_environment = vec![
            ("MAYFLY__AMQP__URL_FILE".to_owned(), text(&engine_url)),
            ("MAYFLY_FAULT_FILE".to_owned(), text(&engine_fault)),
            ("MAYFLY__LOG__LEVEL".to_owned(), "info".to_owned()),
        ];
        let path = system
            .secret(&site, &pool, json!({"ttl": 30, "maxTtl": 60}))
            .await;
        let base = format!("/v1/secrets/db:{}:root", site.name);
        let change = json!({"data": {"port": to_database.port}});
        let (status, body) = system.api.put(&base, change).await;
        assert_eq!(status, 200, "{body}");
        let world = Arc::new(Self {
            api: system.api.clone(),
            system: Gate::new(system),
            engines: Gate::new(Vec::new()),
            site,
            pool,
            path,
            to_broker,
            to_database,
            engine_environment,
            dispatcher_fault,
            engine_fault,
            tally: Mutex::default(),
            held: Mutex::default(),
            calm: AtomicBool::new(false),
        });
        for _ in 0..ENGINES {
            let engine = world.start_engine().await;
            world.engines.lock().await.push(engine);
        }
        eventually("an engine answers", seconds(30), async || {
            let (status, _) = world
                .api
                .get(&format!("/v1/secrets/{}?ttl=1", world.path))
                .await;
            (status == 200).then_some(())
        })
        .await;
        world
    }

    async fn start_engine(&self) -> Engine {
        let environment: Vec<_> = self
            .engine_environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        self.system
            .lock()
            .await
            .engine_with(&self.pool, &environment)
    }

    /// Starts again what has died.
    async fn supervise(&self) {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            {
                let mut engines = self.engines.lock().await;
                for engine in engines.iter_mut() {
                    if !engine.process.is_alive() {
                        *engine = self.start_engine().await;
                    }
                }
            }
            let mut system = self.system.lock().await;
            if !system.dispatcher().is_alive() {
                system.start_dispatcher_unready();
            }
        }
    }

    fn count(&self, kind: &str, lasting: Duration) {
        self.tally.lock().unwrap().fault(kind, lasting);
    }

    /// One fault, until it is over.
    async fn strike(&self, random: &mut StdRng) {
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
                way.set(Mode::Cut);
                tokio::time::sleep(lasting).await;
                way.set(Mode::Pass);
            }
            80..90 => {
                let (way, name) = self.way(random);
                self.count(&format!("{name} swallows"), lasting);
                way.set(Mode::Hole);
                tokio::time::sleep(lasting).await;
                way.set(Mode::Pass);
            }
            90..96 => {
                self.count("database crashed", lasting);
                self.site.server.kill();
                tokio::time::sleep(lasting).await;
                self.site.server.start();
            }
            96..98 => {
                self.count("disk of the store full", lasting);
                self.fill_disk(lasting).await;
            }
            _ => {
                self.count("broker crashed", lasting + seconds(8));
                let (killing, starting) = {
                    let system = self.system.lock().await;
                    (system.rabbit.handle(), system.rabbit.handle())
                };
                tokio::task::spawn_blocking(move || killing.kill())
                    .await
                    .unwrap();
                tokio::time::sleep(lasting).await;
                tokio::task::spawn_blocking(move || starting.start())
                    .await
                    .unwrap();
            }
        }
    }

    fn way(&self, random: &mut StdRng) -> (&Proxy, &'static str) {
        match random.random_range(0..3) {
            0 => (&self.to_broker[0], "dispatcher to broker"),
            1 => (&self.to_broker[1], "engines to broker"),
            _ => (&self.to_database, "engines to database"),
        }
    }

    /// Arms a fault at a named step, and waits a while for it to strike.
    async fn arm(&self, random: &mut StdRng) {
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
    async fn fill_disk(&self, lasting: Duration) {
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

    /// What an application does, again and again, until `until`.
    async fn apply(&self, until: Instant, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        while Instant::now() < until {
            let ttl = random.random_range(2..=20);
            let path = format!("/v1/secrets/{}?ttl={ttl}", self.path);
            if random.random_bool(0.05) {
                let patience = Duration::from_millis(random.random_range(5..200));
                let _ = tokio::time::timeout(patience, self.get(&path)).await;
                self.tally.lock().unwrap().abandoned += 1;
                continue;
            }
            match self.get(&path).await {
                Some((200, answer)) => {
                    let credential = Credential::from_answer(&answer);
                    self.tally.lock().unwrap().issued += 1;
                    let held = Held {
                        end: credential.expiration,
                        credential: Credential {
                            port: self.site.server.port(),
                            ..credential
                        },
                        revoked: false,
                        unsure: false,
                    };
                    let role = held.credential.username.clone();
                    self.held.lock().unwrap().insert(role.clone(), held);
                    self.log_in(&role).await;
                    self.live(&role, &mut random).await;
                }
                Some((_, answer)) => {
                    self.refused(answer["error"].as_str().unwrap_or("?"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                None => {
                    self.refused("no answer");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    fn refused(&self, code: &str) {
        let mut tally = self.tally.lock().unwrap();
        *tally.refused.entry(code.to_owned()).or_default() += 1;
    }

    /// What becomes of an account some time after it was made, while others are made.
    async fn live(&self, role: &str, random: &mut StdRng) {
        let held = self.held.lock().unwrap()[role].clone();
        let lease = format!("/v1/leases/{}", held.credential.lease);
        if random.random_bool(0.2) {
            let increment = random.random_range(2..20);
            // Until it is answered it may be done or not.
            self.change(role, |held| held.unsure = true);
            let asked = self
                .post(&format!("{lease}/renew"), json!({"increment": increment}))
                .await;
            match asked {
                Some((200, answer)) => {
                    let end: Timestamp = answer["expiration"].as_str().unwrap().parse().unwrap();
                    self.change(role, |held| {
                        held.end = end.max(held.end);
                        held.unsure = false;
                    });
                    self.tally.lock().unwrap().renewed += 1;
                    self.log_in(role).await;
                }
                Some((400 | 404 | 409 | 429, _)) => self.change(role, |held| held.unsure = false),
                _ => {}
            }
        }
        if random.random_bool(0.15) {
            self.change(role, |held| held.revoked = true);
            if let Some((200, _)) = self.delete(&lease).await {
                self.tally.lock().unwrap().revoked += 1;
            }
        }
    }

    fn change(&self, role: &str, change: impl FnOnce(&mut Held)) {
        if let Some(held) = self.held.lock().unwrap().get_mut(role) {
            change(held);
        }
    }

    async fn get(&self, path: &str) -> Option<(u16, serde_json::Value)> {
        self.api.try_call(reqwest::Method::GET, path, None).await
    }

    async fn post(&self, path: &str, body: serde_json::Value) -> Option<(u16, serde_json::Value)> {
        self.api
            .try_call(reqwest::Method::POST, path, Some(body))
            .await
    }

    async fn delete(&self, path: &str) -> Option<(u16, serde_json::Value)> {
        self.api.try_call(reqwest::Method::DELETE, path, None).await
    }

    /// A held account must let its holder in, until its end.
    async fn log_in(&self, role: &str) {
        let Some(held) = self.held.lock().unwrap().get(role).cloned() else {
            return;
        };
        let asked = Timestamp::now();
        let login = tokio::time::timeout(seconds(5), held.credential.login()).await;
        let Ok(login) = login else { return };
        self.tally.lock().unwrap().logins += 1;
        let Err(error) = login else { return };
        let refused = error
            .code()
            .is_some_and(|code| code.code().starts_with("28") || code.code().starts_with("3D"));
        // Looked up again: its end may have been asked for meanwhile.
        let now_revoked = self
            .held
            .lock()
            .unwrap()
            .get(role)
            .is_none_or(|held| held.revoked);
        let margin = Duration::from_millis(300);
        if refused && !now_revoked && Timestamp::now() + margin < held.end {
            self.tally.lock().unwrap().violations.push(format!(
                "early death: {role}, lease {}, ends {}, refused at {asked}: {error:?}",
                held.credential.lease, held.end
            ));
        }
    }

    /// Logs in to accounts at random, until there is calm.
    async fn check_logins(&self, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        while !self.calm.load(Ordering::Relaxed) {
            let roles: Vec<String> = self.held.lock().unwrap().keys().cloned().collect();
            if let Some(role) = roles.choose(&mut random) {
                self.log_in(role).await;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Looks at the database's roles and sessions, again and again: what is past its end must go.
    async fn check_ends(&self) {
        loop {
            tokio::time::sleep(Duration::from_millis(150)).await;
            let Some(present) = self.present().await else {
                continue;
            };
            let now = Timestamp::now();
            let mut held = self.held.lock().unwrap();
            let mut tally = self.tally.lock().unwrap();
            held.retain(|role, one| {
                if present.iter().any(|name| name == role) {
                    let late = now.duration_since(one.end);
                    let trouble = tally.trouble_in(one.end, now);
                    let allowed = LATE + trouble;
                    if one.unsure || late.is_negative() || late.unsigned_abs() <= allowed {
                        return true;
                    }
                    tally.violations.push(format!(
                        "too late: {role}, lease {}, ended {}, {late:.1} ago, trouble {trouble:?}",
                        one.credential.lease, one.end
                    ));
                    return false;
                }
                if now < one.end - seconds(1) && !one.revoked {
                    tally.violations.push(format!(
                        "early death: {role}, lease {}, ends {}, absent at {now}",
                        one.credential.lease, one.end
                    ));
                } else if !one.revoked {
                    let late = now.duration_since(one.end);
                    tally.late.push(late.unsigned_abs());
                }
                false
            });
        }
    }

    /// Roles of leases in the database; none while it cannot be asked.
    async fn present(&self) -> Option<Vec<String>> {
        let prefix = prefix(&self.site);
        let looking = self.site.server.try_roles(&prefix);
        tokio::time::timeout(seconds(5), looking).await.ok()?
    }

    /// Nothing is left: no role, no lease that is not settled, no message.
    async fn nothing_is_left(&self, within: Duration) -> Duration {
        let begun = Instant::now();
        let mut left = String::new();
        while begun.elapsed() < within {
            tokio::time::sleep(seconds(1)).await;
            let roles = self.present().await;
            let mut open = 0;
            for state in ["pending", "active", "revoking"] {
                let path = format!("/v1/leases?state={state}&limit=500");
                match self.get(&path).await {
                    Some((200, list)) => open += list["length"].as_u64().unwrap(),
                    // Unknown is not none.
                    _ => open += 1,
                }
            }
            let rabbit = self.system.lock().await.rabbit.handle();
            let messages = tokio::task::spawn_blocking(move || {
                rabbit.messages("mayfly.v1.delay") + rabbit.messages("mayfly.v1.pool")
            })
            .await
            .unwrap();
            if roles.as_ref().is_some_and(Vec::is_empty) && open == 0 && messages == 0 {
                return begun.elapsed();
            }
            left = format!("roles {roles:?}, leases not settled {open}, messages {messages}");
        }
        let mut tally = self.tally.lock().unwrap();
        tally
            .violations
            .push(format!("left after {within:?}: {left}"));
        begun.elapsed()
    }
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let at = sorted.len().saturating_sub(1) * percent / 100;
    sorted.get(at).map_or(0.0, Duration::as_secs_f64)
}

async fn chaos(lasting: Duration, pause_ms: std::ops::Range<u64>, applications: u64) {
    let seed: u64 =
        std::env::var("CHAOS_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("seed {seed}");
    let world = World::new().await;
    let begun = Instant::now();
    let until = begun + lasting;
    let guards = [
        tokio::spawn({
            let world = world.clone();
            async move { world.supervise().await }
        }),
        tokio::spawn({
            let world = world.clone();
            async move { world.check_ends().await }
        }),
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..applications {
        let world = world.clone();
        tasks.spawn(async move { world.apply(until, seed.wrapping_add(n)).await });
    }
    for n in 0..2 {
        let world = world.clone();
        tokio::spawn(async move { world.check_logins(seed.wrapping_add(1000 + n)).await });
    }
    let mut random = StdRng::seed_from_u64(seed);
    while Instant::now() < until {
        world.strike(&mut random).await;
        let pause = random.random_range(pause_ms.clone());
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    tasks.join_all().await;
    for file in [&world.engine_fault, &world.dispatcher_fault] {
        let _ = std::fs::remove_file(file);
    }
    println!(
        "faults end after {:.0} s; the rest runs out",
        begun.elapsed().as_secs_f64()
    );
    let drained = world.nothing_is_left(seconds(240)).await;
    world.calm.store(true, Ordering::Relaxed);
    for guard in guards {
        guard.abort();
    }
    let mut memory = Vec::new();
    for engine in world.engines.lock().await.iter() {
        memory.push(engine.process.resident_mib());
    }
    let dispatcher = world.system.lock().await.dispatcher().resident_mib();
    let mut tally = world.tally.lock().unwrap();
    tally.late.sort();
    println!("faults caused      {}", tally.faults.values().sum::<u32>());
    for (kind, count) in &tally.faults {
        println!("  {count:5}  {kind}");
    }
    println!("leases issued      {}", tally.issued);
    println!("  renewed          {}", tally.renewed);
    println!("  revoked early    {}", tally.revoked);
    println!("requests abandoned {}", tally.abandoned);
    println!("requests refused   {}", tally.refused.values().sum::<u32>());
    for (code, count) in &tally.refused {
        println!("  {count:5}  {code}");
    }
    println!("logins tried       {}", tally.logins);
    let of = |word: &str| {
        tally
            .violations
            .iter()
            .filter(|v| v.starts_with(word))
            .count()
    };
    println!("early deaths       {}", of("early death"));
    println!("too late           {}", of("too late"));
    println!("left at the end    {}", of("left after"));
    println!(
        "lateness in s      p50 {:.2}, p99 {:.2}, worst {:.2} (faults in the way included)",
        percentile(&tally.late, 50),
        percentile(&tally.late, 99),
        percentile(&tally.late, 100),
    );
    println!(
        "all gone           {:.0} s after the last fault",
        drained.as_secs_f64()
    );
    println!("memory in MiB      dispatcher {dispatcher:.0}, engines {memory:.0?}");
    for violation in &tally.violations {
        println!("VIOLATION {violation}");
    }
    assert!(
        tally.violations.is_empty(),
        "{} violations",
        tally.violations.len()
    );
    assert!(tally.issued > 0 && !tally.faults.is_empty());
    assert!(
        dispatcher < 250.0 && memory.iter().all(|mib| *mib < 150.0),
        "memory grows"
    );
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

/// The short form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_chaos() {
    chaos(seconds(number("CHAOS_SECONDS", 40)), 200..1200, 3).await;
}

/// `make chaos`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "ten minutes; `make chaos`"]
async fn long_chaos() {
    let applications = number("CHAOS_APPLICATIONS", 8);
    chaos(
        seconds(number("CHAOS_SECONDS", 600)),
        100..900,
        applications,
    )
    .await;
}

/// Issues `count` leases that end about `after` seconds from now, quickly.
async fn issue_many(world: &Arc<World>, count: usize, ttl: u64) -> Timestamp {
    let mut reads = tokio::task::JoinSet::new();
    let left = Arc::new(std::sync::atomic::AtomicUsize::new(count));
    for _ in 0..16 {
        let (world, left) = (world.clone(), left.clone());
        reads.spawn(async move {
            let mut last = Timestamp::UNIX_EPOCH;
            let one_more = |n: usize| n.checked_sub(1);
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
                .is_ok()
            {
                let path = format!("/v1/secrets/{}?ttl={ttl}", world.path);
                let answer = world.api.ok(&path).await;
                last = last.max(Credential::from_answer(&answer).expiration);
            }
            last
        });
    }
    reads.join_all().await.into_iter().max().unwrap()
}

/// An outage in which a thousand leases fall due. What is asked: all gone within 10 s of its end.
async fn outage(name: &str, begin: impl AsyncFn(&World), end: impl AsyncFn(&World)) {
    let count = usize::try_from(number("CHAOS_LEASES", 1000)).unwrap();
    let world = World::new().await;
    let change = json!({"attributes": {"ttl": 120, "maxTtl": 120}});
    let (status, _) = world
        .api
        .put(&format!("/v1/secrets/{}", world.path), change)
        .await;
    assert_eq!(status, 200);
    let issuing = Instant::now();
    let last = issue_many(&world, count, 60).await;
    println!(
        "{name}: {count} leases issued in {:.1} s",
        issuing.elapsed().as_secs_f64()
    );
    begin(&world).await;
    let begun = Instant::now();
    let left = last.duration_since(Timestamp::now()).unsigned_abs();
    tokio::time::sleep(left.max(seconds(60))).await;
    end(&world).await;
    let back = Instant::now();
    eventually("all are gone", seconds(120), async || {
        world
            .present()
            .await
            .is_some_and(|roles| roles.is_empty())
            .then_some(())
    })
    .await;
    println!(
        "{name}: away for {:.0} s, all {count} gone {:.1} s after its return",
        begun.elapsed().as_secs_f64() - back.elapsed().as_secs_f64(),
        back.elapsed().as_secs_f64()
    );
    assert!(
        back.elapsed() < seconds(30),
        "slower than three times what is wanted"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "two minutes; `make chaos`"]
async fn outage_of_the_broker() {
    let handle = async |world: &World| world.system.lock().await.rabbit.handle();
    outage(
        "broker",
        async |world: &World| {
            let rabbit = handle(world).await;
            tokio::task::spawn_blocking(move || rabbit.kill())
                .await
                .unwrap();
        },
        async |world: &World| {
            let rabbit = handle(world).await;
            tokio::task::spawn_blocking(move || rabbit.start())
                .await
                .unwrap();
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "two minutes; `make chaos`"]
async fn outage_of_the_database() {
    outage(
        "database",
        async |world: &World| world.site.server.kill(),
        async |world: &World| world.site.server.start(),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "two minutes; `make chaos`"]
async fn outage_of_all_engines() {
    outage(
        "engines",
        async |world: &World| world.engines.lock().await.clear(),
        async |world: &World| {
            let engine = world.start_engine().await;
            world.engines.lock().await.push(engine);
        },
    )
    .await;
}
