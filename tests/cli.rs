//! The command line, run against a system.

use std::process::{Command, Output, Stdio};

use crate::process::binary;
use crate::system::System;

/// The command line, with the root token of a system.
pub struct Cli<'a> {
    pub system: &'a System,
}

impl Cli<'_> {
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("mayfly"));
        command
            .args(arguments)
            .env("MAYFLY_ADDRESS", &self.system.api.address)
            .env("MAYFLY_TOKEN", &self.system.api.token)
            .current_dir(&self.system.directory)
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What it prints; it must succeed.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    }

    /// What it prints to stderr; it must end with this code.
    #[track_caller]
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(!said.is_empty());
        said
    }
}
