//! Names of paths, pools, engines, leases and roles. They are parsed once, when they enter the program. A value of
//! one of these types is always valid, because it cannot be built from unchecked text.

use std::fmt;
use std::str::FromStr;

use rand::RngExt;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a text is not a name, for the person who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(String);

fn refuse<T>(reason: impl Into<String>) -> Result<T, NameError> {
    Err(NameError(reason.into()))
}

/// Traits of a name that is stored as text.
macro_rules! text_name {
    ($name:ident) => {
        text_name!($name, str::parse);
    };
    // `$read` parses what is stored.
    ($name:ident, $read:path) => {
        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                $read(&text)
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

mod glob;
pub use glob::PathGlob;

/// Where a secret is stored: `db:postgresql:dyn1`. The segments are separated by `/` or `:` in input, and by `:`
/// where the path is stored.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretPath(String);
text_name!(SecretPath);

impl SecretPath {
    /// Longest path, in bytes.
    pub const MAX_BYTES: usize = 512;

    /// Whether `prefix` is this path or a whole-segment beginning of it.
    pub fn starts_with(&self, prefix: &SecretPath) -> bool {
        match self.0.strip_prefix(&prefix.0) {
            Some(rest) => rest.is_empty() || rest.starts_with(':'),
            None => false,
        }
    }
}

impl FromStr for SecretPath {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return refuse("a path is needed, such as db:postgresql:dyn1");
        }
        if text.len() > Self::MAX_BYTES {
            return refuse(format!(
                "a path must have at most {} bytes",
                Self::MAX_BYTES
            ));
        }
        let text = text.replace('/', ":");
        for segment in text.split(':') {
            if segment.is_empty() {
                return refuse(
                    "a path must not have an empty segment (two separators in a row, or one at an end)",
                );
            }
            if segment == "." || segment == ".." {
                return refuse("`.` and `..` are not path segments");
            }
            if let Some(bad) = segment
                .chars()
                .find(|c| c.is_control() || c.is_whitespace() || *c == '*')
            {
                return refuse(format!(
                    "a path must not have white space, control characters or `*` (found {bad:?})"
                ));
            }
        }
        Ok(Self(text))
    }
}

/// A pool of engines: `[a-z0-9_-]{1,63}`. No dots, because it is one word of an AMQP routing key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PoolName(String);
text_name!(PoolName);

impl FromStr for PoolName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let fits = (1..=63).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-');
        if !fits {
            return refuse("a pool name is 1 to 63 of a-z, 0-9, `_` and `-`");
        }
        Ok(Self(text.to_owned()))
    }
}

/// One running engine: `[A-Za-z0-9_.-]{1,128}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EngineName(String);
text_name!(EngineName);

impl FromStr for EngineName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let fits = (1..=128).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if !fits {
            return refuse("an engine name is 1 to 128 of A-Z, a-z, 0-9, `_`, `.` and `-`");
        }
        Ok(Self(text.to_owned()))
    }
}

impl EngineName {
    /// `host` and a random part: several engines on one machine have different names.
    pub fn random(host: &str) -> Self {
        let host: String = host
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || "_.-".contains(c) {
                    c
                } else {
                    '-'
                }
            })
            .take(100)
            .collect();
        Self(format!("{host}-{}", random_text(6)))
    }
}

/// A lease: a UUID of version 7 (RFC 9562), so that ids sort by the time they were made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId(Uuid);

impl LeaseId {
    /// A new id with the current time.
    pub fn random() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for LeaseId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match Uuid::try_parse(text) {
            Ok(id) => Ok(Self(id)),
            Err(_) => refuse("a lease id is a UUID, such as 01890a5d-ac96-774b-bcce-b302099a8057"),
        }
    }
}

/// An installation: everything that shares a lease store. The comment of every role names it: two
/// installations on one server never touch each other's roles.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallationId(Uuid);

impl InstallationId {
    /// A new id, for a new store.
    pub fn random() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for InstallationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for InstallationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for InstallationId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match Uuid::try_parse(text) {
            Ok(id) => Ok(Self(id)),
            Err(_) => refuse("an installation id is a UUID"),
        }
    }
}

/// The prefix of a dynamic secret's roles.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserPrefix(String);
text_name!(UserPrefix);

impl Default for UserPrefix {
    fn default() -> Self {
        Self("mayfly_".to_owned())
    }
}

impl FromStr for UserPrefix {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > 30 {
            return refuse(format!("must have 1 to 30 bytes; it has {}", text.len()));
        }
        if text.chars().any(char::is_control) {
            return refuse("must not have control characters");
        }
        if text.starts_with("pg_") {
            return refuse("must not begin with `pg_`, which PostgreSQL reserves");
        }
        Ok(Self(text.to_owned()))
    }
}

/// A PostgreSQL role: 1 to 63 bytes (`NAMEDATALEN - 1`), no NUL. It is always quoted in SQL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RoleName(String);
text_name!(RoleName);

impl FromStr for RoleName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > 63 {
            return refuse(format!(
                "a role name has 1 to 63 bytes; this one has {}",
                text.len()
            ));
        }
        if text.contains('\0') {
            return refuse("a role name must not have a NUL");
        }
        Ok(Self(text.to_owned()))
    }
}

impl RoleName {
    /// The role of a lease: prefix, a random part, and the random end of the lease's id.
    /// At most 30 + 6 + 1 + 12 = 49 bytes.
    pub fn for_lease(prefix: &UserPrefix, lease: &LeaseId) -> Self {
        let id = lease.0.simple().to_string();
        Self(format!("{prefix}{}_{}", random_text(6), &id[20..]))
    }
}

/// `length` random characters of a-z and 0-9.
pub fn random_text(length: usize) -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..length)
        .map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_have_one_written_form() {
        let path: SecretPath = "db/postgresql:dyn1".parse().unwrap();
        assert_eq!(path.as_str(), "db:postgresql:dyn1");
        for bad in [
            "", ":", "a::b", "a/", "/a", "a b", "a\n", "a:*", "..", "a:.:b",
        ] {
            assert!(bad.parse::<SecretPath>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn prefixes_are_of_whole_segments() {
        let path: SecretPath = "db:app:one".parse().unwrap();
        assert!(path.starts_with(&"db:app".parse().unwrap()));
        assert!(path.starts_with(&path));
        assert!(!path.starts_with(&"db:ap".parse().unwrap()));
    }

    #[test]
    fn prefixes_of_roles_are_checked() {
        assert!("".parse::<UserPrefix>().is_err());
        assert!("pg_x".parse::<UserPrefix>().is_err());
        assert!("a\u{7}b".parse::<UserPrefix>().is_err());
        assert!("é".repeat(15).parse::<UserPrefix>().is_ok());
        assert!("é".repeat(16).parse::<UserPrefix>().is_err());
    }

    proptest! {
        #[test]
        fn a_lease_role_always_fits(prefix in "[^\\x00-\\x1f\\x7f-\\u{9f}]{1,30}") {
            if let Ok(prefix) = prefix.parse::<UserPrefix>() {
                let role = RoleName::for_lease(&prefix, &LeaseId::random());
                prop_assert!(role.as_str().len() <= 63);
                prop_assert!(role.as_str().starts_with(prefix.as_str()));
            }
        }
    }
}
