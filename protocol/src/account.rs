//! What an account has besides its grants: settings of its sessions (`ALTER ROLE … SET`) and attributes of
//! its role. This module parses them and checks their text. The engine finds out which settings and rights
//! the server has.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Maximum number of settings of one secret.
pub const MAX_SETTINGS: usize = 32;
/// Maximum length of a setting's value, in bytes.
const MAX_VALUE_BYTES: usize = 1000;
/// Maximum length of a setting's name, in bytes (PostgreSQL's NAMEDATALEN minus 1).
const MAX_NAME_BYTES: usize = 63;

/// Settings whose value is a list of names; PostgreSQL quotes each name by itself.
const LISTS: [&str; 2] = ["search_path", "temp_tablespaces"];

/// Prefixes of settings that no secret may have, each with the reason.
const REFUSED: [(&str, &str); 9] = [
    (
        "session_authorization",
        "an account must not become another role by this setting",
    ),
    ("local_preload_libraries", LOADS),
    ("session_preload_libraries", LOADS),
    ("shared_preload_libraries", LOADS),
    ("dynamic_library_path", LOADS),
    ("log_", LOGS),
    ("debug_", LOGS),
    ("pgaudit.", LOGS),
    ("auto_explain.", LOGS),
];
const LOADS: &str = "it makes the server load code";
const LOGS: &str = "it changes what the server logs about an account";

/// Settings of an account's sessions, by name. A value is one text, or a list of names.
pub type Settings = BTreeMap<String, Vec<String>>;

/// What an account has besides its grants.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Account {
    /// `ALTER ROLE … SET`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: Settings,
    /// Attributes of its role, such as `CREATEDB`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attributes: Vec<Attribute>,
    /// The server gets its password in clear, and computes the verifier itself.
    #[serde(default, skip_serializing_if = "is_false")]
    pub clear_password: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_false(truth: &bool) -> bool {
    !truth
}

impl Account {
    /// Whether it has nothing beyond its grants.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// An attribute of a role that a secret may request (PostgreSQL documentation, "Role Attributes").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attribute {
    /// It may create databases.
    CreateDb,
    /// It may begin streaming replication, and make replication slots.
    Replication,
    /// Row security does not apply to it.
    BypassRls,
}

impl Attribute {
    /// All attributes, in the order of a secret.
    pub const ALL: [Self; 3] = [Self::CreateDb, Self::Replication, Self::BypassRls];

    /// The key in a secret.
    pub fn key(self) -> &'static str {
        match self {
            Self::CreateDb => "createdb",
            Self::Replication => "replication",
            Self::BypassRls => "bypassrls",
        }
    }

    /// The SQL key word.
    pub fn as_sql(self) -> &'static str {
        match self {
            Self::CreateDb => "CREATEDB",
            Self::Replication => "REPLICATION",
            Self::BypassRls => "BYPASSRLS",
        }
    }

    /// The column of `pg_roles`.
    pub fn column(self) -> &'static str {
        match self {
            Self::CreateDb => "rolcreatedb",
            Self::Replication => "rolreplication",
            Self::BypassRls => "rolbypassrls",
        }
    }
}

/// Whether a setting's value is a list of names.
pub fn is_list(name: &str) -> bool {
    LISTS.contains(&name)
}

/// Checks a setting's name.
///
/// # Errors
/// Why it is refused.
pub fn check_name(name: &str) -> Result<(), String> {
    check_parameter(name)?;
    let refused = |(refused, _): &&(&str, &str)| {
        name == *refused || (refused.ends_with(['_', '.']) && name.starts_with(refused))
    };
    match REFUSED.iter().find(refused) {
        Some((_, why)) => Err(format!("cannot be set for accounts: {why}")),
        None => Ok(()),
    }
}

