//! The `mayfly` command: a thin client of the dispatcher's HTTP API. This file parses the
//! command line, runs the command, and turns the result into an exit code.

mod agent;
mod args;
mod child;
mod client;
mod commands;
mod credential;
mod duration;
mod failure;
mod filter;
mod input;
mod keeper;
mod listener;
mod management;
mod manifest;
mod options;
mod output;
mod protection;
mod proxy;
mod route;
mod session;
mod signal;
mod table;
mod tls;
mod ui;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tokio::runtime::Builder;

use crate::args::{Cli, Command};
use crate::client::Api;
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut runtime = match cli.command {
        // The proxy serves many connections.
        Command::Proxy(_) => {
            let mut runtime = Builder::new_multi_thread();
            runtime.worker_threads(proxy::threads());
            runtime
        }
        _ => Builder::new_current_thread(),
    };
    let done = match runtime.enable_all().build() {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err(Failure::Local(format!("cannot start: {error}"))),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            ui::error(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

/// The context of every command: the connection to the dispatcher, and the place for the answer.
struct Context {
    connection: session::ConnectionArgs,
    output: output::OutputArgs,
}

impl Context {
    /// A client with the address and token in use. It is made late, so that a mistake on the command line is
    /// reported before a missing token.
    fn api(&self) -> Result<Api, Failure> {
        Api::new(&session::Session::resolve(&self.connection)?)
    }

    /// The place for the answer. It is opened before the call, so that a credential is requested only if it can be
    /// written.
    fn output(&self) -> Result<output::Output, Failure> {
        output::Output::open(&self.output)
    }
}

async fn run(cli: Cli) -> Result<u8, Failure> {
    let context = Context {
        connection: cli.connection,
        output: cli.output,
    };
    match cli.command {
        Command::Secret(args) => commands::secret::run(args, &context).await,
        Command::Pool(args) => commands::pool::run(args, &context).await.map(|()| 0),
        Command::Engine(args) => commands::engine::run(args, &context).await.map(|()| 0),
        Command::Lease(args) => commands::lease::run(args, &context).await,
        Command::Token(args) => commands::token::run(args, &context).await.map(|()| 0),
        Command::Agent(args) => agent::run(args, || context.api()).await.map(|()| 0),
        Command::Exec(args) => commands::exec::run(args, &context).await,
        Command::Proxy(args) => commands::proxy::run(args, &context).await,
        Command::Psql(args) => commands::psql::run(args, &context).await,
        Command::Status(args) => commands::status::run(&args, &context).await,
        Command::Login => commands::login::run(&context).await.map(|()| 0),
        Command::Init(args) => commands::init::run(&args, &context).await,
        Command::Uninstall(args) => commands::uninstall::run(args, &context).await,
        Command::Completions(args) => {
            commands::completions::run(&args, Cli::command(), &context).map(|()| 0)
        }
        Command::Man(args) => commands::man::run(&args, Cli::command()).map(|()| 0),
        Command::Paths(args) => commands::completions::paths(&args, &context)
            .await
            .map(|()| 0),
    }
}
