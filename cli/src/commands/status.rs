//! `mayfly status` shows everything at a glance. Its exit code is for scripts.

use clap::Args;
use serde_json::Value;

use crate::Context;
use crate::commands::watch;
use crate::failure::Failure;
use crate::route::Route;
use crate::table::View;

/// The exit code, which is that of any failure of this kind.
const UNAVAILABLE: u8 = 5;

/// Options of `mayfly status`.
#[derive(Args)]
pub(crate) struct StatusArgs {
    /// Show the status again every 2 s, with the progress of revocations, until Ctrl-C
    #[arg(long)]
    watch: bool,
}

pub(crate) async fn run(args: &StatusArgs, context: &Context) -> Result<u8, Failure> {
    if args.watch {
        let api = context.api()?;
        let route = Route::to("status");
        return watch::watch(context, &View::Status, async || api.get(&route).await).await;
    }
    let output = context.output()?;
    let status = context.api()?.get(&Route::to("status")).await?;
    output.show(&status, &View::Status)?;
    Ok(exit_code(&status))
}

fn exit_code(status: &Value) -> u8 {
    match status.get("broker").and_then(Value::as_str) {
        Some("up") => 0,
        _ => UNAVAILABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_broker_that_is_not_up_is_a_failure() {
        assert_eq!(exit_code(&json!({"broker": "up"})), 0);
        assert_eq!(exit_code(&json!({"broker": "down"})), 5);
        assert_eq!(exit_code(&json!({})), 5);
    }
}
