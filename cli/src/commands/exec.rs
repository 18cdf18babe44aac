//! `mayfly exec`: a command with a credential of its own, revoked when the command ends. This process ignores
//! signals until it has revoked the lease.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::future::pending;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use rustix::process::{Pid, Signal, getpgrp, kill_process};
use rustix::termios::tcgetpgrp;
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind};
use tokio::time::sleep;

use crate::Context;
use crate::client::Api;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::options::PathArg;
use crate::route::Route;
use crate::ui;

const EXAMPLES: &str = "\
The command gets PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD and DATABASE_URL (and, of several
hosts, PGTARGETSESSIONATTRS), and none of MAYFLY_TOKEN,
MAYFLY_TOKEN_FILE and MAYFLY__…. While it runs, its lease is renewed, up to the secret's maxTtl. When it ends, its lease
is revoked (unless the secret shares its leases), and its exit status is that of this command (127 or
126 where it could not be started).

Examples:
  mayfly exec db:postgresql:dyn1 -- psql
  mayfly exec --ttl 5m db:postgresql:dyn1 -- pg_dump -f app.sql
  mayfly exec db:postgresql:dyn1 -- sh -c 'psql \"$DATABASE_URL\" -c \"select 1\"'";

/// The revocation of the lease may delay the end by this time.
const REVOKE_SECONDS: u64 = 10;
/// A failed renewal is tried again within this time.
const AGAIN: Duration = Duration::from_secs(5);

/// A command to run.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    path: PathArg,
    /// Life of the credential, such as 60 or 15m; at most the secret's own ttl
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    ttl: Option<u64>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) async fn run(args: ExecArgs, context: &Context) -> Result<u8, Failure> {
    let path = args.path.required()?;
    let route = Route::secret(path)?.with("ttl", args.ttl);
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::Usage("a COMMAND is needed after --".into()));
    };
    let api = context.api()?;
    // From here on a signal does not end this process, which may have a lease to give back.
    let mut signals = Signals::listen()
        .map_err(|error| Failure::Local(format!("cannot listen for signals: {error}")))?;
    let (answer, stopped) = match ask(&api, &route, &mut signals).await {
        Asked::Answered(answer, stopped) => (answer?, stopped),
        Asked::LeftAtOnce(signal) => return Ok(killed_by(signal.as_raw())),
    };
    ui::warnings(&answer);
    let Some(lease) = answer.pointer("/data/leaseId").and_then(Value::as_str) else {
        return Err(Failure::Local(format!(
            "{path} is not a dynamic secret: it has no lease"
        )));
    };
    let done = match (stopped, environment(&answer)) {
        (Some(signal), _) => Ok(killed_by(signal.as_raw())),
        (None, Err(failure)) => Err(failure),
        (None, Ok(environment)) => {
            let mut command = Command::new(program);
            command
                .args(arguments)
                .envs(environment)
                // They would direct the connection, and with it the password, to another server.
                .env_remove("PGHOSTADDR")
                .env_remove("PGSERVICE");
            for name in std::env::vars_os()
                .map(|(name, _)| name)
                .filter(|name| is_ours(name))
            {
                command.env_remove(name);
            }
            match command.spawn() {
                Ok(child) => {
                    let ended = tokio::select! {
                        ended = finish(child, &mut signals) => ended,
                        never = keep_alive(&api, lease, life(&answer, args.ttl), is_shared(&answer)) => match never {},
                    };
                    ended.map_err(|error| {
                        Failure::Local(format!("cannot wait for the command: {error}"))
                    })
                }
                Err(error) => {
                    ui::error(&Failure::Local(format!(
                        "cannot run {}: {error}",
                        program.display()
                    )));
                    Ok(if error.kind() == io::ErrorKind::NotFound {
                        127
                    } else {
                        126
                    })
                }
            }
        }
    };
    // Another caller may use a shared lease; it ends by itself.
    if !is_shared(&answer) {
        revoke(&api, lease, &answer).await;
    }
    done
}

fn is_shared(answer: &Value) -> bool {
    answer.pointer("/attributes/share") == Some(&Value::Bool(true))
}

/// Seconds by which the lease is renewed: the requested life, or else the secret's TTL.
fn life(answer: &Value, asked: Option<u64>) -> u64 {
    let whole = answer.pointer("/data/ttl").and_then(Value::as_u64);
    asked.or(whole).unwrap_or(0)
}

