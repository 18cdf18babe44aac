//! Pairs of object and privilege: those that are wanted, and those that a role lacks. This module is pure.

use mayfly_protocol::grant::{ObjectKind, Privilege};

use super::row::Row;

/// Maximum number of names in a message.
pub(super) const NAMES_IN_A_MESSAGE: usize = 5;
/// Maximum number of objects of a pattern in one page.
pub(super) const OBJECTS_PER_PAGE: usize = 5000;

/// One privilege on one object that the role does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lack {
    pub(super) keyword: &'static str,
    /// The object as SQL. If `unsayable`, it is only for messages.
    pub(super) object: String,
    pub(super) privilege: String,
    /// Whether the role has the privilege itself and lacks only USAGE of the schema.
    pub(super) held: bool,
    /// Whether the admin may grant it.
    pub(super) grantable: bool,
    /// The schema whose USAGE is missing, and whether the admin may grant that.
    pub(super) schema: Option<(String, bool)>,
    /// Whether another transaction holds the object: a GRANT would wait for it.
    pub(super) busy: bool,
    /// Whether the object's name is not valid UTF-8, so that no statement of Mayfly can name it.
    pub(super) unsayable: bool,
}

impl Lack {
    /// Whether the admin cannot grant what is missing.
    pub(super) fn is_beyond(&self) -> bool {
        self.unsayable
            || (!self.held && !self.grantable)
            || self.schema.as_ref().is_some_and(|(_, can)| !can)
    }
}

/// Privileges that are wanted on the objects of one kind that a filter finds.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) kind: ObjectKind,
    pub(super) privileges: Vec<Privilege>,
    /// Privileges on columns, with the columns. They replace those on the whole object.
    pub(super) columns: Vec<(Privilege, String)>,
    pub(super) filter: String,
    /// Whether nobody has to name the objects, so that no USAGE of their schemas is needed.
    pub(super) unnamed: bool,
}

impl Wanted {
    pub(super) fn of(
        kind: ObjectKind,
        privileges: Vec<Privilege>,
        filter: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            privileges,
            columns: vec![],
            filter: filter.into(),
            unnamed: false,
        }
    }
}

/// A part of the answer: what a role lacks on some of the objects that a filter finds.
#[derive(Debug)]
pub(super) struct Page {
    /// Number of pairs of object and privilege.
    pub(super) total: usize,
    pub(super) lacks: Vec<Lack>,
    /// The object with which the next page begins. `None`: this page is the last.
    pub(super) next: Option<String>,
}

impl Page {
    /// Parses the answer to the query of [`super::grant_lacks`]. Its first row has the numbers of pairs and of
    /// objects, and the last object. Each other row is a missing pair. `is_paged`: the query asked for one page of a
    /// pattern.
    pub(super) fn from_rows(rows: &[Row], keyword: &'static str, is_paged: bool) -> Self {
        let mut rows = rows.iter();
        let first = rows.next().cloned().unwrap_or_default();
        let is_full = first.parse(1) == Some(OBJECTS_PER_PAGE);
        let lacks = rows.map(|row| {
            let (object, unsayable) = received(row.text(0));
            let schema = row.get(4);
            Lack {
                keyword,
                object,
                privilege: row.text(1).to_owned(),
                held: row.flag(2),
                grantable: row.flag(3),
                schema: schema.map(|schema| (received(schema).0, row.flag(5))),
                busy: row.flag(6),
                unsayable,
            }
        });
        Self {
            total: first.parse(0).unwrap_or(0),
            lacks: lacks.collect(),
            next: (is_paged && is_full).then(|| first.text(2).to_owned()),
        }
    }
}

/// The names of the first few, for a message.
pub(super) fn names(lacks: &[Lack]) -> String {
    let mut text = lacks
        .iter()
        .take(NAMES_IN_A_MESSAGE)
        .map(|lack| match &lack.schema {
            Some((schema, _)) if lack.held => format!("USAGE on schema {schema}"),
            _ if lack.unsayable => format!(
                "{} on {} (its name is not UTF-8)",
                lack.privilege, lack.object
            ),
            _ => format!("{} on {}", lack.privilege, lack.object),
        })
        .collect::<Vec<_>>()
        .join("; ");
    if lacks.len() > NAMES_IN_A_MESSAGE {
        text.push_str(&format!("; and {} more", lacks.len() - NAMES_IN_A_MESSAGE));
    }
    text
}

/// The name that `sent_safely` of [`super::grant_lacks`] has sent. The flag says that it is not UTF-8; such a name
/// is used in messages only.
fn received(text: &str) -> (String, bool) {
    let Some(hex) = text.strip_prefix('x') else {
        return (text.get(1..).unwrap_or_default().to_owned(), false);
    };
    let digit = |n: usize| hex.get(n..n + 2);
    let bytes: Vec<u8> = (0..hex.len())
        .step_by(2)
        .filter_map(|n| u8::from_str_radix(digit(n)?, 16).ok())
        .collect();
    match String::from_utf8(bytes) {
        Ok(name) => (name, false),
        Err(error) => (error.as_bytes().escape_ascii().to_string(), true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_not_utf8_is_shown_and_not_said() {
        assert_eq!(received("tapp.\"x y\""), ("app.\"x y\"".to_owned(), false));
        assert_eq!(received("x636166c3a9"), ("café".to_owned(), false));
        assert_eq!(received("x636166e9"), ("caf\\xe9".to_owned(), true));
    }

    #[test]
    fn rows_become_a_page() {
        let full = OBJECTS_PER_PAGE.to_string();
        let rows = |objects: &str| {
            [
                Row::from([Some("7"), Some(objects), Some("4711")]),
                Row::from([
                    Some("tapp.a"),
                    Some("SELECT"),
                    Some("false"),
                    Some("true"),
                    Some("tapp"),
                    Some("false"),
                    Some("true"),
                ]),
                Row::from([
                    Some("x636166e9"),
                    Some("INSERT"),
                    Some("true"),
                    Some("false"),
                    None,
                    None,
                    Some("false"),
                ]),
            ]
        };
        let page = Page::from_rows(&rows("3"), "TABLE", true);
        assert_eq!((page.total, page.next), (7, None));
        let [one, other] = page.lacks.as_slice() else {
            panic!("{:?}", page.lacks);
        };
        assert_eq!(one.object, "app.a");
        assert_eq!(one.schema, Some(("app".to_owned(), false)));
        assert!(one.grantable && one.busy && !one.held && !one.unsayable);
        assert!(one.is_beyond(), "the schema is out of reach");
        assert!(other.held && other.unsayable && other.is_beyond());
        assert_eq!(
            Page::from_rows(&rows(&full), "TABLE", true).next.as_deref(),
            Some("4711")
        );
        let named = Page::from_rows(&rows(&full), "TABLE", false);
        assert_eq!(named.next, None, "what is named has one page");
        assert_eq!(Page::from_rows(&[], "TABLE", true).total, 0);
    }

    #[test]
    fn a_message_names_the_first_few() {
        let lack = Lack {
            keyword: "TABLE",
            object: "a".to_owned(),
            privilege: "SELECT".to_owned(),
            held: false,
            grantable: false,
            schema: None,
            busy: false,
            unsayable: false,
        };
        let schema_only = Lack {
            held: true,
            schema: Some(("app".to_owned(), false)),
            ..lack.clone()
        };
        assert_eq!(
            names(&[lack.clone(), schema_only]),
            "SELECT on a; USAGE on schema app"
        );
        let many = vec![lack; NAMES_IN_A_MESSAGE + 2];
        assert!(names(&many).ends_with("; and 2 more"));
    }
}
