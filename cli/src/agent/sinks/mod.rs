//! The files from which programs read the credential, with one module for each format. A value that a format cannot
//! hold is refused; the message names the field.

mod env;
mod jdbc;
mod json;
mod pgpass;
mod replace;
mod service;
mod template;

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

pub(crate) use self::replace::Owner;
use self::replace::Target;
pub(crate) use self::service::is_name as is_service_name;
pub(crate) use self::template::Template;
use crate::credential::Credential;
use crate::failure::Failure;

/// The format of a file.
pub(crate) enum Format {
    /// `NAME="value"` lines, for shells and for `EnvironmentFile=` of systemd.
    Env,
    /// One JSON object (RFC 8259).
    Json,
    /// A password file of libpq (PostgreSQL documentation, 34.16).
    Pgpass,
    /// A connection service file of libpq (PostgreSQL documentation, 34.17).
    Service {
        name: String,
        /// The file of [`Format::Pgpass`]. Without it the service file has the password.
        passfile: Option<PathBuf>,
    },
    /// Root certificates of the server, which other files name. If there are none, the file is not written.
    Roots,
    /// One JDBC URL, for PgJDBC.
    Jdbc,
    /// A template of the user.
    Template(Box<Template>),
}

/// A file that is written at each change of the credential.
pub(crate) struct Sink {
    format: Format,
    target: Target,
}

impl Sink {
    pub(crate) fn new(format: Format, file: PathBuf, owner: Owner) -> Self {
        // libpq does not read a password file that others may read.
        let is_private = matches!(format, Format::Pgpass);
        Self {
            format,
            target: Target::new(file, owner, is_private),
        }
    }

    pub(crate) fn file(&self) -> &Path {
        self.target.file()
    }

    /// Tests that the file can be written, before a credential is requested for it.
    ///
    /// # Errors
    /// The directory is absent or not writable, or the owner cannot be given.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        self.target.check()
    }

    /// Replaces the file. `previous` are credentials that are still valid: a program may have read another file
    /// before it was replaced.
    ///
    /// # Errors
    /// The format cannot hold a value, or the file cannot be written. Then the file is unchanged.
    pub(crate) fn write(&self, new: &Credential, previous: &[&Credential]) -> Result<(), Failure> {
        if matches!(self.format, Format::Roots) && new.roots.is_none() {
            return Ok(());
        }
        let text = self.text(new, previous).map_err(|reason| {
            Failure::Local(format!(
                "{} is not written: {reason}",
                self.file().display()
            ))
        })?;
        self.target.replace(text.as_bytes())
    }

    fn text(
        &self,
        new: &Credential,
        previous: &[&Credential],
    ) -> Result<Zeroizing<String>, String> {
        match &self.format {
            Format::Env => Ok(env::text(new)),
            Format::Json => Ok(json::text(new)),
            Format::Pgpass => pgpass::text(new, previous),
            Format::Service { name, passfile } => service::text(new, name, passfile.as_deref()),
            Format::Roots => Ok(Zeroizing::new(new.roots.clone().unwrap_or_default())),
            Format::Jdbc => jdbc::text(new),
            Format::Template(template) => template.text(new),
        }
    }

    /// The position in the order of writing. A file that names a user comes after the file with the user's password.
    pub(crate) fn order(&self) -> u8 {
        match &self.format {
            Format::Pgpass | Format::Roots => 0,
            Format::Env | Format::Json | Format::Jdbc | Format::Template(_) => 1,
            Format::Service { .. } => 2,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::with;

    #[test]
    fn root_certificates_are_written_if_the_secret_has_them() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("service.crt");
        let sink = Sink::new(Format::Roots, file.clone(), Owner::default());
        let mut credential = with("app", "u", "p");
        sink.write(&credential, &[]).unwrap();
        assert!(!file.exists());
        credential.roots = Some("PEM".to_owned());
        sink.write(&credential, &[]).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "PEM");
    }
}