/// Checks that a text is a valid name of a setting.
///
/// # Errors
/// The reason.
pub fn check_parameter(name: &str) -> Result<(), String> {
    let is_word = |word: &str| {
        let mut bytes = word.bytes();
        bytes
            .next()
            .is_some_and(|first| first.is_ascii_lowercase() || first == b'_')
            && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let is_name = match name.split_once('.') {
        None => is_word(name),
        Some((class, rest)) => is_word(class) && is_word(rest),
    };
    if !is_name || name.len() > MAX_NAME_BYTES {
        return Err(format!(
            "is not the name of a setting: lower-case letters, digits and _, at most {MAX_NAME_BYTES} bytes, with one dot in a setting of your own (app.tenant)"
        ));
    }
    Ok(())
}

/// Checks one text of a setting's value.
///
/// # Errors
/// Why it is refused.
pub fn check_value(value: &str) -> Result<(), String> {
    if value.len() > MAX_VALUE_BYTES || value.contains('\0') {
        return Err(format!(
            "must have at most {MAX_VALUE_BYTES} bytes and no NUL"
        ));
    }
    Ok(())
}

/// The names in a list that is written as one text: `app, "My Schema", public`. They are used as written,
/// without case folding, as everywhere in Mayfly.
///
/// # Errors
/// Where a double quote is not closed, or a name is missing.
pub fn names_of(list: &str) -> Result<Vec<String>, String> {
    if list.trim().is_empty() {
        return Ok(vec![String::new()]);
    }
    let mut names = Vec::new();
    let mut rest = list;
    loop {
        rest = rest.trim_start();
        let name = if let Some(mut inside) = rest.strip_prefix('"') {
            let mut name = String::new();
            loop {
                let (part, after) = inside
                    .split_once('"')
                    .ok_or("has a double quote that is not closed")?;
                name.push_str(part);
                match after.strip_prefix('"') {
                    Some(more) => {
                        name.push('"');
                        inside = more;
                    }
                    None => {
                        rest = after.trim_start();
                        break;
                    }
                }
            }
            name
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            let name = rest[..end].trim_end().to_owned();
            rest = &rest[end..];
            if name.is_empty() || name.contains(['"', '\'']) {
                return Err("must be names separated by commas; put a name with a quote or a comma in double quotes".to_owned());
            }
            name
        };
        names.push(name);
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None if rest.is_empty() => return Ok(names),
            None => return Err("has something other than a comma after a quoted name".to_owned()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_loads_code_or_hides_from_the_log_is_refused() {
        for name in [
            "statement_timeout",
            "role",
            "search_path",
            "work_mem",
            "app.tenant",
            "_x",
            "idle_in_transaction_session_timeout",
        ] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
        for (name, said) in [
            ("session_preload_libraries", "load code"),
            ("local_preload_libraries", "load code"),
            ("log_statement", "logs"),
            ("log_min_duration_statement", "logs"),
            ("debug_print_plan", "logs"),
            ("pgaudit.log", "logs"),
            ("session_authorization", "another role"),
            (
                "work_mem = '1'; DROP ROLE x; --",
                "not the name of a setting",
            ),
            ("Work_Mem", "not the name of a setting"),
            ("", "not the name of a setting"),
            ("a.b.c", "not the name of a setting"),
            (".x", "not the name of a setting"),
            ("1x", "not the name of a setting"),
        ] {
            let reason = check_name(name).unwrap_err();
            assert!(reason.contains(said), "{name}: {reason}");
        }
        assert!(check_name(&"x".repeat(64)).is_err());
        assert!(check_value(&"x".repeat(1001)).is_err() && check_value("a\0").is_err());
    }

    #[test]
    fn a_list_of_names_is_taken_as_written() {
        let names = |list: &str| names_of(list).unwrap();
        assert_eq!(names("app, public"), ["app", "public"]);
        assert_eq!(
            names(r#" "$user" ,"My ""S"", x",App "#),
            ["$user", r#"My "S", x"#, "App"]
        );
        assert_eq!(names(" "), [""]);
        for bad in ["a,", ",a", "\"a", "\"a\"b", "a'b", "a\"b\""] {
            assert!(names_of(bad).is_err(), "{bad}");
        }
    }
}
