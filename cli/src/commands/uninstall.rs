//! `mayfly uninstall` removes what Mayfly has made on the servers of all base secrets: first the accounts, if this
//! is requested, and then the grant and quarantine roles. The secrets stay.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::Context;
use crate::client::Api;
use crate::commands::pages;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::options::PageArgs;
use crate::route::Route;
use crate::table::View;
use crate::ui;

const HELP: &str = "\
Engines must be running. Stop applications from reading secrets first.
Exits with 1 if something stays or a server could not be tidied.

Examples:
  mayfly uninstall                  # says what it would do, and asks
  mayfly uninstall --revoke --yes";

/// States of a lease whose account may exist.
const LIVE: [&str; 3] = ["pending", "active", "revoking"];
const PAUSE: Duration = Duration::from_millis(500);

/// Options of `mayfly uninstall`.
#[derive(Args)]
#[command(after_help = HELP)]
pub(crate) struct UninstallArgs {
    /// Do not ask for confirmation
    #[arg(short, long)]
    yes: bool,
    /// End live leases first; without this option the command fails if there are any
    #[arg(long)]
    revoke: bool,
    /// How long the leases may take to end, such as 60 or 5m
    #[arg(long, value_name = "DURATION", value_parser = seconds, default_value = "120", requires = "revoke")]
    timeout: u64,
}

pub(crate) async fn run(args: UninstallArgs, context: &Context) -> Result<u8, Failure> {
    let output = context.output()?;
    let api = context.api()?;
    let everything = PageArgs {
        limit: Some(500),
        cursor: None,
        all: true,
    };
    let secrets = pages::list(&api, || Route::to("secrets"), "secrets", &everything).await?;
    let (bases, dynamics) = sort(&secrets);
    let live = live(&api).await?;
    ui::plan(&plan(&bases, live, args.revoke));
    if live > 0 && !args.revoke {
        return Err(Failure::Local(format!(
            "{} live; wait for their end, or revoke them with --revoke",
            leases(live)
        )));
    }
    if !args.yes && !agreed()? {
        return Err(Failure::Local("nothing was done".into()));
    }
    if live > 0 {
        for path in &dynamics {
            api.delete(&Route::to("leases").with("path", Some(path)))
                .await?;
        }
        wait_for_none(&api, Duration::from_secs(args.timeout)).await?;
    }
    let mut servers = Vec::new();
    for path in &bases {
        let route = Route::secret(path)?.then("::tidy");
        servers.push(match api.post_long(&route, None).await {
            Ok(answer) => answer,
            Err(failure) => json!({"path": path, "error": failure.to_string()}),
        });
    }
    let answer = json!({"servers": servers});
    output.show(&answer, &View::Tidied)?;
    Ok(u8::from(!is_clean(&answer)))
}

/// Paths of base and of dynamic secrets.
fn sort(secrets: &Value) -> (Vec<String>, Vec<String>) {
    let (mut bases, mut dynamics) = (Vec::new(), Vec::new());
    let list = secrets.get("secrets").and_then(Value::as_array);
    for secret in list.into_iter().flatten() {
        let Some(path) = secret.get("path").and_then(Value::as_str) else {
            continue;
        };
        let attributes = &secret["attributes"];
        if attributes.get("linkConfig").is_some() {
            dynamics.push(path.to_owned());
        } else if matches!(attributes["type"].as_str(), Some("postgresql" | "postgres")) {
            bases.push(path.to_owned());
        }
    }
    (bases, dynamics)
}

fn leases(n: u64) -> String {
    match n {
        1 => "1 lease is".to_owned(),
        n => format!("{n} leases are"),
    }
}

fn plan(bases: &[String], live: u64, revoke: bool) -> String {
    let mut lines = Vec::new();
    if live > 0 && revoke {
        lines.push(format!("{} live and will be ended now", leases(live)));
    }
    for path in bases {
        lines.push(format!(
            "on the server of {path}: drop the grant and quarantine roles of this installation"
        ));
    }
    if bases.is_empty() {
        lines.push("there are no base secrets, so no server is known".to_owned());
    }
    lines.push("secrets, pools and tokens stay".to_owned());
    lines.join("\n")
}

fn agreed() -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::Usage(
            "--yes is needed: standard input is not a terminal".into(),
        ));
    }
    // If the question cannot be shown, the answer is still read.
    let _ = write!(io::stderr(), "Go on? [y/N] ").and_then(|()| io::stderr().flush());
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .map_err(|error| Failure::Local(format!("cannot read the answer: {error}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Number of leases that may have an account, from the counts of all pools.
async fn live(api: &Api) -> Result<u64, Failure> {
    Ok(count(&api.get(&Route::to("status")).await?))
}

fn count(status: &Value) -> u64 {
    let pools = status.get("pools").and_then(Value::as_array);
    let of_pool = |pool: &Value| -> u64 {
        LIVE.iter()
            .filter_map(|state| pool["leases"].get(state).and_then(Value::as_u64))
            .sum()
    };
    pools.into_iter().flatten().map(of_pool).sum()
}

async fn wait_for_none(api: &Api, timeout: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = live(api).await?;
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failure::Local(format!(
                "{} still not ended after {} s; see `mayfly lease list --state revoking`",
                leases(left),
                timeout.as_secs()
            )));
        }
        sleep(PAUSE).await;
    }
}

fn is_clean(answer: &Value) -> bool {
    let servers = answer.get("servers").and_then(Value::as_array);
    servers.into_iter().flatten().all(|server| {
        server.get("error").is_none() && server["kept"].as_array().is_none_or(Vec::is_empty)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_base_secrets_have_servers() {
        let secrets = json!({"secrets": [
            {"path": "db:root", "attributes": {"type": "postgresql"}},
            {"path": "db:dyn", "attributes": {"linkConfig": {"linkType": "dynamic"}, "pool": "p"}},
            {"path": "app:smtp", "attributes": {"type": "smtp"}},
            {"path": "app:x", "attributes": {}},
        ]});
        let (bases, dynamics) = sort(&secrets);
        assert_eq!(
            (bases, dynamics),
            (vec!["db:root".to_owned()], vec!["db:dyn".to_owned()])
        );
    }

    #[test]
    fn live_leases_are_those_whose_account_may_be_there() {
        let leases = json!({"pending": 1, "active": 2, "revoking": 3, "revoked": 50, "failed": 9});
        let status = json!({"pools": [{"leases": leases}, {"leases": {"active": 4}}]});
        assert_eq!(count(&status), 10);
        assert_eq!(count(&json!({})), 0);
    }

    #[test]
    fn what_stays_or_fails_is_not_clean() {
        assert!(is_clean(
            &json!({"servers": [{"removed": ["a"], "kept": []}]})
        ));
        assert!(!is_clean(
            &json!({"servers": [{"removed": [], "kept": [{"role": "q"}]}]})
        ));
        assert!(!is_clean(&json!({"servers": [{"error": "no"}]})));
    }
}
