//! Options of a dynamic secret for its accounts besides the grants: settings of their sessions, attributes of their
//! roles, and the user name that a pooler expects.

use mayfly_protocol::account::{self, Account, Attribute, MAX_SETTINGS, Settings};
use mayfly_protocol::grant::Grant;
use serde_json::Value;

use super::fields::Fields;

/// What stands for the role's name in a [`UsernameTemplate`].
const ROLE: &str = "{{role}}";
/// Longest template, in bytes.
const MAX_TEMPLATE_BYTES: usize = 200;

/// The keys that this module reads.
pub(super) const KEYS: [&str; 6] = [
    "settings",
    "createdb",
    "replication",
    "bypassrls",
    "usernameTemplate",
    "accountPassword",
];

/// Reads settings and attributes. Each has a key of its own. `grants` are those of the same secret, if they are
/// valid.
pub(super) fn account(attributes: &mut Fields<'_>, grants: Option<&[Grant]>) -> Account {
    let given = Attribute::ALL
        .into_iter()
        .filter(|attribute| attributes.boolean(attribute.key()) == Some(true))
        .collect();
    Account {
        settings: settings(attributes, grants),
        attributes: given,
        clear_password: clear_password(attributes),
    }
}

/// Whether the server gets passwords in clear.
fn clear_password(attributes: &mut Fields<'_>) -> bool {
    let name = "accountPassword";
    if attributes.has(name) && !attributes.is(name, "verifier") && !attributes.is(name, "clear") {
        attributes.problem(
            name,
            "must be \"verifier\" (the default), or \"clear\" for a server that refuses verifiers",
        );
    }
    attributes.is(name, "clear")
}

fn settings(attributes: &mut Fields<'_>, grants: Option<&[Grant]>) -> Settings {
    let mut settings = Settings::new();
    let Some(value) = attributes.value("settings") else {
        return settings;
    };
    let Some(object) = value.as_object() else {
        attributes.problem(
            "settings",
            "must be an object such as {\"statement_timeout\": \"30s\"}",
        );
        return settings;
    };
    if object.len() > MAX_SETTINGS {
        attributes.problem(
            "settings",
            format!("must have at most {MAX_SETTINGS} settings"),
        );
    }
    for (name, value) in object {
        let parsed = account::check_name(name).and_then(|()| texts(name, value));
        let parsed = parsed.and_then(|texts| match name == "role" {
            true => may_become(&texts, grants).map(|()| texts),
            false => Ok(texts),
        });
        match parsed {
            Ok(texts) => drop(settings.insert(name.clone(), texts)),
            Err(reason) => attributes.problem(&format!("settings.{name}"), reason),
        }
    }
    settings
}

