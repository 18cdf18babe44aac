//! Grants: what an account may do (`what`) and on which objects (`where`). This module parses them and checks
//! their text. The engine finds out which objects exist.

mod columns;
mod names;
mod objects;
mod privilege;
mod what;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use columns::Columns;
pub use objects::{Scope, Where};
pub use privilege::{ObjectKind, Privilege};
pub use what::What;

/// Why a grant is refused: the wrong field, and what helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct GrantError {
    /// The key in a secret: `what`, `where` or `setRole`.
    pub field: &'static str,
    /// Why, and what to write, for the person who wrote the grant.
    pub reason: String,
}

fn refuse<T>(field: &'static str, reason: impl Into<String>) -> Result<T, GrantError> {
    Err(GrantError {
        field,
        reason: reason.into(),
    })
}

/// One grant, as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantText {
    what: String,
    #[serde(rename = "where")]
    on: String,
    // An engine that does not know this field refuses the grant.
    #[serde(rename = "setRole", default, skip_serializing_if = "is_false")]
    set_role: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_false(truth: &bool) -> bool {
    !truth
}

/// One grant: privileges on objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "GrantText", into = "GrantText")]
pub struct Grant {
    what: What,
    on: Where,
    on_text: String,
    set_role: bool,
}

impl Grant {
    /// Parses and checks a grant.
    ///
    /// # Errors
    /// An unknown privilege, a malformed `where`, or a kind of object that has none of the privileges.
    pub fn parse(what: &str, on: &str) -> Result<Self, GrantError> {
        let what: What = what.parse()?;
        let parsed: Where = on.parse()?;
        if let What::These(list) | What::Columns(Columns { whole: list, .. }) = &what {
            let kinds = parsed.kinds();
            let fits = |p: Privilege| kinds.iter().any(|kind| kind.may_have(p));
            if let Some(misfit) = list.iter().copied().find(|p| !fits(*p)) {
                let words: Vec<_> = kinds.iter().map(|kind| kind.word()).collect();
                return refuse(
                    "what",
                    format!(
                        "{} does not exist on a {} (`where` is `{on}`)",
                        misfit.as_sql(),
                        words.join(" or ")
                    ),
                );
            }
        }
        let is_one_table = matches!(&parsed, Where::Relations(scope) if !scope.is_pattern());
        if what.columns().next().is_some() && !is_one_table {
            return refuse(
                "what",
                "columns need one table: write schema.table, or table, in `where`",
            );
        }
        Ok(Self {
            what,
            on: parsed,
            on_text: on.trim().to_owned(),
            set_role: false,
        })
    }

    /// The same membership, with the right to become the role by `SET ROLE`. The grant role is a member in
    /// both cases, so its name does not depend on this.
    ///
    /// # Errors
    /// It is not a membership.
    pub fn with_set_role(self) -> Result<Self, GrantError> {
        if self.role().is_none() {
            return refuse(
                "setRole",
                "is for memberships: {\"what\": \"MEMBER\", \"where\": \"role:NAME\", \"setRole\": true}",
            );
        }
        Ok(Self {
            set_role: true,
            ..self
        })
    }

    /// The role that accounts may become by `SET ROLE`.
    pub fn set_role(&self) -> Option<&str> {
        self.role().filter(|_| self.set_role)
    }

    /// The privileges it gives.
    pub fn what(&self) -> &What {
        &self.what
    }

    /// The objects that it is about.
    pub fn on(&self) -> &Where {
        &self.on
    }

    /// The role of which accounts become members.
    pub fn role(&self) -> Option<&str> {
        match &self.on {
            Where::Role(name) => Some(name),
            _ => None,
        }
    }

    /// Whether it lets accounts create objects in a schema or database.
    pub fn creates(&self) -> bool {
        let named = matches!(&self.what, What::These(list) if list.contains(&Privilege::Create));
        match &self.on {
            Where::Schema(_) | Where::Database(_) => named || self.what == What::All,
            // A bare name may be a database.
            _ => named,
        }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.what, self.on_text)
    }
}

impl TryFrom<GrantText> for Grant {
    type Error = GrantError;
    fn try_from(text: GrantText) -> Result<Self, GrantError> {
        let grant = Self::parse(&text.what, &text.on)?;
        match text.set_role {
            true => grant.with_set_role(),
            false => Ok(grant),
        }
    }
}

impl From<Grant> for GrantText {
    fn from(grant: Grant) -> Self {
        Self {
            what: grant.what.to_string(),
            on: grant.on_text,
            set_role: grant.set_role,
        }
    }
}