/// Renews the lease at each half of its life, and near its maximum up to the maximum. Ends with the command.
async fn keep_alive(api: &Api, lease: &str, life: u64, is_shared: bool) -> Infallible {
    if life == 0 {
        return pending().await;
    }
    let mut wait = match is_shared {
        // Other users of a shared lease may have renewed it.
        true => Duration::ZERO,
        false => Duration::from_secs(life) / 2,
    };
    let mut increment = life;
    let mut is_last = false;
    loop {
        sleep(wait).await;
        match renew(api, lease, increment).await {
            Ok(()) if is_last => return pending().await,
            Ok(()) => wait = Duration::from_secs(increment) / 2,
            Err(Failure::Refused(refusal)) if refusal.status == 400 && !is_last => {
                is_last = true;
                wait = Duration::ZERO;
                match left(api, lease).await {
                    Some(left) if left > 0 => increment = left,
                    _ => return pending().await,
                }
            }
            Err(Failure::Refused(refusal)) if refusal.status < 500 => {
                ui::warning(&format!(
                    "lease {lease} is not renewed: {}",
                    refusal.message
                ));
                return pending().await;
            }
            // It is tried again: half of its life is left.
            Err(_) => {
                wait = AGAIN
                    .min(Duration::from_secs(life) / 20)
                    .max(Duration::from_secs(1))
            }
        }
    }
}

async fn renew(api: &Api, lease: &str, increment: u64) -> Result<(), Failure> {
    let route = Route::item("leases", lease)?.then("/renew");
    let body = json!({ "increment": increment });
    api.post(&route, Some(&body)).await.map(drop)
}

/// Seconds to the lease's maximum, less a margin for the call.
async fn left(api: &Api, lease: &str) -> Option<u64> {
    let lease = api.get(&Route::item("leases", lease).ok()?).await.ok()?;
    let date = |member: &str| lease.get(member)?.as_str()?.parse::<Timestamp>().ok();
    let most = date("maxExpiration")?;
    let left = most.duration_since(Timestamp::now()).as_secs() - 2;
    ui::note(&format!(
        "the lease reaches its maximum at {most:.0} and cannot be renewed beyond it"
    ));
    u64::try_from(left).ok()
}

enum Asked {
    /// The answer, and the signal that came before it, if any.
    Answered(Result<Value, Failure>, Option<Signal>),
    /// A second signal came before the answer.
    LeftAtOnce(Signal),
}

/// Reads the secret. The first signal waits for the answer: without it, the lease that the dispatcher has made
/// is unknown here and cannot be revoked.
async fn ask(api: &Api, route: &Route, signals: &mut Signals) -> Asked {
    let read = api.get_long(route);
    tokio::pin!(read);
    let mut stopped = None;
    loop {
        tokio::select! {
            answer = &mut read => return Asked::Answered(answer, stopped),
            signal = signals.next() => {
                if stopped.replace(signal).is_some() {
                    return Asked::LeftAtOnce(signal);
                }
                ui::note("waiting for the answer, to revoke its lease; press again to leave at once");
            }
        }
    }
}

/// Whether the command must not have this variable: a token, the file of a token, or a setting of dispatcher or
/// engine, which may be a secret.
fn is_ours(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b"MAYFLY_TOKEN") || name.starts_with(b"MAYFLY__")
}

/// The variables that libpq and most drivers read.
fn environment(answer: &Value) -> Result<Vec<(&'static str, String)>, Failure> {
    let mut environment = [
        ("PGHOST", "host"),
        ("PGPORT", "port"),
        ("PGDATABASE", "database"),
        ("PGUSER", "username"),
        ("PGPASSWORD", "password"),
        ("DATABASE_URL", "url"),
    ]
    .into_iter()
    .map(
        |(name, field)| match answer.pointer(&format!("/data/{field}")) {
            Some(Value::String(text)) => Ok((name, text.clone())),
            Some(Value::Number(number)) => Ok((name, number.to_string())),
            _ => Err(Failure::Local(format!(
                "the answer does not have data.{field}"
            ))),
        },
    )
    .collect::<Result<Vec<_>, Failure>>()?;
    let host = environment[0].1.as_str();
    if host.contains(',') {
        let (hosts, ports) = hosts_and_ports(&environment[5].1)
            .ok_or_else(|| Failure::Local("data.url does not name hosts and ports".to_owned()))?;
        environment[0].1 = hosts;
        environment[1].1 = ports;
        environment.push(("PGTARGETSESSIONATTRS", "read-write".to_owned()));
    } else if let Some(address) = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        // libpq takes it without brackets. An older dispatcher answers it as it was written.
        environment[0].1 = address.to_owned();
    }
    Ok(environment)
}

/// For several hosts libpq takes the names in one variable and the ports, one for each, in another.
fn hosts_and_ports(url: &str) -> Option<(String, String)> {
    let (_, rest) = url.split_once('@')?;
    let (places, _) = rest.split_once('/')?;
    let both: Option<Vec<_>> = places
        .split(',')
        .map(|place| place.rsplit_once(':'))
        .collect();
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for (host, port) in both? {
        // Directories of sockets are percent-encoded in a URL.
        let host = percent_decode_str(host.trim_matches(['[', ']']));
        hosts.push(host.decode_utf8().ok()?.into_owned());
        ports.push(port);
    }
    Some((hosts.join(","), ports.join(",")))
}

