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

    #[test]
    fn a_kind_of_object_gets_what_it_has_in_its_version() {
        use ObjectKind::*;
        use Privilege::*;
        for (what, kind, version, on, foreign) in [
            ("SELECT, MAINTAIN", Table, 16, vec![Select], Some(Maintain)),
            ("SELECT, MAINTAIN", Table, 17, vec![Select, Maintain], None),
            ("SET", Parameter, 14, vec![], Some(Set)),
            ("SET", Parameter, 15, vec![Set], None),
            ("ALL", Parameter, 15, vec![Set, AlterSystem], None),
            ("ALL", Parameter, 14, vec![], None),
            ("ALL", Sequence, 15, vec![Usage, Select, Update], None),
            ("DELETE, SELECT (a)", Table, 15, vec![Delete], None),
            ("SELECT, USAGE", Schema, 15, vec![Usage], Some(Select)),
        ] {
            let words = format!("{what} on {kind:?} in {version}");
            let what: What = what.parse().unwrap();
            assert_eq!(what.on(kind, version), on, "{words}");
            assert_eq!(what.foreign_to(kind, version), foreign, "{words}");
        }
    }

    #[test]
    fn what_no_kind_has_in_an_earlier_version_is_unknown() {
        use ObjectKind::*;
        use Privilege::*;
        for (what, version, unknown) in [
            ("SELECT, MAINTAIN, USAGE", 16, vec![Maintain]),
            ("SELECT, MAINTAIN, USAGE", 17, vec![]),
            ("ALL", 14, vec![]),
            ("MAINTAIN, SELECT (a)", 16, vec![]),
        ] {
            let found = what.parse::<What>().unwrap();
            let found = found.unknown_to(&[Table, Sequence], version);
            assert_eq!(found, unknown, "{what} in {version}");
        }
    }

    #[test]
    fn a_requested_privilege_is_included_on_the_table_or_on_columns() {
        use Privilege::*;
        for (what, privilege, is_included) in [
            ("ALL", Delete, true),
            ("SELECT", Select, true),
            ("SELECT", Delete, false),
            ("DELETE, SELECT (a)", Delete, true),
            ("DELETE, SELECT (a)", Select, true),
            ("DELETE, SELECT (a)", Insert, false),
        ] {
            let parsed: What = what.parse().unwrap();
            assert_eq!(parsed.includes(privilege), is_included, "{what}");
        }
        let columns: What = "INSERT (c), SELECT (b, a), DELETE".parse().unwrap();
        let columns: Vec<_> = columns.columns().collect();
        assert_eq!(columns, [(Select, "a"), (Select, "b"), (Insert, "c")]);
        assert_eq!(What::All.columns().count(), 0);
    }
}