/// What happens to the objects that an account owns when its lease ends.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OwnedObjects {
    /// To a quarantine role without privileges.
    #[default]
    Reassign,
    /// To the named role (for migrations).
    ReassignTo(String),
    /// Dropped, unless objects of other roles depend on them: then as `Reassign`.
    Drop,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn misfits_are_refused() {
        assert_eq!(Grant::parse("EXECUTE", "*.*").unwrap_err().field, "what");
        assert!(Grant::parse("SELECT", "schema:app").is_err());
        assert!(Grant::parse("SELECT", "database:app").is_err());
        assert!(
            Grant::parse("CONNECT", "app").is_ok(),
            "a bare name may be a database"
        );
        assert!(Grant::parse("ALL", "function:f").is_ok());
        assert!(Grant::parse("SET, alter system", "parameter:work_mem").is_ok());
        assert!(Grant::parse("USAGE", "parameter:work_mem").is_err());
        assert!(Grant::parse("SELECT", "largeobject:1").is_ok());
        assert!(Grant::parse("USAGE", "largeobject:1").is_err());
    }

    #[test]
    fn a_misfit_is_named_with_the_kinds_and_the_where() {
        for (what, on, reason) in [
            (
                "EXECUTE",
                "*.*",
                "EXECUTE does not exist on a table or sequence (`where` is `*.*`)",
            ),
            (
                "SELECT",
                "fdw:w",
                "SELECT does not exist on a foreign-data wrapper (`where` is `fdw:w`)",
            ),
        ] {
            assert_eq!(Grant::parse(what, on).unwrap_err().reason, reason);
        }
        let kinds = [
            "function:f",
            "schema:s",
            "database:d",
            "type:t",
            "server:s",
            "largeobject:1",
            "parameter:work_mem",
            "role:r",
        ];
        for (on, word) in kinds.into_iter().zip([
            "function",
            "schema",
            "database",
            "type",
            "foreign server",
            "large object",
            "parameter",
            "role",
        ]) {
            let reason = Grant::parse("TRIGGER", on).unwrap_err().reason;
            assert!(reason.contains(&format!("on a {word} ")), "{reason}");
        }
    }

    #[test]
    fn a_grant_is_shown_as_it_is_written() {
        let grant = Grant::parse("insert, SELECT", " app.* ").unwrap();
        assert_eq!(grant.to_string(), "SELECT,INSERT on app.*");
        assert_eq!(grant.role(), None);
        let member = Grant::parse("MEMBER", "role:\"a.b\"").unwrap();
        assert_eq!(member.role(), Some("a.b"));
        assert_eq!(member.set_role(), None);
    }

    #[test]
    fn what_lets_accounts_create_objects_is_known() {
        for (what, on, creates) in [
            ("CREATE", "schema:app", true),
            ("ALL", "schema:app", true),
            ("USAGE", "schema:app", false),
            ("CREATE", "database:app", true),
            ("ALL", "database:app", true),
            ("CONNECT", "database:app", false),
            // A bare name may be a database, but ALL on a bare name is about tables too.
            ("CREATE", "app", true),
            ("ALL", "app", false),
            ("SELECT", "app.t", false),
            ("ALL", "*.*", false),
        ] {
            let grant = Grant::parse(what, on).unwrap();
            assert_eq!(grant.creates(), creates, "{grant}");
        }
    }

    #[test]
    fn only_a_membership_lets_an_account_become_a_role() {
        let member = |set_role: Option<bool>| {
            let mut text = serde_json::json!({"what": "MEMBER", "where": "role:owner"});
            if let Some(set_role) = set_role {
                text["setRole"] = set_role.into();
            }
            serde_json::from_value::<Grant>(text).unwrap()
        };
        let plain = serde_json::to_value(member(Some(false))).unwrap();
        assert_eq!(
            plain,
            serde_json::json!({"what": "MEMBER", "where": "role:owner"}),
            "an older engine knows no setRole"
        );
        assert_eq!(member(None).set_role(), None);
        let able = member(Some(true));
        assert_eq!(able.set_role(), Some("owner"));
        assert_eq!(able.to_string(), member(None).to_string());
        let again = serde_json::from_value(serde_json::to_value(&able).unwrap());
        assert_eq!(able, again.unwrap());
        let table = Grant::parse("SELECT", "t").unwrap();
        assert_eq!(table.with_set_role().unwrap_err().field, "setRole");
    }
}
