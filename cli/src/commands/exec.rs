//! `mayfly exec`: a command with a credential of its own, revoked when the command ends. This process ignores
//! signals until it has revoked the lease.

use std::convert::Infallible;
use std::ffi::OsString;
use std::future::pending;

use clap::Args;
use percent_encoding::percent_decode_str;
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::Instant;

use crate::Context;
use crate::child::{self, Signals};
use crate::client::Api;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::keeper::Lease;
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
    let begun = Instant::now();
    let (answer, stopped) = match ask(&api, &route, &mut signals).await {
        Asked::Answered(answer, stopped) => (answer?, stopped),
        Asked::LeftAtOnce(signal) => return Ok(child::killed_by(signal.as_raw())),
    };
    ui::warnings(&answer);
    let lease = Lease::of(path, answer, args.ttl, begun)?;
    let done = match (stopped, environment(&lease.answer)) {
        (Some(signal), _) => Ok(child::killed_by(signal.as_raw())),
        (None, Err(failure)) => Err(failure),
        (None, Ok(environment)) => match child::start(program, arguments, environment) {
            Ok(child) => {
                let kept = async {
                    lease.keep(&api).await;
                    pending::<Infallible>().await
                };
                let ended = tokio::select! {
                    ended = child::finish(child, &mut signals) => ended,
                    never = kept => match never {},
                };
                ended.map_err(|error| {
                    Failure::Local(format!("cannot wait for the command: {error}"))
                })
            }
            Err(code) => Ok(code),
        },
    };
    lease.revoke(&api).await;
    done
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
}
