//! `mayfly lease` lists leases, renews them and ends them early.

use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until};

use crate::Context;
use crate::client::Api;
use crate::commands::{pages, watch};
use crate::duration::seconds;
use crate::failure::Failure;
use crate::options::PageArgs;
use crate::route::Route;
use crate::table::{Column, View};

const EXAMPLES: &str = "\
Examples:
  mayfly lease list --path db:postgresql --state active
  mayfly lease list --state stuck
  mayfly lease list --role app_x4k2qz_b302099a8057     # whose account is this?
  mayfly lease revoke 01890a5d-ac96-774b-bcce-b302099a8057 --wait
  mayfly lease revoke --path db:postgresql:dyn1
  mayfly lease renew 01890a5d-ac96-774b-bcce-b302099a8057 --increment 15m
  mayfly lease retry 01890a5d-ac96-774b-bcce-b302099a8057
  mayfly lease reconcile --dry-run";

const COLUMNS: &[Column] = &[
    Column("ID", &["/id"]),
    Column("PATH", &["/path"]),
    Column("POOL", &["/pool"]),
    Column("ROLE", &["/role"]),
    Column("STATE", &["/state"]),
    Column("STUCK", &["/stuck"]),
    Column("EXPIRATION", &["/expiration"]),
    Column("LAST ERROR", &["/lastError"]),
];

/// The columns for stuck leases.
const STUCK: &[Column] = &[
    Column("ID", &["/id"]),
    Column("PATH", &["/path"]),
    Column("ROLE", &["/role"]),
    Column("STATE", &["/state"]),
    Column("ATTEMPTS", &["/attempts"]),
    Column("LAST ERROR", &["/lastError"]),
    Column("IN THE WAY", &["/objects"]),
    Column("NEXT TRY", &["/nextTry"]),
];

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Options of `mayfly lease`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct LeaseArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List leases, page by page
    List(ListArgs),
    /// Show one lease by its id
    Show {
        /// Id of the lease
        id: String,
    },
    /// End a lease, or all leases of the secrets under a path, now
    #[command(group(ArgGroup::new("which").required(true).args(["id", "path"])))]
    Revoke {
        /// Id of the lease
        id: Option<String>,
        /// All leases of this path and of those below it
        #[arg(short = 'r', long, value_name = "PREFIX")]
        path: Option<String>,
        /// Forget the lease without ending its account: for a server that is gone for good
        #[arg(long, conflicts_with_all = ["path", "wait"])]
        detach: bool,
        /// Wait until the accounts are gone; exit code 1 if they are not gone in time
        #[arg(long)]
        wait: bool,
        /// How long to wait, such as 60 or 5m
        #[arg(long, value_name = "DURATION", value_parser = seconds, default_value = "60", requires = "wait")]
        timeout: u64,
    },
    /// Move a lease's end
    Renew {
        /// Id of the lease
        id: String,
        /// Life of the lease from now on, such as 300 or 15m; a life beyond its maximum is refused
        #[arg(long, value_name = "DURATION", value_parser = seconds)]
        increment: u64,
    },
    /// Retry a failed revocation now
    Retry {
        /// Id of the lease
        id: String,
    },
    /// Compare store, broker and databases, and correct what differs
    Reconcile {
        /// Only show the differences; exit code 1 if there are any
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Args)]
struct ListArgs {
    /// List only leases of this path and of those below it
    #[arg(short = 'r', long, value_name = "PREFIX")]
    path: Option<String>,
    /// List only leases of this pool
    #[arg(long)]
    pool: Option<String>,
    /// List only leases in this state: pending, active, revoking, revoked, failed, or stuck
    #[arg(long)]
    state: Option<String>,
    /// List only the lease of this PostgreSQL role
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// Show the list again every 2 s, until Ctrl-C
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    page: PageArgs,
}

