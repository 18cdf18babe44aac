//! `mayfly proxy`: PostgreSQL for programs that cannot change their user name.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::Context;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::options::PathArg;
use crate::proxy::{self, DRAIN_SECONDS, LISTEN, Listen, MAX_CONNECTIONS, Settings};

const EXAMPLES: &str = "\
Programs connect to the listener with any user, any password and sslmode disable or prefer. The proxy logs in with the
account of a lease, renews the lease, and takes a new one before its maximum (maxTtl). Sessions that are idle are then
ended with 57P01, and their clients connect again with the new account. A session that is in use at the end of its lease
is cut 1 s before. At the end, the leases are revoked. See docs/proxy.md.

A command gets PGHOST, PGPORT, PGUSER, PGDATABASE and DATABASE_URL, and its exit status is that of this command.

Examples:
  mayfly proxy db:postgresql:dyn1
  mayfly proxy db:postgresql:dyn1 --listen unix:/run/app
  mayfly proxy db:postgresql:dyn1 --listen 127.0.0.1:0 -- ./server
  mayfly proxy --config proxy.toml --admin-listen 127.0.0.1:8474";

/// Where clients connect, and to what.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ProxyArgs {
    #[command(flatten)]
    path: PathArg,
    /// Where clients connect: ADDRESS:PORT, or unix:DIR [default: 127.0.0.1:6432]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    listen: Option<String>,
    /// Life of the credentials, such as 60 or 15m; at most the secret's own ttl
    #[arg(long, value_name = "DURATION", value_parser = seconds, conflicts_with = "config")]
    ttl: Option<u64>,
    /// Keep clients' connections, and give idle sessions the next account under them; for programs that cannot
    /// connect again. See docs/proxy.md for what it cannot know
    #[arg(long, conflicts_with = "config")]
    hold: bool,
    /// A file with the password that clients must know. Without it, only this machine can connect
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    client_password_file: Option<PathBuf>,
    /// Several listeners, in a TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of /healthz, /readyz and /metrics [default: none]
    #[arg(long, value_name = "ADDRESS")]
    admin_listen: Option<SocketAddr>,
    /// Sessions at a time [default: 1000]
    #[arg(long, value_name = "N")]
    max_connections: Option<usize>,
    /// Time for sessions that are in use when the proxy ends [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    drain: Option<u64>,
    /// A command to run, and to end with
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) async fn run(args: ProxyArgs, context: &Context) -> Result<u8, Failure> {
    let mut settings = match (&args.config, args.path.given()?) {
        (Some(_), Some(_)) => {
            return Err(Failure::Usage(
                "a PATH and --config are given; the file names the secrets".into(),
            ));
        }
        (Some(file), None) => Settings::read(file)?,
        (None, _) => Settings {
            listen: vec![Listen {
                secret: args.path.required()?.to_owned(),
                listen: args.listen.unwrap_or_else(|| LISTEN.to_owned()),
                ttl_seconds: args.ttl,
                hold: args.hold,
                client_password_file: args.client_password_file,
            }],
            admin_listen: None,
            max_connections: Some(MAX_CONNECTIONS),
            drain_seconds: Some(DRAIN_SECONDS),
        },
    };
    settings.admin_listen = args.admin_listen.or(settings.admin_listen);
    settings.max_connections = args.max_connections.or(settings.max_connections);
    settings.drain_seconds = args.drain.or(settings.drain_seconds);
    proxy::run(&settings, &args.command, context.api()?).await
}
