//! `mayfly agent`: keeps files with a valid credential, for programs that read them. A new credential is in the
//! files before the previous one ends.

mod notify;
mod run;
mod settings;
mod shown;
mod sinks;
mod watch;

pub(crate) use self::run::run;
pub(crate) use self::settings::AgentArgs;
