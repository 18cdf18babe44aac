//! `mayfly psql`: psql with a credential of its own.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::Args;
use zeroize::Zeroizing;

use crate::Context;
use crate::agent;
use crate::child;
use crate::commands::exec;
use crate::credential::Credential;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::options::PathArg;
use crate::protection::{self, Protection};

const EXAMPLES: &str = "\
psql finds the password in a file of a private directory, which is removed at its end. Neither its arguments nor its
environment have it. The lease is renewed while psql runs, up to the secret's maxTtl, and revoked when it ends. The exit
status is that of psql (127 where it cannot be found). Its connection is protected as the base secret says, or more
where PGSSLMODE or PGCHANNELBINDING ask for it.

Examples:
  mayfly psql db:postgresql:dyn1
  mayfly psql db:postgresql:dyn1 -- -Atc 'SELECT count(*) FROM orders'
  mayfly psql db:postgresql:dyn1 -- -f migration.sql";

/// Directories of the programs of each version, in Debian and in the PostgreSQL project's packages.
const PACKAGES: &[&str] = &["/usr/lib/postgresql", "/usr/pgsql"];

/// A session of psql.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PsqlArgs {
    #[command(flatten)]
    path: PathArg,
    /// Life of the credential, such as 60 or 15m; at most the secret's own ttl
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    ttl: Option<u64>,
    /// Arguments of psql
    #[arg(last = true, value_name = "ARGS")]
    arguments: Vec<OsString>,
}

pub(crate) async fn run(args: PsqlArgs, context: &Context) -> Result<u8, Failure> {
    let path = args.path.required()?;
    let psql = find()?;
    // These must live until psql has ended.
    let mut files = None;
    let start = |credential: &Credential, protection: Option<&Protection>| {
        let protected = protection::of_command(protection, credential, protection::is_stricter)?;
        let private = child::private_directory()?;
        let file = private.path().join("pgpass");
        agent::write_password_file(credential, file.clone())?;
        let mut variables = credential.environment();
        variables.retain(|(name, _)| !matches!(*name, "PGPASSWORD" | "DATABASE_URL"));
        let file = file.to_string_lossy().into_owned();
        variables.push(("PGPASSFILE", Zeroizing::new(file)));
        let started = protected.start(psql.as_os_str(), &args.arguments, &variables);
        files = Some((private, protected));
        Ok(started)
    };
    let done = exec::with_lease(path, args.ttl, context, start).await;
    drop(files);
    done
}

/// The first psql in PATH, or else that of the newest PostgreSQL package.
fn find() -> Result<PathBuf, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|directory| directory.join("psql"));
    let mut in_packages: Vec<(u32, PathBuf)> = PACKAGES
        .iter()
        .filter_map(|place| fs::read_dir(place).ok())
        .flat_map(|versions| versions.flatten())
        .filter_map(|version| {
            let number = version.file_name().to_str()?.parse().ok()?;
            Some((number, version.path().join("bin/psql")))
        })
        .collect();
    in_packages.sort_unstable_by(|a, b| b.cmp(a));
    in_path
        .chain(in_packages.into_iter().map(|(_, file)| file))
        .find(|file| {
            fs::metadata(file).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
        })
        .ok_or_else(|| {
            Failure::Local(
                "psql is not found: install a PostgreSQL client, such as postgresql-client".into(),
            )
        })
}