/// Waits for the command and passes signals on to it.
async fn finish(mut child: Child, signals: &mut Signals) -> io::Result<u8> {
    loop {
        tokio::select! {
            status = child.wait() => return Ok(exit_code(status?)),
            signal = signals.next() => {
                // Until the child was waited for, no other process has its id.
                let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
                if let Some(id) = id.filter(|_| !has_it_already(signal)) {
                    // A command that has just ended needs no signal.
                    let _ = kill_process(id, signal);
                }
            }
        }
    }
}

/// A terminal sends its signals to the whole foreground group, the command included. Many programs treat a second
/// one as an order to end at once.
fn has_it_already(signal: Signal) -> bool {
    let typed = signal == Signal::INT || signal == Signal::QUIT;
    typed
        && File::open("/dev/tty")
            .is_ok_and(|terminal| tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp()))
}

async fn revoke(api: &Api, lease: &str, answer: &Value) {
    let call = async {
        let route = Route::item("leases", lease)?;
        api.delete(&route).await
    };
    let why = match tokio::time::timeout(Duration::from_secs(REVOKE_SECONDS), call).await {
        Ok(Ok(_)) => return,
        Ok(Err(failure)) => failure.to_string(),
        Err(_) => format!("no answer within {REVOKE_SECONDS} s"),
    };
    let end = answer
        .pointer("/data/expiration")
        .and_then(Value::as_str)
        .unwrap_or("its expiration");
    ui::warning(&format!(
        "lease {lease} is not revoked: {why}; it ends by itself at {end}"
    ));
}

fn exit_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(1),
        (None, Some(signal)) => killed_by(signal),
        (None, None) => 1,
    }
}

fn killed_by(signal: i32) -> u8 {
    u8::try_from(signal).map_or(1, |signal| signal.saturating_add(128))
}

struct Signals {
    interrupt: unix::Signal,
    quit: unix::Signal,
    terminate: unix::Signal,
    hangup: unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: unix::signal(SignalKind::interrupt())?,
            quit: unix::signal(SignalKind::quit())?,
            terminate: unix::signal(SignalKind::terminate())?,
            hangup: unix::signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.quit.recv() => Signal::QUIT,
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hangup.recv() => Signal::HUP,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_environment_is_whole_or_nothing() {
        let data = json!({"data": {"host": "db", "port": 5432, "database": "app", "username": "u",
            "password": "p", "url": "postgresql://u:p@db:5432/app"}});
        let environment = environment(&data).unwrap();
        assert_eq!(environment[1], ("PGPORT", "5432".to_owned()));
        assert_eq!(environment.len(), 6);
        let data = json!({"data": {"host": "db1,db2:5433,[::1]", "port": 5432, "database": "app",
            "username": "u", "password": "p",
            "url": "postgresql://u:p%40@db1:5432,db2:5433,[::1]:5432/app?target_session_attrs=read-write"}});
        let environment = super::environment(&data).unwrap();
        assert_eq!(environment[0], ("PGHOST", "db1,db2,::1".to_owned()));
        assert_eq!(environment[1], ("PGPORT", "5432,5433,5432".to_owned()));
        assert_eq!(
            environment[6],
            ("PGTARGETSESSIONATTRS", "read-write".to_owned())
        );
        assert!(super::environment(&json!({"data": {"host": "db"}})).is_err());
        let data = json!({"data": {"host": "/run/pg,db2", "port": 5432, "database": "app", "username": "u",
            "password": "p", "url": "postgresql://u:p@%2Frun%2Fpg:5432,db2:5432/app"}});
        let environment = super::environment(&data).unwrap();
        assert_eq!(environment[0], ("PGHOST", "/run/pg,db2".to_owned()));
    }

    /// PostgreSQL documentation, 34.15, PGHOST: an IPv6 host has brackets in a URL, and none in a variable.
    #[test]
    fn an_address_of_version_6_is_bare() {
        for host in ["[::1]", "::1"] {
            let data = json!({"data": {"host": host, "port": 5432, "database": "app", "username": "u",
                "password": "p", "url": "postgresql://u:p@[::1]:5432/app"}});
            let environment = environment(&data).unwrap();
            assert_eq!(environment[0], ("PGHOST", "::1".to_owned()), "{host}");
        }
    }

    #[test]
    fn tokens_and_settings_are_kept_from_the_command() {
        for name in ["MAYFLY_TOKEN", "MAYFLY_TOKEN_FILE", "MAYFLY__AMQP__URL"] {
            assert!(is_ours(OsStr::new(name)), "{name}");
        }
        for name in ["MAYFLY_ADDRESS", "PGHOST", "PATH"] {
            assert!(!is_ours(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn the_commands_status_is_ours() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(15)), 143);
        assert_eq!(killed_by(2), 130);
    }
}
