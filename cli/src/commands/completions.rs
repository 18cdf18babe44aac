//! `mayfly completions`: scripts for shells.

use clap::{Args, Command};
use clap_complete::{Shell, generate};

use crate::Context;
use crate::failure::Failure;

const EXAMPLES: &str = "\
Examples:
  mayfly completions bash > ~/.local/share/bash-completion/completions/mayfly
  mayfly completions zsh > ~/.zfunc/_mayfly
  mayfly completions fish > ~/.config/fish/completions/mayfly.fish";

/// Options of `mayfly completions`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// The shell to complete for
    shell: Shell,
}

/// Prints the script for `cli`, the whole command line.
pub(crate) fn run(
    args: &CompletionsArgs,
    mut cli: Command,
    context: &Context,
) -> Result<(), Failure> {
    let mut script = Vec::new();
    generate(args.shell, &mut cli, "mayfly", &mut script);
    context.output()?.text(&String::from_utf8_lossy(&script))
}
