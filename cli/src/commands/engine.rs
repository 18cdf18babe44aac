//! `mayfly engine`: which engines live, and whether one answers.

use clap::{Args, Subcommand};

use crate::Context;
use crate::commands::pages;
use crate::failure::Failure;
use crate::options::PageArgs;
use crate::route::Route;
use crate::table::{Column, View};

const EXAMPLES: &str = "\
Examples:
  mayfly engine list
  mayfly engine ping db1-k3x9qa";

const COLUMNS: &[Column] = &[
    Column("NAME", &["/name"]),
    Column("POOL", &["/poolName"]),
    Column("VERSION", &["/version"]),
    Column("IN FLIGHT", &["/inFlight"]),
    Column("STARTED", &["/started"]),
    Column("LAST HEARTBEAT", &["/lastHeartbeat"]),
];

/// Options of `mayfly engine`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EngineArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the live engines
    List {
        #[command(flatten)]
        page: PageArgs,
    },
    /// Show one live engine
    Read {
        /// Name of the engine
        name: String,
        #[command(flatten)]
        of: PoolArgs,
    },
    /// Ask one engine for an answer, through the broker
    Ping {
        /// Name of the engine
        name: String,
        #[command(flatten)]
        of: PoolArgs,
    },
}

#[derive(Args)]
struct PoolArgs {
    /// The engine's pool, if engines of several pools have this name
    #[arg(long, value_name = "POOL")]
    pool: Option<String>,
}

pub(crate) async fn run(args: EngineArgs, context: &Context) -> Result<(), Failure> {
    match args.verb {
        Verb::List { page } => {
            let output = context.output()?;
            let answer =
                pages::list(&context.api()?, || Route::to("engines"), "engines", &page).await?;
            output.show(&answer, &View::List("engines", COLUMNS))
        }
        Verb::Read { name, of } => {
            let route = Route::item("engines", &name)?.with("pool", of.pool.as_deref());
            let output = context.output()?;
            output.show(&context.api()?.get(&route).await?, &View::Record)
        }
        Verb::Ping { name, of } => {
            let route = Route::item("engines", &name)?
                .then("/ping")
                .with("pool", of.pool.as_deref());
            let output = context.output()?;
            let answer = context.api()?.post(&route, None).await?;
            output.changed(&answer, &format!("engine {name} answers"))
        }
    }
}
