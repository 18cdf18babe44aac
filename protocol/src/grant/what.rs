//! The `what` of a grant: `ALL`, or a list of privileges, some of them on columns.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use super::{Columns, GrantError, ObjectKind, Privilege, refuse};

/// Which privileges: all that the object has, or a list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// `ALL [PRIVILEGES]`: every privilege that the object has.
    All,
    /// The privileges in the list.
    These(BTreeSet<Privilege>),
    /// Privileges of which some are on columns.
    Columns(Columns),
}

impl What {
    /// The requested privileges that this kind of object has.
    pub fn on(&self, kind: ObjectKind, server_major: u32) -> Vec<Privilege> {
        kind.privileges(server_major)
            .iter()
            .copied()
            .filter(|p| match self {
                Self::All => true,
                Self::These(list) | Self::Columns(Columns { whole: list, .. }) => list.contains(p),
            })
            .collect()
    }

    /// The first requested privilege that this kind of object does not have.
    pub fn foreign_to(&self, kind: ObjectKind, server_major: u32) -> Option<Privilege> {
        match self {
            Self::All => None,
            Self::These(list) | Self::Columns(Columns { whole: list, .. }) => list
                .iter()
                .copied()
                .find(|p| !kind.privileges(server_major).contains(p)),
        }
    }

    /// The requested privileges that none of these kinds of object has in this version, although some have
    /// them in a newer version.
    pub fn unknown_to(&self, kinds: &[ObjectKind], server_major: u32) -> Vec<Privilege> {
        let Self::These(list) = self else {
            return Vec::new();
        };
        let has = |kind: &ObjectKind, p: &Privilege| kind.privileges(server_major).contains(p);
        list.iter()
            .copied()
            .filter(|p| !kinds.iter().any(|kind| has(kind, p)))
            .collect()
    }

    /// Whether this privilege is requested.
    pub fn includes(&self, privilege: Privilege) -> bool {
        match self {
            Self::All => true,
            Self::These(list) => list.contains(&privilege),
            Self::Columns(columns) => {
                columns.whole.contains(&privilege) || columns.of.contains_key(&privilege)
            }
        }
    }

    /// The privileges that are requested on columns, one by one.
    pub fn columns(&self) -> impl Iterator<Item = (Privilege, &str)> {
        let of = match self {
            Self::All | Self::These(_) => None,
            Self::Columns(columns) => Some(&columns.of),
        };
        of.into_iter().flatten().flat_map(|(privilege, columns)| {
            columns.iter().map(|column| (*privilege, column.as_str()))
        })
    }
}

impl FromStr for What {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        if text.contains('(') {
            return Columns::parse(text).map(Self::Columns);
        }
        let mut list = BTreeSet::new();
        let words: Vec<String> = text
            .split(',')
            .map(|part| {
                part.split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" ")
                    .to_ascii_uppercase()
            })
            .collect();
        if words == ["ALL"] || words == ["ALL PRIVILEGES"] {
            return Ok(Self::All);
        }
        for word in &words {
            if word.is_empty() {
                return refuse(
                    "what",
                    "a privilege is missing; write SELECT, or SELECT, INSERT, or ALL",
                );
            }
            if word.starts_with("ALL") {
                return refuse("what", "ALL must be the only privilege");
            }
            match Privilege::parse(word) {
                Some(privilege) => list.insert(privilege),
                None => {
                    let known: Vec<_> = Privilege::ALL.iter().map(|p| p.as_sql()).collect();
                    return refuse(
                        "what",
                        format!(
                            "`{word}` is not a privilege; known: {}, ALL",
                            known.join(", ")
                        ),
                    );
                }
            };
        }
        Ok(Self::These(list))
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("ALL"),
            Self::These(list) => {
                let words: Vec<_> = list.iter().map(|p| p.as_sql()).collect();
                f.write_str(&words.join(","))
            }
            Self::Columns(columns) => columns.fmt(f),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn whats_are_understood() {
        assert_eq!("all privileges".parse::<What>().unwrap(), What::All);
        assert_eq!(
            "select , Insert".parse::<What>().unwrap().to_string(),
            "SELECT,INSERT"
        );
        assert_eq!("temp".parse::<What>().unwrap().to_string(), "TEMPORARY");
        for bad in [
            "",
            "SELEC",
            "SELECT,",
            "SELECT, ALL",
            "SELECT; DROP TABLE x",
        ] {
            assert!(bad.parse::<What>().is_err(), "{bad:?}");
        }
    }
}
