//! `mayfly token`: tokens that may read some secrets and nothing else.

use clap::{Args, Subcommand};
use serde_json::json;

use crate::Context;
use crate::commands::pages;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::options::PageArgs;
use crate::route::Route;
use crate::table::{Column, View};

const EXAMPLES: &str = "\
Examples:
  mayfly token create --read 'db:app:*' --ttl 24h -f token
  mayfly token create --read 'db:app:*' --read app:smtp --ttl 7d -o file:app.token -f token
  mayfly token list";

const COLUMNS: &[Column] = &[
    Column("ID", &["/id"]),
    Column("READ", &["/read"]),
    Column("CREATED", &["/created"]),
    Column("CREATED BY", &["/createdBy"]),
    Column("EXPIRATION", &["/expiration"]),
];

/// Options of `mayfly token`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Create a token; it is shown this once
    Create {
        /// Paths that the token may read, such as 'db:app:*'; may be given several times
        #[arg(long, value_name = "GLOB", required = true)]
        read: Vec<String>,
        /// How long the token is valid, such as 24h or 7d
        #[arg(long, value_name = "DURATION", value_parser = seconds)]
        ttl: u64,
        /// Maximum number of the token's leases at a time
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        max_leases: Option<u64>,
    },
    /// List tokens, without the tokens themselves
    List {
        #[command(flatten)]
        page: PageArgs,
    },
    /// End a token at once
    Revoke {
        /// Id of the token
        id: String,
    },
}

pub(crate) async fn run(args: TokenArgs, context: &Context) -> Result<(), Failure> {
    match args.verb {
        Verb::Create {
            read,
            ttl,
            max_leases,
        } => {
            let output = context.output()?;
            let mut body = json!({ "read": read, "ttl": ttl });
            if let Some(most) = max_leases {
                body["maxLeases"] = json!(most);
            }
            let answer = context
                .api()?
                .post(&Route::to("tokens"), Some(&body))
                .await?;
            output.show(&answer, &View::Record)
        }
        Verb::List { page } => {
            let output = context.output()?;
            let answer =
                pages::list(&context.api()?, || Route::to("tokens"), "tokens", &page).await?;
            output.show(&answer, &View::List("tokens", COLUMNS))
        }
        Verb::Revoke { id } => {
            let route = Route::item("tokens", &id)?;
            let output = context.output()?;
            let answer = context.api()?.delete(&route).await?;
            output.changed(&answer, &format!("token {id} is revoked"))
        }
    }
}