/// The texts of a value, which is one text or a list of texts.
fn texts(name: &str, value: &Value) -> Result<Vec<String>, String> {
    let texts = match value {
        Value::Array(list) if account::is_list(name) => list
            .iter()
            .map(|one| one.as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .filter(|list| !list.is_empty())
            .ok_or("must be a list of one or more names")?,
        Value::String(text) if account::is_list(name) => account::names_of(text)?,
        Value::String(text) => vec![text.clone()],
        Value::Number(number) => vec![number.to_string()],
        Value::Bool(truth) => vec![if *truth { "on" } else { "off" }.to_owned()],
        Value::Array(_) | Value::Object(_) | Value::Null => {
            return Err("must be a string, a number or a boolean".to_owned());
        }
    };
    for text in &texts {
        account::check_value(text)?;
    }
    Ok(texts)
}

/// Checks that accounts may become the role of the setting `role`.
fn may_become(texts: &[String], grants: Option<&[Grant]>) -> Result<(), String> {
    let Some(grants) = grants else {
        return Ok(());
    };
    let role = texts.first().map(String::as_str);
    if role == Some("none") || grants.iter().any(|grant| grant.set_role() == role) {
        return Ok(());
    }
    Err("needs a membership in grantPermissions: {\"what\": \"MEMBER\", \"where\": \"role:NAME\", \"setRole\": true}".to_owned())
}

/// The user name that callers get: the role's name, with what a pooler adds to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UsernameTemplate(String);

impl Default for UsernameTemplate {
    fn default() -> Self {
        Self(ROLE.to_owned())
    }
}

impl UsernameTemplate {
    /// The user name of a role.
    pub(crate) fn name(&self, role: &str) -> String {
        self.0.replacen(ROLE, role, 1)
    }
}

pub(super) fn username_template(attributes: &mut Fields<'_>) -> Option<UsernameTemplate> {
    let name = "usernameTemplate";
    let Some(text) = attributes.text(name) else {
        return Some(UsernameTemplate::default());
    };
    let mut around = text.splitn(2, ROLE);
    let (before, after) = (around.next().unwrap_or_default(), around.next());
    let is_sound = after.is_some_and(|after| {
        [before, after].iter().all(|part| {
            !part.contains("{{") && !part.contains("}}") && !part.chars().any(char::is_control)
        })
    });
    if !is_sound || text.len() > MAX_TEMPLATE_BYTES {
        attributes.problem(
            name,
            format!("must be a string of at most {MAX_TEMPLATE_BYTES} bytes that contains {ROLE} once, such as \"{ROLE}.tenant\""),
        );
        return None;
    }
    Some(UsernameTemplate(text))
}

/// Reads the `setRole` of a grant.
pub(super) fn with_set_role(fields: &mut Fields<'_>, grant: Grant) -> Option<Grant> {
    if fields.boolean("setRole") != Some(true) {
        return Some(grant);
    }
    match grant.with_set_role() {
        Ok(grant) => Some(grant),
        Err(error) => {
            fields.problem(error.field, error.reason);
            None
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Content, Dynamic, Spec, parse};
    use super::*;
    use crate::error::Problems;
    use serde_json::json;

    fn dynamic(more: Value) -> Result<Dynamic, Problems> {
        let mut attributes = json!({
            "grantPermissions": [{"what": "SELECT", "where": "*.*"},
                {"what": "MEMBER", "where": "role:owner", "setRole": true},
                {"what": "MEMBER", "where": "role:reader"}],
            "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:root"},
            "pool": "pool1", "ttl": 60,
        });
        for (name, value) in more.as_object().unwrap() {
            attributes[name] = value.clone();
        }
        let content = Content {
            attributes: attributes.as_object().unwrap().clone(),
            ..Content::default()
        };
        match parse(&content, 1000)? {
            Spec::Dynamic(dynamic) => Ok(*dynamic),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn settings_and_attributes_are_read() {
        let plain = dynamic(json!({"createdb": false})).unwrap();
        assert!(plain.account.is_plain());
        assert_eq!(plain.username_template.name("r"), "r");
        let found = dynamic(json!({
            "settings": {"statement_timeout": "30s", "work_mem": 4096, "jit": false,
                "search_path": "app, \"My S\"", "role": "owner", "app.tenant": "7"},
            "createdb": true, "bypassrls": true, "usernameTemplate": "{{role}}.tenant",
        }))
        .unwrap();
        let settings = &found.account.settings;
        assert_eq!(settings["statement_timeout"], ["30s"]);
        assert_eq!(settings["work_mem"], ["4096"]);
        assert_eq!(settings["jit"], ["off"]);
        assert_eq!(settings["search_path"], ["app", "My S"]);
        assert_eq!(
            found.account.attributes,
            [Attribute::CreateDb, Attribute::BypassRls]
        );
        assert_eq!(
            found.username_template.name("a{{role}}"),
            "a{{role}}.tenant"
        );
        assert_eq!(found.grants[1].set_role(), Some("owner"));
        assert_eq!(found.grants[2].set_role(), None);
    }

    #[test]
    fn each_wrong_key_is_named() {
        for (more, field) in [
            (json!({"settings": ["x"]}), "attributes.settings"),
            (
                json!({"settings": {"log_statement": "none"}}),
                "attributes.settings.log_statement",
            ),
            (
                json!({"settings": {"work_mem": null}}),
                "attributes.settings.work_mem",
            ),
            (
                json!({"settings": {"work_mem": ["1"]}}),
                "attributes.settings.work_mem",
            ),
            (
                json!({"settings": {"search_path": []}}),
                "attributes.settings.search_path",
            ),
            (
                json!({"settings": {"search_path": "a,"}}),
                "attributes.settings.search_path",
            ),
            // From 16 on a membership alone does not let an account become the role.
            (
                json!({"settings": {"role": "reader"}}),
                "attributes.settings.role",
            ),
            (
                json!({"settings": {"role": "postgres"}}),
                "attributes.settings.role",
            ),
            (
                json!({"accountPassword": "plain"}),
                "attributes.accountPassword",
            ),
            (
                json!({"accountPassword": true}),
                "attributes.accountPassword",
            ),
            (json!({"createdb": "yes"}), "attributes.createdb"),
            (json!({"superuser": true}), "attributes.superuser"),
            (
                json!({"usernameTemplate": "tenant"}),
                "attributes.usernameTemplate",
            ),
            (
                json!({"usernameTemplate": "{{role}}{{role}}"}),
                "attributes.usernameTemplate",
            ),
            (
                json!({"usernameTemplate": "{{name}}.{{role}}"}),
                "attributes.usernameTemplate",
            ),
            (
                json!({"usernameTemplate": "{{role}}\n"}),
                "attributes.usernameTemplate",
            ),
            (
                json!({"grantPermissions": {"what": "SELECT", "where": "t", "setRole": true}}),
                "attributes.grantPermissions.setRole",
            ),
        ] {
            let problems = dynamic(more.clone()).unwrap_err();
            let named: Vec<_> = problems.keys().collect();
            assert_eq!(named, [field], "{more}");
        }
        let many: serde_json::Map<String, Value> =
            (0..33).map(|n| (format!("x.s{n}"), json!(n))).collect();
        let problems = dynamic(json!({"settings": many})).unwrap_err();
        assert!(
            problems["attributes.settings"][0].contains("32"),
            "{problems:?}"
        );
    }
}
