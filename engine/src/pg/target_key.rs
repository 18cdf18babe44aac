//! What identifies a server with its admin and credentials.

use mayfly_protocol::authorities::{Authorities, Digest};
use mayfly_protocol::target::Target;

use super::sql;

/// The key of a connection: server, admin, credentials and database.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) target: String,
    pub(super) database: String,
}

impl Key {
    /// The key of one database of a target.
    pub(super) fn of(target: &Target, database: impl Into<String>) -> Self {
        Self {
            target: target_key(target),
            database: database.into(),
        }
    }
}

fn authorities_key(target: &Target) -> String {
    match &target.sslrootcert {
        None => String::new(),
        Some(Authorities::Pem(pem)) => Digest::of(pem).into(),
        Some(Authorities::Named { sha256 }) => (*sha256).into(),
    }
}

/// Identifies server, admin and credentials without keeping the password as text.
pub(crate) fn target_key(target: &Target) -> String {
    sql::short_hash(&[
        &target.host,
        &target.port.to_string(),
        &target.database,
        &target.username,
        target.password.expose(),
        &format!(
            "{:?} {:?} {:?}",
            target.sslmode, target.auth, target.channel_binding
        ),
        &authorities_key(target),
        target.sslcert.as_deref().unwrap_or_default(),
        target.sslkey.as_ref().map_or("", |key| key.expose()),
    ])
}
