//! Privileges on columns: `SELECT (id, name), INSERT (name), DELETE`. A privilege without columns is on the
//! whole table.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{GrantError, Privilege, refuse};
use crate::account::names_of;

/// Privileges of which some are on columns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Columns {
    /// Privileges on the whole table.
    pub whole: BTreeSet<Privilege>,
    /// Columns of each privilege, by name.
    pub of: BTreeMap<Privilege, BTreeSet<String>>,
}

impl Columns {
    /// Parses a text that has a `(`.
    pub(super) fn parse(text: &str) -> Result<Self, GrantError> {
        let (mut whole, mut of) = (BTreeSet::new(), BTreeMap::<_, BTreeSet<String>>::new());
        for part in parts(text)? {
            let (word, columns) = match part.split_once('(') {
                None => (part, None),
                Some((word, rest)) => match rest.trim_end().strip_suffix(')') {
                    Some(inside) => (word, Some(inside)),
                    None => {
                        return refuse(
                            "what",
                            "after the columns there must be a comma or the end",
                        );
                    }
                },
            };
            let word = word.split_whitespace().collect::<Vec<_>>().join(" ");
            let Some(privilege) = Privilege::parse(&word) else {
                return refuse(
                    "what",
                    format!("`{word}` is not a privilege of a table or a column"),
                );
            };
            let Some(columns) = columns else {
                whole.insert(privilege);
                continue;
            };
            if !privilege.is_of_columns() {
                return refuse(
                    "what",
                    format!(
                        "{} is no privilege of columns; SELECT, INSERT, UPDATE and REFERENCES are",
                        privilege.as_sql()
                    ),
                );
            }
            let names = names_of(columns).or_else(|reason| {
                refuse(
                    "what",
                    format!("the list of {}'s columns {reason}", privilege.as_sql()),
                )
            })?;
            if names
                .iter()
                .any(|name| name.is_empty() || name.len() > 63 || name.contains('\0'))
            {
                return refuse("what", "a column's name has 1 to 63 bytes and no NUL");
            }
            of.entry(privilege).or_default().extend(names);
        }
        Ok(Self { whole, of })
    }
}

/// The parts between commas outside of parentheses and quotes.
fn parts(text: &str) -> Result<Vec<&str>, GrantError> {
    let (mut parts, mut begin) = (Vec::new(), 0);
    let (mut inside, mut quoted) = (false, false);
    for (at, letter) in text.char_indices() {
        match letter {
            '"' => quoted = !quoted,
            _ if quoted => {}
            '(' if !inside => inside = true,
            ')' if inside => inside = false,
            '(' | ')' => return refuse("what", "the parentheses of the columns do not match"),
            ',' if !inside => {
                parts.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return refuse("what", "the columns have no closing `)`");
    }
    parts.push(&text[begin..]);
    Ok(parts)
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |name: &String| {
            let is_plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            match is_plain {
                true => name.clone(),
                false => format!("\"{}\"", name.replace('"', "\"\"")),
            }
        };
        let whole = self.whole.iter().map(|p| p.as_sql().to_owned());
        let of = self.of.iter().map(|(privilege, columns)| {
            let columns: Vec<_> = columns.iter().map(name).collect();
            format!("{} ({})", privilege.as_sql(), columns.join(", "))
        });
        f.write_str(&whole.chain(of).collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Grant, What};
    use proptest::prelude::*;

    #[test]
    fn columns_are_understood() {
        for (text, shown) in [
            ("select (id, name)", "SELECT (id, name)"),
            (
                "SELECT(id),insert ( id ), Delete",
                "DELETE,SELECT (id),INSERT (id)",
            ),
            ("SELECT (b), SELECT (a)", "SELECT (a, b)"),
            ("SELECT (a_1, \"b c\")", "SELECT (a_1, \"b c\")"),
            (
                r#"SELECT ("a,b", "c)d", "e""f")"#,
                r#"SELECT ("a,b", "c)d", "e""f")"#,
            ),
            ("ALTER  SYSTEM, SELECT (a)", "ALTER SYSTEM,SELECT (a)"),
        ] {
            let what: What = text.parse().unwrap();
            assert_eq!(what.to_string(), shown, "{text}");
            assert_eq!(shown.parse::<What>().unwrap(), what, "{shown}");
        }
        for bad in [
            "SELECT ()",
            "SELECT (a",
            "SELECT a)",
            "SELECT ((a))",
            "SELECT (a) x",
            "SELECT (a,)",
            "SELECT (\"a)",
            "DELETE (a)",
            "ALL (a)",
            "SELEC (a)",
            "(a)",
            "SELECT (a),",
            "SELECT (\"\")",
            "SELECT (\"a\0\")",
            "SELECT ((a)",
            "SELECT (a))",
            "SELECT (a)), INSERT (b)",
            "SELECT\", INSERT (a)",
        ] {
            assert!(bad.parse::<What>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_column_has_at_most_63_bytes() {
        for (bytes, is_a_name) in [(62, true), (63, true), (64, false), (65, false)] {
            let text = format!("SELECT ({})", "x".repeat(bytes));
            assert_eq!(text.parse::<What>().is_ok(), is_a_name, "{bytes}");
        }
    }

    #[test]
    fn columns_are_of_one_table() {
        assert!(Grant::parse("SELECT (id)", "app.t").is_ok());
        assert!(Grant::parse("SELECT (id), DELETE", "t").is_ok());
        for (what, on) in [
            ("SELECT (id)", "app.*"),
            ("SELECT (id)", "*.*"),
            ("SELECT (id)", "sequence:s"),
            ("SELECT (id)", "schema:app"),
            ("SELECT (id), EXECUTE", "app.t"),
        ] {
            assert_eq!(
                Grant::parse(what, on).unwrap_err().field,
                "what",
                "{what} on {on}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_column_survives(name in "[^\\x00]{1,15}") {
            let quoted = format!("SELECT (\"{}\")", name.replace('"', "\"\""));
            let what: What = quoted.parse().unwrap();
            prop_assert_eq!(what.to_string().parse::<What>().unwrap(), what.clone());
            let What::Columns(columns) = what else { panic!("columns") };
            prop_assert!(columns.of.values().next().unwrap().contains(&name));
        }
    }
}
