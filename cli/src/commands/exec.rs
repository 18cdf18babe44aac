//! `mayfly exec` runs a command with a credential of its own, which is revoked when the command ends. This process
//! ignores signals until it has revoked the lease.

use std::convert::Infallible;
use std::ffi::OsString;
use std::future::pending;

use clap::Args;
use rustix::process::Signal;
use serde_json::Value;
use tokio::process::Child;
use tokio::time::Instant;

use crate::Context;
use crate::child::{self, Signals};
use crate::client::Api;
use crate::commands::restart;
use crate::credential::Credential;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::keeper::Lease;
use crate::options::PathArg;
use crate::protection::{self, Protection};
use crate::route::Route;
use crate::signal;
use crate::ui;

const EXAMPLES: &str = "\
The command gets PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD and DATABASE_URL (and, of several
hosts, PGTARGETSESSIONATTRS). It does not get MAYFLY_TOKEN, MAYFLY_TOKEN_FILE and MAYFLY__….
So that libpq protects the connection as the base secret says, it gets PGSSLMODE, PGCHANNELBINDING,
PGREQUIREAUTH and PGSSLROOTCERT if they are not set. While it runs, its lease is renewed, up to
the secret's maxTtl. When it ends, its lease is revoked, unless the secret shares its leases. The exit
status is that of the command, or 127 or 126 if it cannot be started.

With --restart the command gets a new credential before the maxTtl: when a third of it is left, the command gets
--stop-signal, after --grace it is killed, and it is started again. A command that ends by itself is not started again.

Examples:
  mayfly exec db:postgresql:dyn1 -- psql
  mayfly exec --ttl 5m db:postgresql:dyn1 -- pg_dump -f app.sql
  mayfly exec --restart --grace 1m db:postgresql:dyn1 -- ./server
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
    /// Stop the command and start it again with a new credential, before the secret's maxTtl
    #[arg(long)]
    restart: bool,
    /// The signal that stops the command
    #[arg(long, value_name = "SIGNAL", value_parser = signal::named, default_value = "TERM", requires = "restart")]
    stop_signal: Signal,
    /// After this time a command that does not stop is killed
    #[arg(long, value_name = "DURATION", value_parser = seconds, default_value = "30s", requires = "restart")]
    grace: u64,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) async fn run(args: ExecArgs, context: &Context) -> Result<u8, Failure> {
    let path = args.path.required()?;
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::Usage("a COMMAND is needed after --".into()));
    };
    if args.restart {
        let stop = restart::Stop::new(args.stop_signal, args.grace);
        let command = (program.as_os_str(), arguments);
        return restart::run(path, args.ttl, command, &stop, context.api()?).await;
    }
    // This must live until the command has ended.
    let mut protected = None;
    let start = |credential: &Credential, protection: Option<&Protection>| {
        let protection = protection::of_command(protection, credential, protection::is_set)?;
        let started = protection.start(program, arguments, &credential.environment());
        protected = Some(protection);
        Ok(started)
    };
    let done = with_lease(path, args.ttl, context, start).await;
    drop(protected);
    done
}

/// Reads a secret, and runs the command of `start` until it ends. Meanwhile the lease is renewed; at the end it is
/// revoked.
pub(super) async fn with_lease(
    path: &str,
    ttl: Option<u64>,
    context: &Context,
    start: impl FnOnce(&Credential, Option<&Protection>) -> Result<Result<Child, u8>, Failure>,
) -> Result<u8, Failure> {
    let route = Route::secret(path)?.with("ttl", ttl);
    let api = context.api()?;
    let protection = protection::ask(&api, path).await?;
    // From here on signals do not end this process, because it may have a lease to revoke.
    let mut signals = Signals::listen()
        .map_err(|error| Failure::Local(format!("cannot listen for signals: {error}")))?;
    let begun = Instant::now();
    let (answer, stopped) = match ask(&api, &route, &mut signals).await {
        Asked::Answered(answer, stopped) => (answer?, stopped),
        Asked::LeftAtOnce(signal) => return Ok(child::killed_by(signal.as_raw())),
    };
    ui::warnings(&answer);
    let lease = Lease::of(path, answer, ttl, begun)?;
    let done = match stopped {
        Some(signal) => Ok(child::killed_by(signal.as_raw())),
        None => match Credential::read(&lease.answer)
            .and_then(|credential| start(&credential, protection.as_ref()))
        {
            Err(failure) => Err(failure),
            Ok(Err(code)) => Ok(code),
            Ok(Ok(mut child)) => {
                let kept = async {
                    lease.keep(&api).await;
                    pending::<Infallible>().await
                };
                let ended = tokio::select! {
                    ended = child::finish(&mut child, &mut signals) => ended,
                    never = kept => match never {},
                };
                ended.map_err(|error| {
                    Failure::Local(format!("cannot wait for the command: {error}"))
                })
            }
        },
    };
    lease.revoke(&api).await;
    done
}

enum Asked {
    /// The answer, and a signal that came before it.
    Answered(Result<Value, Failure>, Option<Signal>),
    /// A second signal came before the answer.
    LeftAtOnce(Signal),
}

/// Reads the secret. After the first signal it still waits for the answer: without the answer, the lease that the
/// dispatcher has made is unknown and cannot be revoked.
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
                ui::note("waiting for the answer, because its lease must be revoked; a second signal ends this command at once");
            }
        }
    }
}
