//! `mayfly agent`: keeps files with a valid credential, for programs that read them. A new credential is in the
//! files before the previous one ends.

mod notify;
mod run;
mod settings;
mod shown;
mod sinks;
mod watch;

use std::path::PathBuf;

pub(crate) use self::run::run;
pub(crate) use self::settings::AgentArgs;
use crate::credential::Credential;
use crate::failure::Failure;

/// Writes a password file of libpq with one credential, for this user alone.
pub(crate) fn write_password_file(credential: &Credential, file: PathBuf) -> Result<(), Failure> {
    let sink = sinks::Sink::new(sinks::Format::Pgpass, file, sinks::Owner::default());
    sink.write(credential, &[])
}
