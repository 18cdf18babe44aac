//! Watches for the end of another process.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::oneshot;

use crate::failure::Failure;

/// A process that is watched. Another process that gets the same id later is not mistaken for it.
pub(super) struct Watched(OwnedFd);

impl Watched {
    /// Watches a process.
    ///
    /// # Errors
    /// The process does not exist.
    pub(super) fn of(id: i32) -> Result<Self, Failure> {
        let open = || -> io::Result<OwnedFd> {
            let id = Some(id).filter(|id| *id > 0).and_then(Pid::from_raw);
            let id = id.ok_or(io::ErrorKind::InvalidInput)?;
            Ok(pidfd_open(id, PidfdFlags::empty())?)
        };
        open()
            .map(Self)
            .map_err(|error| Failure::Usage(format!("--watch-pid: process {id}: {error}")))
    }

    /// Waits until the process has ended: then the descriptor becomes readable (pidfd_open(2)).
    pub(super) async fn ended(self) {
        let (sender, ended) = oneshot::channel();
        // A separate thread, so that the end of the agent does not wait for it.
        thread::spawn(move || {
            let mut watched = [PollFd::new(&self.0, PollFlags::IN)];
            while let Err(rustix::io::Errno::INTR) = poll(&mut watched, None) {}
            // If the agent has ended, nobody waits for this.
            let _ = sender.send(());
        });
        let _ = ended.await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn the_end_of_a_process_is_seen() {
        let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
        let id = i32::try_from(process.id()).unwrap();
        let watched = Watched::of(id).unwrap();
        let mut ended = std::pin::pin!(watched.ended());
        assert!(
            timeout(Duration::from_millis(100), &mut ended)
                .await
                .is_err()
        );
        process.kill().unwrap();
        timeout(Duration::from_secs(20), &mut ended).await.unwrap();
        process.wait().unwrap();
        for absent in [id, 0, -1] {
            assert_eq!(Watched::of(absent).err().unwrap().exit_code(), 2);
        }
    }
}