/// Runs the subcommand. If a signal has ended `--watch`, the exit code is that of the signal.
pub(crate) async fn run(args: LeaseArgs, context: &Context) -> Result<u8, Failure> {
    let done = match args.verb {
        Verb::List(list) => return self::list(list, context).await,
        Verb::Show { id } => {
            let route = Route::item("leases", &id)?;
            let output = context.output()?;
            output.show(&context.api()?.get(&route).await?, &View::Record)
        }
        Verb::Revoke {
            id,
            path,
            detach,
            wait,
            timeout,
        } => {
            let which = Which::read(id, path)?;
            let output = context.output()?;
            let api = context.api()?;
            if detach {
                let route = which.route()?.with("detach", Some(true));
                let answer = api.delete(&route).await?;
                let done = "the lease is detached; end its account yourself";
                return output.changed(&answer, done).map(|()| 0);
            }
            let deadline = Instant::now() + Duration::from_secs(timeout);
            let mut answer = api.delete(&which.route()?).await?;
            if wait {
                which.ask_for_all(&api, &mut answer, deadline).await?;
                let last = which.wait(&api, deadline, timeout).await?;
                answer = last.unwrap_or(answer);
            }
            output.changed(&answer, "revocation has begun")
        }
        Verb::Renew { id, increment } => {
            let route = Route::item("leases", &id)?.then("/renew");
            let body = json!({ "increment": increment });
            let output = context.output()?;
            output.show(
                &context.api()?.post(&route, Some(&body)).await?,
                &View::Record,
            )
        }
        Verb::Retry { id } => {
            let route = Route::item("leases", &id)?.then("/retry");
            let output = context.output()?;
            let answer = context.api()?.post(&route, None).await?;
            output.changed(&answer, "a try has begun")
        }
        Verb::Reconcile { dry_run } => reconcile(dry_run, context).await,
    };
    done.map(|()| 0)
}

async fn list(list: ListArgs, context: &Context) -> Result<u8, Failure> {
    let route = || {
        Route::to("leases")
            .with("path", list.path.as_deref())
            .with("pool", list.pool.as_deref())
            .with("state", list.state.as_deref())
            .with("role", list.role.as_deref())
    };
    let view = View::List(
        "leases",
        match list.state.as_deref() {
            Some("stuck") => STUCK,
            _ => COLUMNS,
        },
    );
    if list.watch {
        let api = context.api()?;
        let ask = async || pages::list(&api, route, "leases", &list.page).await;
        return watch::watch(context, &view, ask).await;
    }
    let output = context.output()?;
    let answer = pages::list(&context.api()?, route, "leases", &list.page).await?;
    output.show(&answer, &view).map(|()| 0)
}

/// Compares store, broker and databases, and corrects the differences unless it is a dry run.
async fn reconcile(dry_run: bool, context: &Context) -> Result<(), Failure> {
    let body = json!({ "dryRun": dry_run });
    let output = context.output()?;
    let api = context.api()?;
    let route = Route::to("leases/reconcile");
    let answer = api.post_long(&route, Some(&body)).await?;
    output.show(&answer, &View::Differences)?;
    let is_empty = |member: &str| {
        let list = answer.get(member).and_then(Value::as_array);
        list.is_none_or(Vec::is_empty)
    };
    let lacks = answer.get("messagesMissing").and_then(Value::as_u64) > Some(0);
    let differ = lacks || !is_empty("differences");
    match (is_empty("unreachable"), dry_run && differ) {
        (false, _) => Err(Failure::Local("not every server answered".into())),
        (true, true) => Err(Failure::Local("store, broker and databases differ".into())),
        (true, false) => Ok(()),
    }
}

/// The leases to revoke.
enum Which {
    One(String),
    Under(String),
}

impl Which {
    fn read(id: Option<String>, path: Option<String>) -> Result<Self, Failure> {
        match (id, path) {
            (Some(id), None) => Ok(Self::One(id)),
            (None, Some(path)) if !path.is_empty() => Ok(Self::Under(path)),
            _ => Err(Failure::Usage(
                "give the ID of a lease, or --path PREFIX".into(),
            )),
        }
    }

    fn route(&self) -> Result<Route, Failure> {
        match self {
            Self::One(id) => Route::item("leases", id),
            Self::Under(path) => Ok(Route::to("leases").with("path", Some(path))),
        }
    }

    /// Repeats the request while its answer says that more leases follow in the background. Otherwise no lease might
    /// be in revocation for a moment although some still live. `answer` becomes the sum of all answers.
    async fn ask_for_all(
        &self,
        api: &Api,
        answer: &mut Value,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let mut before = 0;
        while more_follow(answer, &mut before) && Instant::now() < deadline {
            sleep(LONGEST_PAUSE).await;
            *answer = api.delete(&self.route()?).await?;
        }
        Ok(())
    }

