//! Finds out which object a name means, from the rows that a catalog has for it. This module is pure.

use mayfly_protocol::grant::Grant;
use mayfly_protocol::task::{Failure, FailureCode};

use super::grant_pairs::NAMES_IN_A_MESSAGE;
use super::row::Row;

/// What a bare name means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bare {
    /// The only table of this name.
    Table,
    /// The database of this name.
    Database,
}

/// Finds out whether a bare name means a table of this database or a database. The second column of each row names a
/// table.
///
/// # Errors
/// `no_such_object` if nothing has this name; `ambiguous_object` if several things have it.
pub(super) fn bare_name(
    tables: &[Row],
    name: &str,
    is_database: bool,
    grant: &Grant,
) -> Result<Bare, Failure> {
    match (tables, is_database) {
        ([_], false) => Ok(Bare::Table),
        ([], true) => Ok(Bare::Database),
        ([], false) => Err(Failure::new(
            FailureCode::NoSuchObject,
            format!("{name:?} is neither a table of this database nor a database ({grant})"),
        )),
        (tables, _) => {
            let mut things: Vec<String> = tables
                .iter()
                .map(|row| format!("table {}", row.text(1)))
                .collect();
            if is_database {
                things.push(format!("database {name}"));
            }
            Err(Failure::new(
                FailureCode::AmbiguousObject,
                format!(
                    "{name:?} is {}; write schema.table or database:NAME ({grant})",
                    things.join(" and ")
                ),
            ))
        }
    }
}

/// The oid in the second column of the only row. The first column names the object.
///
/// # Errors
/// `no_such_object` if there is none; `ambiguous_object` if there are several.
pub(super) fn one(found: &[Row], word: &str, name: &str) -> Result<String, Failure> {
    match found {
        [row] => Ok(row.text(1).to_owned()),
        [] => Err(Failure::new(
            FailureCode::NoSuchObject,
            format!("there is no {word} {name:?} in this database"),
        )),
        several => {
            let things: Vec<&str> = several
                .iter()
                .take(NAMES_IN_A_MESSAGE)
                .map(|row| row.text(0))
                .collect();
            Err(Failure::new(
                FailureCode::AmbiguousObject,
                format!(
                    "{word} {name:?} is ambiguous: {}; use the full name",
                    things.join(", ")
                ),
            ))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn named(name: &str, oid: &str) -> Row {
        Row::from([Some(name), Some(oid)])
    }

    #[test]
    fn a_bare_name_is_one_thing() {
        let grant = Grant::parse("SELECT", "t").unwrap();
        let table = |name: &str| Row::from([Some("r"), Some(name), Some("1")]);
        let one = [table("a.t")];
        let two = [table("a.t"), table("b.t")];
        let bare = |tables: &[Row], is_database| {
            bare_name(tables, "t", is_database, &grant).map_err(|failure| failure.code)
        };
        assert_eq!(bare(&one, false), Ok(Bare::Table));
        assert_eq!(bare(&[], true), Ok(Bare::Database));
        assert_eq!(bare(&[], false), Err(FailureCode::NoSuchObject));
        assert_eq!(bare(&one, true), Err(FailureCode::AmbiguousObject));
        assert_eq!(bare(&two, false), Err(FailureCode::AmbiguousObject));
        let failure = bare_name(&one, "t", true, &grant).unwrap_err();
        assert!(failure.message.contains("table a.t and database t"));
    }

    #[test]
    fn a_name_must_be_found_once() {
        let several: Vec<Row> = (0..9).map(|n| named(&format!("s{n}.f()"), "1")).collect();
        assert_eq!(one(&[named("s.f()", "42")], "function", "f").unwrap(), "42");
        let none = one(&[], "function", "f").unwrap_err();
        assert_eq!(none.code, FailureCode::NoSuchObject);
        let ambiguous = one(&several, "function", "f").unwrap_err();
        assert_eq!(ambiguous.code, FailureCode::AmbiguousObject);
        assert!(ambiguous.message.contains("s4.f()") && !ambiguous.message.contains("s5.f()"));
    }
}
