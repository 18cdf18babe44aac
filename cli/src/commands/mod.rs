//! One file for each command, with its subcommands, its options and its calls.

pub(crate) mod completions;
pub(crate) mod engine;
pub(crate) mod exec;
pub(crate) mod init;
pub(crate) mod lease;
pub(crate) mod login;
pub(crate) mod man;
pub(crate) mod pool;
pub(crate) mod proxy;
pub(crate) mod psql;
pub(crate) mod secret;
pub(crate) mod status;
pub(crate) mod token;
pub(crate) mod uninstall;

mod pages;
mod restart;
mod watch;
