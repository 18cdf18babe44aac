//! A command that runs with a credential: its variables, its signals, its exit status.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::{Pid, Signal, getpgrp, kill_process};
use rustix::termios::tcgetpgrp;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind};
use tokio::time::timeout;

use crate::failure::Failure;
use crate::ui;

/// Starts a command with these variables, and without those that it must not have. If it cannot be started, the
/// result is an exit code: 127 if the command does not exist, otherwise 126.
pub(crate) fn start(
    program: &OsStr,
    arguments: &[OsString],
    environment: impl IntoIterator<Item = (&'static str, impl AsRef<OsStr>)>,
) -> Result<Child, u8> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        // This password would belong to another account.
        .env_remove("PGPASSWORD")
        .envs(environment)
        // These would send the connection, and with it the password, to another server.
        .env_remove("PGHOSTADDR")
        .env_remove("PGSERVICE");
    for name in std::env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| is_ours(name))
    {
        command.env_remove(name);
    }
    command.spawn().map_err(|error| {
        ui::error(&Failure::Local(format!(
            "cannot run {}: {error}",
            program.display()
        )));
        match error.kind() == io::ErrorKind::NotFound {
            true => 127,
            false => 126,
        }
    })
}

/// A directory for this user alone. It is in memory if the session has such a place.
pub(crate) fn private_directory() -> Result<TempDir, Failure> {
    let place = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|place| place.is_dir())
        .unwrap_or_else(std::env::temp_dir);
    // tempfile makes the directory with mode 0700.
    tempfile::Builder::new()
        .prefix("mayfly-")
        .tempdir_in(&place)
        .map_err(|error| {
            Failure::Local(format!(
                "cannot make a directory in {}: {error}",
                place.display()
            ))
        })
}

/// Whether the command must not have this variable: a token, the file of a token, or a setting of dispatcher or
/// engine, which may be a secret.
fn is_ours(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b"MAYFLY_TOKEN") || name.starts_with(b"MAYFLY__")
}

/// Waits for the command and passes signals on to it.
pub(crate) async fn finish(child: &mut Child, signals: &mut Signals) -> io::Result<u8> {
    loop {
        tokio::select! {
            status = child.wait() => return Ok(exit_code(status?)),
            signal = signals.next() => {
                if !has_it_already(signal) {
                    send(child, signal);
                }
            }
        }
    }
}

/// Stops the command with this signal, and after the grace with SIGKILL. Returns its exit code.
pub(crate) async fn stop(
    child: &mut Child,
    signal: Signal,
    grace: Duration,
    signals: &mut Signals,
) -> io::Result<u8> {
    send(child, signal);
    if let Ok(ended) = timeout(grace, finish(child, signals)).await {
        return ended;
    }
    let seconds = grace.as_secs();
    ui::warning(&format!(
        "the command does not stop within {seconds} s and is killed"
    ));
    send(child, Signal::KILL);
    finish(child, signals).await
}

/// Sends a signal to the command.
pub(crate) fn send(child: &Child, signal: Signal) {
    // No other process gets the id before the command was waited for.
    let id = child.id().and_then(|id| i32::try_from(id).ok());
    if let Some(id) = id.and_then(Pid::from_raw) {
        // A command that has just ended needs no signal.
        let _ = kill_process(id, signal);
    }
}

/// Whether the command has already got the signal. A terminal sends its signals to the whole foreground group, which
/// includes the command. Many programs end at once when they get a second signal.
fn has_it_already(signal: Signal) -> bool {
    let typed = signal == Signal::INT || signal == Signal::QUIT;
    typed
        && File::open("/dev/tty")
            .is_ok_and(|terminal| tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp()))
}

fn exit_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(1),
        (None, Some(signal)) => killed_by(signal),
        (None, None) => 1,
    }
}

pub(crate) fn killed_by(signal: i32) -> u8 {
    u8::try_from(signal).map_or(1, |signal| signal.saturating_add(128))
}

/// Signals that would end this process.
pub(crate) struct Signals {
    interrupt: unix::Signal,
    quit: unix::Signal,
    terminate: unix::Signal,
    hangup: unix::Signal,
    end: Option<Signal>,
}

impl Signals {
    /// From here on these signals do not end this process.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: unix::signal(SignalKind::interrupt())?,
            quit: unix::signal(SignalKind::quit())?,
            terminate: unix::signal(SignalKind::terminate())?,
            hangup: unix::signal(SignalKind::hangup())?,
            end: None,
        })
    }

    /// Whether one of the signals that arrived requests the end. SIGHUP does not, because it can also mean: read the
    /// settings again.
    pub(crate) fn ask_for_end(&self) -> bool {
        self.end.is_some()
    }

    pub(crate) async fn next(&mut self) -> Signal {
        let signal = self.wait().await;
        if signal != Signal::HUP {
            self.end = Some(signal);
        }
        signal
    }

    async fn wait(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.quit.recv() => Signal::QUIT,
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hangup.recv() => Signal::HUP,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_settings_are_kept_from_the_command() {
        for name in ["MAYFLY_TOKEN", "MAYFLY_TOKEN_FILE", "MAYFLY__AMQP__URL"] {
            assert!(is_ours(OsStr::new(name)), "{name}");
        }
        for name in ["MAYFLY_ADDRESS", "PGHOST", "PATH"] {
            assert!(!is_ours(OsStr::new(name)), "{name}");
        }
    }

    #[tokio::test]
    async fn a_command_that_does_not_stop_is_killed() {
        let mut signals = Signals::listen().unwrap();
        let arguments = [
            "-c".into(),
            "trap '' TERM; echo; while :; do sleep 0.05; done".into(),
        ];
        let mut command = Command::new("sh");
        command.args(arguments as [OsString; 2]);
        command.stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut first = [0];
        let out = child.stdout.as_mut().unwrap();
        tokio::io::AsyncReadExt::read_exact(out, &mut first)
            .await
            .unwrap();
        let grace = Duration::from_millis(100);
        let ended = stop(&mut child, Signal::TERM, grace, &mut signals).await;
        assert_eq!(ended.unwrap(), 137);
    }

    #[test]
    fn the_commands_status_is_ours() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(15)), 143);
        assert_eq!(killed_by(2), 130);
    }
}
