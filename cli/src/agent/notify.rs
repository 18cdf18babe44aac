//! Informs a program that its files have changed, by a command or a signal.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use tokio::time::timeout;

use crate::child;
use crate::failure::Failure;
use crate::signal;
use crate::ui;

/// Time limit of a command.
const COMMAND_SECONDS: u64 = 60;
/// Maximum number of bytes that are read from a PID file.
const PID_FILE_MAX: u64 = 32;

/// Who is informed of a change, and how.
#[derive(Default)]
pub(super) struct Notify {
    /// A command line for `sh -c`.
    pub(super) command: Option<OsString>,
    pub(super) signal: Option<PidFile>,
}

/// A signal, and the file with the id of the process that gets it.
#[derive(Clone, Debug)]
pub(super) struct PidFile {
    signal: Signal,
    file: PathBuf,
}

impl PidFile {
    /// Reads `HUP:PIDFILE`.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let (name, file) = text
            .split_once(':')
            .filter(|(_, file)| !file.is_empty())
            .ok_or("must be SIGNAL:PIDFILE, such as HUP:/run/app.pid")?;
        Ok(Self {
            signal: signal::named(name)?,
            file: file.into(),
        })
    }

    /// The content of the file, and its owner. Others may be able to write the file, so a link, a pipe or a long
    /// text must not stop the agent.
    fn text(&self) -> io::Result<(String, u32)> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(open(&self.file, flags, Mode::empty())?);
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let mut text = String::new();
        file.take(PID_FILE_MAX).read_to_string(&mut text)?;
        Ok((text, found.uid()))
    }

    /// Sends the signal. An absent file is no failure: before the first credential the program may not run yet.
    fn send(&self) -> Result<(), String> {
        let (text, owner) = match self.text() {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(format!("cannot read {}: {error}", self.file.display())),
        };
        // A negative number would name a group of processes.
        let id = text.trim().parse().ok().filter(|id| *id > 0);
        let id = id
            .and_then(Pid::from_raw)
            .ok_or_else(|| format!("{} has no process id", self.file.display()))?;
        let failed =
            |error: io::Error| format!("process {id:?} of {}: {error}", self.file.display());
        // With a handle of the process, the signal cannot reach another process that gets the same id later.
        let process = pidfd_open(id, PidfdFlags::empty()).map_err(|error| failed(error.into()))?;
        if !may_name(owner, geteuid().as_raw(), user_of(id).map_err(failed)?) {
            return Err(format!(
                "the owner of {} (user {owner}) may not send signals to process {id:?}",
                self.file.display()
            ));
        }
        pidfd_send_signal(process, self.signal).map_err(|error| failed(error.into()))
    }
}

/// Whether the owner of a PID file may name a process of this user. An agent that runs as root must not send a
/// signal for a user who may not send it himself.
fn may_name(owner: u32, agent: u32, user: u32) -> bool {
    owner == 0 || owner == agent || owner == user
}

/// The real user of a process: the user who started it, even if the program runs with other rights.
fn user_of(id: Pid) -> io::Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", id.as_raw_nonzero()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.and_then(|users| users.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| io::Error::other("its user is not known"))
}

impl Notify {
    /// Informs all programs. A failure is only a warning, because the files are correct.
    pub(super) async fn inform(&self) {
        if let Some(file) = &self.signal
            && let Err(reason) = file.send()
        {
            ui::warning(&format!("no signal is sent: {reason}"));
        }
        if let Some(command) = &self.command
            && let Err(reason) = run(command).await
        {
            ui::warning(&format!("the command of --on-change: {reason}"));
        }
    }
}

async fn run(command: &OsString) -> Result<(), String> {
    let arguments = [OsString::from("-c"), command.clone()];
    let mut child = child::start(OsStr::new("sh"), &arguments, None::<(&str, &str)>)
        .map_err(|_| "it cannot be started".to_owned())?;
    match timeout(Duration::from_secs(COMMAND_SECONDS), child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("it failed: {status}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => {
            let killed = child.kill().await;
            let reason = format!("it did not end within {COMMAND_SECONDS} s and is killed");
            killed.map_err(|error| error.to_string()).and(Err(reason))
        }
    }
}

/// The failure for a malformed option.
pub(super) fn wrong(reason: &str) -> Failure {
    Failure::Usage(format!("--signal: {reason}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_group_of_processes_gets_no_signal() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let target = PidFile::read(&format!("USR1:{}", file.path().display())).unwrap();
        for text in ["-1", "0", "", "x", "1 2"] {
            fs::write(file.path(), text).unwrap();
            assert!(target.send().is_err(), "{text:?}");
        }
        let link = file.path().with_extension("link");
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        let pipe = file.path().with_extension("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        for other in [&link, &pipe] {
            let target = PidFile::read(&format!("USR1:{}", other.display())).unwrap();
            assert!(target.send().is_err(), "{}", other.display());
            fs::remove_file(other).unwrap();
        }
        let absent = PidFile::read("HUP:/no/such/file").unwrap();
        assert!(absent.send().is_ok());
        for text in ["HUP", "HUP:", "STOP:/x", ":/x"] {
            assert!(PidFile::read(text).is_err(), "{text}");
        }
    }

    /// A user writes the id of a process of root into its PID file, for an agent that runs as root.
    #[test]
    fn a_signal_is_not_sent_for_a_user_who_may_not_send_it() {
        for (owner, agent, user, expected) in [
            (0, 0, 7, true),
            (7, 7, 0, true),
            (7, 0, 7, true),
            (7, 0, 0, false),
            (7, 0, 8, false),
        ] {
            assert_eq!(
                may_name(owner, agent, user),
                expected,
                "{owner} {agent} {user}"
            );
        }
        let agent = geteuid().as_raw();
        let mut victim = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let id = Pid::from_raw(i32::try_from(victim.id()).unwrap()).unwrap();
        assert_eq!(user_of(id).unwrap(), agent);
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), victim.id().to_string()).unwrap();
        let target = PidFile::read(&format!("KILL:{}", file.path().display())).unwrap();
        // Only root can give a file away.
        if agent == 0 {
            std::os::unix::fs::chown(file.path(), Some(65_534), None).unwrap();
            let refused = target.send().unwrap_err();
            assert!(refused.contains("may not send signals"), "{refused}");
            assert!(victim.try_wait().unwrap().is_none());
            std::os::unix::fs::chown(file.path(), Some(agent), None).unwrap();
        }
        target.send().unwrap();
        victim.wait().unwrap();
    }

    #[tokio::test]
    async fn a_command_that_fails_is_reported() {
        assert!(run(&"exit 0".into()).await.is_ok());
        assert!(run(&"exit 3".into()).await.unwrap_err().contains("3"));
    }
}
