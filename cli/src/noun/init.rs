//! `mayfly init`: the keys of a new installation, made before its dispatcher starts.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use clap::Args;
use zeroize::Zeroizing;

use crate::Context;
use crate::failure::Failure;
use crate::manifest;

const EXAMPLES: &str = "\
Examples:
  mayfly init --secret mayfly-keys | kubectl create -f -

Its `master-key` opens the dispatcher's store: keep a copy where the store's backups are not. Its
`root-token` is the first token. A dispatcher that finds no keys makes its own: this command is for
places where it could not keep them, such as a pod.";

/// Init.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct InitArgs {
    /// Print a Kubernetes Secret of this name, with `master-key` and `root-token`
    #[arg(long, value_name = "NAME")]
    secret: String,
}

pub(crate) fn run(args: &InitArgs, context: &Context) -> Result<(), Failure> {
    manifest::check_name(&args.secret)?;
    let random = || Zeroizing::new(rand::random::<[u8; 32]>());
    let master_key = Zeroizing::new(BASE64_STANDARD.encode(*random()));
    let root_token = Zeroizing::new(BASE64_URL_SAFE_NO_PAD.encode(*random()));
    let entries = [("master-key", &**master_key), ("root-token", &**root_token)];
    let made = manifest::secret(&args.secret, &entries);
    context.output()?.text(&format!("{made:#}"))
}
