//! `mayfly agent` and `mayfly exec --restart`: programs that cannot follow a changing user name always have a working
//! credential.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::process::{Process, free_port};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use rustix::process::Signal;
use serde_json::{Value, json};

async fn furnished(server: Server, attributes: Value) -> (System, Site, String, Engine) {
    Scenario::on(server).attributes(attributes).start().await
}

fn agent(system: &System, arguments: &[&str]) -> Process {
    let cli = Cli { system };
    let command = cli.command(&[&["agent"], arguments].concat());
    // The agent runs in the tests' directory, unlike the command line.
    let mut inside = Command::new("env");
    inside.arg("-C").arg(&system.directory);
    inside.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        inside.env(name, value.unwrap_or_default());
    }
    Process::start(&inside, &system.directory.join("agent.log"))
}

/// The credential in a JSON file, if it is there. A file that is not whole fails the test.
fn credential(file: &Path) -> Option<Credential> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut data: Value =
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("not whole: {text}"));
    data["expiration"] = json!(jiff::Timestamp::now().to_string());
    Some(Credential::from_answer(&json!({ "data": data })))
}

async fn http(port: u16, head: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Ok(mut stream) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await else {
        return String::new();
    };
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

/// Whether psql logs in by a service file and a password file.
fn by_service(site: &Site, directory: &Path) -> Result<String, String> {
    let output = Command::new(site.server.program("psql"))
        .args(["-XAtc", "SELECT current_user", "service=mayfly"])
        .env("PGSERVICEFILE", directory.join("service"))
        .output()
        .unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// For 50 s a program reads the file and logs in, every 0.25 s. No login is refused, over several accounts, and no
/// account lives longer than its TTL.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_has_a_credential_that_works_at_all_times() {
    let attributes = json!({"ttl": 10, "maxTtl": 25});
    let (system, site, path, _engine) = furnished(Server::pg15(), attributes).await;
    let directory = system.directory.clone();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let file = |name: &str| directory.join(name);
    std::fs::write(file("app.j2"), "user = {{ username|conninfo }}\n").unwrap();
    let running = agent(
        &system,
        &[
            &path,
            "--json",
            "json",
            "--env",
            "env",
            "--jdbc",
            "jdbc",
            "--pgpass",
            "pgpass",
            "--pg-service",
            "service",
            "--template",
            "app.j2:app.conf",
            "--on-change",
            "echo changed >>changes",
            "--listen",
            &listen,
        ],
    );
    eventually("it is ready", seconds(60), async || {
        let answer = http(port, "GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n").await;
        answer.contains(" 200 ").then_some(())
    })
    .await;
    for name in ["json", "env", "jdbc", "pgpass", "service", "app.conf"] {
        let mode = std::fs::metadata(file(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let (mut users, began, mut round) = (Vec::<String>::new(), Instant::now(), 0);
    while began.elapsed() < seconds(50) {
        let newest = credential(&file("json")).unwrap();
        if let Err(error) = newest.login().await {
            panic!(
                "{} is refused after {:?}: {error}",
                newest.username,
                began.elapsed()
            );
        }
        if round % 4 == 0 {
            let user = by_service(&site, &directory);
            assert!(user.is_ok(), "{user:?} after {:?}", began.elapsed());
        }
        if users.last() != Some(&newest.username) {
            users.push(newest.username);
        }
        round += 1;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert!(users.len() >= 3, "{users:?}");
    let distinct: BTreeSet<&String> = users.iter().collect();
    assert_eq!(
        distinct.len(),
        users.len(),
        "a credential came back: {users:?}"
    );
    // Of three accounts at most two live: the newest, and the previous one until its end.
    eventually(
        "earlier accounts are gone at their end",
        seconds(15),
        async || {
            let roles = site.server.roles(&users[0]).await;
            roles.is_empty().then_some(())
        },
    )
    .await;
    let changes = std::fs::read_to_string(file("changes")).unwrap();
    assert!(changes.lines().count() >= users.len(), "{changes}");
    let page = "POST /quit HTTP/1.1\r\nhost: x\r\norigin: https://evil.example\r\n\r\n";
    assert!(http(port, page).await.contains(" 403 "));
    let quit = http(port, "POST /quit HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(quit.contains(" 200 "), "{quit}");
    eventually("it ends", seconds(30), async || {
        (!running.is_alive()).then_some(())
    })
    .await;
    site.no_accounts(seconds(15)).await;
    // No secret is logged, and the user is warned of the short overlap.
    let log = std::fs::read_to_string(file("agent.log")).unwrap();
    assert!(log.contains("previous account lives for"), "{log}");
    let last = credential(&file("json")).unwrap();
    assert!(!log.contains(&last.password), "{log}");
}

/// The agent is killed in the middle of a write, several times: a reader never sees a part of a file, and the next
/// agent leaves no other file.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_whole_when_the_agent_is_killed() {
    let (system, site, path, _engine) = furnished(Server::pg18(), json!({"ttl": 20})).await;
    let directory = system.directory.clone();
    // The file has some megabytes, so that the write takes a while.
    let rows = "{% for i in range(40) %}{% for j in range(1000) %}{{ username }} {{ password }}\n{% endfor %}{% endfor %}";
    std::fs::write(
        directory.join("big.j2"),
        format!("{rows}end {{{{ username }}}}\n"),
    )
    .unwrap();
    let (big, beside) = (directory.join("big"), directory.join(".big.mayfly-new"));
    let (mut caught, mut written) = (0, BTreeSet::new());
    for _ in 0..10 {
        let running = agent(&system, &[&path, "--template", "big.j2:big"]);
        // The check at the start makes an empty file there.
        let began = Instant::now();
        while std::fs::metadata(&beside).map_or(0, |file| file.len()) == 0 {
            assert!(began.elapsed() < seconds(60), "it writes nothing");
            if std::fs::read_to_string(&big).is_ok_and(|text| {
                text.rsplit("end ")
                    .next()
                    .is_some_and(|user| written.insert(user.to_owned()))
            }) {
                // The write was complete before the agent was killed.
                break;
            }
        }
        running.kill();
        caught += i32::from(beside.exists());
        if let Ok(text) = std::fs::read_to_string(&big) {
            let user = text
                .lines()
                .next()
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .to_owned();
            assert!(text.ends_with(&format!("end {user}\n")), "a part of a file");
            assert_eq!(text.lines().count(), 40_001);
        }
    }
    assert!(caught > 0, "no write was interrupted");
    let once = Cli { system: &system };
    once.ok(&[
        "agent",
        &path,
        "--once",
        "--template",
        "big.j2:big",
        "--json",
        "json",
    ]);
    assert!(!beside.exists());
    // With --once the lease stays.
    let last = credential(&directory.join("json")).unwrap();
    assert!(last.login().await.is_ok());
    site.no_accounts(seconds(60)).await;
}

/// The end of a watched process ends the agent, which revokes its lease; with `--keep` the account lives until its
/// end.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_ends_with_a_process() {
    let (system, site, path, _engine) = furnished(Server::pg18(), json!({"ttl": 600})).await;
    let json = system.directory.join("json");
    for is_keeping in [false, true] {
        let watched = Process::start(
            Command::new("sleep").arg("1000"),
            &system.directory.join("sleep.log"),
        );
        let id = watched.id().to_string();
        let keep: &[&str] = if is_keeping { &["--keep"] } else { &[] };
        let _ = std::fs::remove_file(&json);
        let running = agent(
            &system,
            &[&[&path, "--json", "json", "--watch-pid", &id], keep].concat(),
        );
        let credential =
            eventually("it has written", seconds(60), async || credential(&json)).await;
        assert!(credential.login().await.is_ok());
        assert!(running.is_alive());
        watched.kill();
        eventually("the agent ends", seconds(30), async || {
            (!running.is_alive()).then_some(())
        })
        .await;
        if is_keeping {
            assert!(credential.login().await.is_ok(), "the account was ended");
        } else {
            system.gone(&site, &credential, seconds(20)).await;
        }
    }
    let cli = Cli { system: &system };
    let said = cli.fails(
        2,
        &["agent", &path, "--json", "json", "--watch-pid", "999999999"],
    );
    assert!(said.contains("--watch-pid"), "{said}");
    let said = cli.fails(3, &["agent", "no:such", "--json", "json"]);
    assert!(said.contains("not_found"), "{said}");
    let said = cli.fails(1, &["agent", &path, "--json", "no/such/json"]);
    assert!(said.contains("no/such/json"), "{said}");
}

/// The command is started again with each new credential. When it ends by itself, `exec` ends.
#[tokio::test(flavor = "multi_thread")]
async fn exec_starts_its_command_again_with_a_new_credential() {
    let attributes = json!({"ttl": 12, "maxTtl": 24});
    let (system, site, path, _engine) = furnished(Server::pg15(), attributes).await;
    let directory = system.directory.clone();
    let psql = site.server.program("psql");
    let script = format!(
        "trap 'echo stopped >>stops; exit 0' TERM\n\
         {} -XAtc 'SELECT current_user' >>users || exit 9\n\
         while [ ! -e end ]; do sleep 0.1; done\nexit 7\n",
        psql.display()
    );
    std::fs::write(directory.join("server.sh"), script).unwrap();
    let cli = Cli { system: &system };
    let mut command = cli.command(&["exec", "--restart", &path, "--", "sh", "server.sh"]);
    let running = tokio::task::spawn_blocking(move || command.output().unwrap());
    let users = eventually("it has run with three accounts", seconds(120), async || {
        let users = std::fs::read_to_string(directory.join("users")).unwrap_or_default();
        (users.lines().count() >= 3).then_some(users)
    })
    .await;
    let users: BTreeSet<&str> = users.lines().collect();
    assert_eq!(users.len(), 3, "{users:?}");
    std::fs::write(directory.join("end"), "").unwrap();
    let ended = running.await.unwrap();
    assert_eq!(ended.status.code(), Some(7), "{ended:?}");
    let stops = std::fs::read_to_string(directory.join("stops")).unwrap();
    assert_eq!(stops.lines().count(), 2, "{stops}");
    site.no_accounts(seconds(20)).await;

    // A signal to `exec` is for the command, and is no reason to start it again.
    std::fs::remove_file(directory.join("end")).unwrap();
    std::fs::remove_file(directory.join("users")).unwrap();
    let mut outer = Command::new("env");
    outer.arg("-C").arg(&directory);
    let command = cli.command(&["exec", "--restart", &path, "--", "sh", "server.sh"]);
    outer.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        outer.env(name, value.unwrap_or_default());
    }
    let process = Process::start(&outer, &directory.join("exec.log"));
    eventually("it runs", seconds(60), async || {
        let users = std::fs::read_to_string(directory.join("users")).unwrap_or_default();
        (users.lines().count() == 1).then_some(())
    })
    .await;
    process.signal(Signal::TERM);
    eventually("it ends", seconds(30), async || {
        (!process.is_alive()).then_some(())
    })
    .await;
    let users = std::fs::read_to_string(directory.join("users")).unwrap();
    assert_eq!(users.lines().count(), 1, "{users}");
}
