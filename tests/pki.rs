//! A private authority and certificates by it, made by openssl.

use std::path::PathBuf;
use std::process::Command;

use crate::postgres::Server;
use crate::{run_dir, word};

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30";

/// An authority: `root.crt`, and beside it what it signed.
pub struct Pki(PathBuf);

impl Pki {
    /// Makes a new authority.
    pub fn new() -> Self {
        let pki = Self(run_dir().join(format!("pki-{}", word())));
        std::fs::create_dir_all(&pki.0).unwrap();
        pki.openssl(&format!(
            "req -x509 {KEY} -subj /CN=root -keyout root.key -out root.crt"
        ));
        pki
    }

    /// `NAME.crt` and `NAME.key`, for these names as openssl writes them (`DNS:db.example`); without
    /// any as PostgreSQL's documentation makes one: X.509 version 1.
    pub fn certificate(&self, name: &str, subject: &str, names: Option<&str>) {
        let names = names.map(|names| format!("-addext subjectAltName={names} "));
        let copied = names.as_ref().map_or("", |_| "-copy_extensions copy ");
        let names = names.unwrap_or_default();
        self.openssl(&format!(
            "req -new {KEY} -subj /CN={subject} {names}-keyout {name}.key -out {name}.csr"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr {copied}-CA root.crt -CAkey root.key -CAcreateserial -days 30 -out {name}.crt"
        ));
    }

    /// The path of one of the files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The content of one of the files.
    pub fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).unwrap()
    }

    /// Puts `server.crt` in the place of a server's own; it has to read it again.
    pub fn install(&self, server: &Server) {
        for name in ["server.crt", "server.key"] {
            // The text is written into the old file, which has the right owner and mode.
            let file = server.directory().join("data").join(name);
            std::fs::write(file, self.text(name)).unwrap();
        }
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(&self.0)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments}: {output:?}");
    }
}

impl Default for Pki {
    fn default() -> Self {
        Self::new()
    }
}
