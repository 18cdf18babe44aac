//! A small disk for one test, to be filled. It is a mount, so it needs root. It ends with its test; `with-servers.sh`
//! removes the disks of an interrupted run.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::run_command;
use crate::{run_dir, word};

/// A file system in memory.
pub struct Disk {
    directory: PathBuf,
}

impl Disk {
    /// An empty one of this size.
    pub fn new(mebibytes: u32) -> Self {
        let directory = run_dir().join(format!("disk-{}", word()));
        std::fs::create_dir(&directory).unwrap();
        let options = format!("size={mebibytes}m,mode=700");
        run_command(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
                .arg(&directory),
        );
        Self { directory }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    fn ballast(&self) -> PathBuf {
        self.directory.join("ballast")
    }

    /// Fills it to the last byte.
    pub fn fill(&self) {
        let mut file = File::create(self.ballast()).unwrap();
        // Smaller and smaller, so that nothing is left over.
        for size in [1 << 20, 1 << 12, 1] {
            let bytes = vec![0; size];
            let full = loop {
                if let Err(error) = file.write_all(&bytes) {
                    break error.kind();
                }
            };
            assert_eq!(full, ErrorKind::StorageFull);
        }
    }

    /// Removes what fills it.
    pub fn make_room(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Also under a process that has not ended yet.
        let unmounted = Command::new("umount")
            .arg("--lazy")
            .arg(&self.directory)
            .status();
        assert!(
            std::thread::panicking() || unmounted.is_ok_and(|status| status.success()),
            "{} is still mounted",
            self.directory.display()
        );
    }
}