    /// Asks repeatedly, with growing pauses, until no lease is left to revoke. If the revocation is of one lease,
    /// returns that lease. `timeout` is in seconds, for the message.
    async fn wait(
        &self,
        api: &Api,
        deadline: Instant,
        timeout: u64,
    ) -> Result<Option<Value>, Failure> {
        let mut pause = FIRST_PAUSE;
        loop {
            let left = tokio::select! {
                asked = self.left(api) => match asked {
                    Ok(Left::Nothing(last)) => return Ok(last),
                    Ok(Left::Still(what)) => what,
                    // The dispatcher may become available in time.
                    Err(failure) if failure.exit_code() == 5 => failure.to_string(),
                    Err(failure) => return Err(failure),
                },
                () = sleep_until(deadline) => "no answer".into(),
            };
            if Instant::now() + pause > deadline {
                return Err(Failure::Local(format!(
                    "not revoked within {timeout} s ({left}); the revocation continues without this command"
                )));
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn left(&self, api: &Api) -> Result<Left, Failure> {
        match self {
            Self::One(_) => Ok(Left::of_lease(api.get(&self.route()?).await?)),
            Self::Under(_) => {
                let route = self
                    .route()?
                    .with("state", Some("revoking"))
                    .with("limit", Some(1));
                Ok(Left::of_list(&api.get(&route).await?))
            }
        }
    }
}

/// Whether leases follow in the background. Adds `before`, the number of the earlier requests, to `revoking` of the
/// answer.
fn more_follow(answer: &mut Value, before: &mut u64) -> bool {
    let Some(marked) = answer.get("revoking").and_then(Value::as_u64) else {
        return false;
    };
    *before += marked;
    answer["revoking"] = (*before).into();
    answer.get("more").and_then(Value::as_bool) == Some(true)
}

/// The leases that are left to revoke.
#[derive(Debug, PartialEq)]
enum Left {
    Nothing(Option<Value>),
    Still(String),
}

impl Left {
    fn of_lease(lease: Value) -> Self {
        let text = |key: &str| lease.get(key).and_then(Value::as_str).map(str::to_owned);
        match text("state").as_deref() {
            Some("revoked" | "failed") => Self::Nothing(Some(lease)),
            state => Self::Still(match text("lastError") {
                Some(error) => format!("{}: {error}", state.unwrap_or("no state")),
                None => state.unwrap_or("no state").to_owned(),
            }),
        }
    }

    fn of_list(revoking: &Value) -> Self {
        match revoking
            .get("leases")
            .and_then(Value::as_array)
            .and_then(|leases| leases.first())
        {
            Some(lease) => Self::of_lease(lease.clone()),
            None => Self::Nothing(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_are_repeated_until_none_follows() {
        let mut before = 0;
        let mut answer = json!({"revoking": 5200, "more": true});
        assert!(more_follow(&mut answer, &mut before));
        answer = json!({"revoking": 300, "more": false});
        assert!(!more_follow(&mut answer, &mut before));
        assert_eq!(answer["revoking"], 5500);
        // The answer of a dispatcher of an earlier version, and the answer about a single lease.
        assert!(!more_follow(&mut json!({"revoking": 3}), &mut 0));
        assert!(!more_follow(&mut json!({"state": "revoking"}), &mut 0));
    }

    #[test]
    fn a_lease_is_done_when_revoked_or_failed() {
        for state in ["revoked", "failed"] {
            let lease = json!({ "state": state });
            assert_eq!(Left::of_lease(lease.clone()), Left::Nothing(Some(lease)));
        }
        for state in ["pending", "active", "revoking"] {
            assert_eq!(
                Left::of_lease(json!({ "state": state })),
                Left::Still(state.into())
            );
        }
        assert_eq!(
            Left::of_list(&json!({"leases": [{"state": "revoking", "lastError": "2BP01"}]})),
            Left::Still("revoking: 2BP01".into())
        );
        assert_eq!(Left::of_list(&json!({"leases": []})), Left::Nothing(None));
    }
}
