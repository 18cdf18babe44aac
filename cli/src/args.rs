//! The top of the command line: the commands and the options that all of them accept. The subcommands of
//! a command are in its own file.

use clap::{Parser, Subcommand};

use crate::agent::AgentArgs;
use crate::commands::{
    completions, engine, exec, init, lease, man, pool, proxy, psql, secret, status, token,
    uninstall,
};
use crate::output::OutputArgs;
use crate::session::ConnectionArgs;

const AFTER_HELP: &str = "\
Examples:
  mayfly login
  mayfly pool create pool1 --key-file pool1.key
  mayfly secret create --body @root.json
  mayfly secret read db:postgresql:dyn1 -f data.password
  mayfly exec db:postgresql:dyn1 -- psql

Exit codes:
  0  done
  1  refused or failed
  2  usage
  3  not found
  4  not allowed
  5  dispatcher, engine, broker, store or database unavailable
  `exec` and `proxy` end with the status of their command";

/// Short-lived PostgreSQL credentials from Mayfly
#[derive(Parser)]
#[command(name = "mayfly", version, after_help = AFTER_HELP, arg_required_else_help = true)]
#[command(max_term_width = 100, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What is acted upon.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Store, read and describe secrets; reading a dynamic one issues a credential
    Secret(secret::SecretArgs),
    /// Make and drop pools of engines
    Pool(pool::PoolArgs),
    /// See and ping live engines
    Engine(engine::EngineArgs),
    /// See and revoke leases
    Lease(lease::LeaseArgs),
    /// Make and revoke tokens that may read some secrets
    Token(token::TokenArgs),
    /// Run a command with a dynamic secret's credential in its environment
    Exec(exec::ExecArgs),
    /// Run psql with a dynamic secret's credential
    Psql(psql::PsqlArgs),
    /// Keep files with a valid credential, for programs that read them
    Agent(AgentArgs),
    /// Be a PostgreSQL server for local programs, with a dynamic secret's credentials behind it
    Proxy(proxy::ProxyArgs),
    /// Show the dispatcher, the broker and every pool at a glance
    #[command(
        after_help = "Exits with 5 when the dispatcher cannot be reached or the broker is down."
    )]
    Status(status::StatusArgs),
    /// Check a token and keep it for later commands
    #[command(after_help = crate::session::LOGIN_HELP)]
    Login,
    /// Make the keys of a new installation, or prepare its broker
    Init(init::InitArgs),
    /// Remove what Mayfly has made on the database servers
    Uninstall(uninstall::UninstallArgs),
    /// Print a shell's completion script
    Completions(completions::CompletionsArgs),
    /// Write the manual pages
    #[command(hide = true)]
    Man(man::ManArgs),
    /// Print the paths of secrets that begin with a text, for completions
    #[command(name = "__paths", hide = true)]
    Paths(completions::PathsArgs),
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
