//! `mayfly init` makes what an installation needs before its dispatcher starts: keys, and a policy at the broker.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use clap::Args;
use zeroize::Zeroizing;

use crate::Context;
use crate::failure::Failure;
use crate::management::{Management, POLICY};
use crate::manifest;

const EXAMPLES: &str = "\
Examples:
  mayfly init --secret mayfly-keys | kubectl create -f -
  mayfly init --broker @management-url

Its `master-key` opens the dispatcher's store: keep a copy apart from the store's backups. Its
`root-token` is the first token. A dispatcher that finds no keys makes its own: this command is for
places where it could not keep them, such as a pod.

--broker sets the policy `mayfly` in RabbitMQ, as deploy/rabbitmq/definitions.json does. A policy for all
queues, with `expires` or `dead-letter-routing-key`, would otherwise apply to Mayfly's too, and lose the ends
of accounts. It fails if something is still overridden, for example by an operator policy, and shows what. The URL is
https://user:password@rabbitmq:15671/vhost, of a user with the tag `policymaker` or `administrator`.
--ca-file and --allow-plaintext apply to it too.";

/// Options of `mayfly init`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct InitArgs {
    #[command(flatten)]
    what: What,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Print a Kubernetes Secret of this name, with `master-key` and `root-token`
    #[arg(long, value_name = "NAME")]
    secret: Option<String>,
    /// Prevent other policies of RabbitMQ from applying to Mayfly's queues; URL of its management API, `@FILE` or `-` (stdin)
    #[arg(long, value_name = "URL")]
    broker: Option<String>,
}

/// Runs the command. The exit code is 1 if something at the broker is still overridden.
pub(crate) async fn run(args: &InitArgs, context: &Context) -> Result<u8, Failure> {
    match (&args.what.secret, &args.what.broker) {
        (Some(name), _) => keys(name, context).map(|()| 0),
        (None, Some(url)) => broker(url, context).await,
        // clap has already refused this.
        (None, None) => Ok(2),
    }
}

async fn broker(url: &str, context: &Context) -> Result<u8, Failure> {
    let management = Management::new(url, &context.connection.tls.given()?)?;
    let output = context.output()?;
    let priority = management.set_policy().await?;
    let overridden = management.overridden().await?;
    let mut lines = vec![format!(
        "policy `{POLICY}` of priority {priority} is set in the virtual host `{}`",
        management.vhost()
    )];
    for one in &overridden {
        let by = match &one.operator_policy {
            Some(name) => format!("operator policy `{name}`"),
            None => "another policy".to_owned(),
        };
        let settings = one.settings.join(", ");
        lines.push(format!("{}: {by} overrides it: {settings}", one.name));
    }
    if !overridden.is_empty() {
        lines.push("accounts may not end in time: exclude `^mayfly\\.` from the pattern of the policy that overrides it".to_owned());
    }
    output.text(&lines.join("\n"))?;
    Ok(u8::from(!overridden.is_empty()))
}

fn keys(name: &str, context: &Context) -> Result<(), Failure> {
    manifest::check_name(name)?;
    let random = || Zeroizing::new(rand::random::<[u8; 32]>());
    let master_key = Zeroizing::new(BASE64_STANDARD.encode(*random()));
    let root_token = Zeroizing::new(BASE64_URL_SAFE_NO_PAD.encode(*random()));
    let entries = [("master-key", &**master_key), ("root-token", &**root_token)];
    let made = manifest::secret(name, &entries);
    context.output()?.text(&format!("{made:#}"))
}
