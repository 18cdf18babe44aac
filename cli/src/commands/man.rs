//! `mayfly man`: manual pages, for packages.

use std::path::PathBuf;

use clap::{Args, Command};

use crate::failure::Failure;

/// The directory for the pages.
#[derive(Args)]
pub(crate) struct ManArgs {
    /// A directory that exists
    directory: PathBuf,
}

/// Writes a page for each command of `cli`: `mayfly.1`, `mayfly-secret-read.1` and so on.
pub(crate) fn run(args: &ManArgs, cli: Command) -> Result<(), Failure> {
    clap_mangen::generate_to(cli, &args.directory).map_err(|error| {
        Failure::Local(format!(
            "cannot write to {}: {error}",
            args.directory.display()
        ))
    })
}
