//! The `mayfly` command: a thin client of the dispatcher's HTTP API. This file parses the
//! command line, hands over to the noun, and turns what came of it into an exit code.

mod args;
mod client;
mod duration;
mod failure;
mod filter;
mod input;
mod management;
mod manifest;
mod noun;
mod output;
mod route;
mod say;
mod session;
mod table;
mod tls;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Noun};
use crate::client::Api;
use crate::failure::Failure;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            say::error(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

/// What every noun gets: where to ask, and where to put the answer.
struct Context {
    connection: session::ConnectionArgs,
    output: output::OutputArgs,
}

impl Context {
    /// A client with the address and token in use. Made late, so that a mistake on the command
    /// line is told before a missing token.
    fn api(&self) -> Result<Api, Failure> {
        Api::new(&session::Session::resolve(&self.connection)?)
    }

    /// The place for the answer, opened before the call: nothing is asked for that could not be
    /// written down.
    fn output(&self) -> Result<output::Output, Failure> {
        output::Output::open(&self.output)
    }
}

async fn run(cli: Cli) -> Result<u8, Failure> {
    let context = Context {
        connection: cli.connection,
        output: cli.output,
    };
    match cli.noun {
        Noun::Secret(args) => noun::secret::run(args, &context).await,
        Noun::Pool(args) => noun::pool::run(args, &context).await.map(|()| 0),
        Noun::Engine(args) => noun::engine::run(args, &context).await.map(|()| 0),
        Noun::Lease(args) => noun::lease::run(args, &context).await.map(|()| 0),
        Noun::Token(args) => noun::token::run(args, &context).await.map(|()| 0),
        Noun::Exec(args) => noun::exec::run(args, &context).await,
        Noun::Status => noun::status::run(&context).await,
        Noun::Login => noun::login::run(&context).await.map(|()| 0),
        Noun::Init(args) => noun::init::run(&args, &context).await,
        Noun::Uninstall(args) => noun::uninstall::run(args, &context).await,
        Noun::Completions(args) => noun::completions::run(&args, &context).map(|()| 0),
    }
}
