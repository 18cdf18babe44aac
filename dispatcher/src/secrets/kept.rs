//! Applies an update to a secret, and decides whether the stored password may stay. It may not stay if it would be
//! sent to another server or over another kind of connection. Otherwise a caller who may change an address could
//! learn the password.

use mayfly_protocol::target::Target;

use super::{Content, Patch, Spec, fields, parse};
use crate::error::Problems;

/// The content after an update, and its parsed form.
///
/// # Errors
/// All problems, by field. `data.password` is among them if the password would stay and may not.
pub(crate) fn revise(
    patch: Patch,
    old: Content,
    max_ttl_seconds: u64,
) -> Result<(Content, Spec), Problems> {
    let gives_password = patch.gives_data("password");
    // If the old content does not pass the present check, it counts as unknown.
    let before = parse(&old, u64::MAX);
    let content = patch.apply(old);
    let spec = parse(&content, max_ttl_seconds)?;
    if let Spec::Base(after) = &spec
        && !gives_password
    {
        let changed = match &before {
            Ok(Spec::Base(before)) => changed(before, after),
            Ok(Spec::Static | Spec::Dynamic(_)) | Err(_) => vec!["the secret"],
        };
        if !changed.is_empty() {
            let mut problems = Problems::new();
            fields::add(
                &mut problems,
                "data.password",
                format!(
                    "is needed with a change of {}: the stored password would go to another server, or over another kind of connection",
                    changed.join(", ")
                ),
            );
            return Err(problems);
        }
    }
    Ok((content, spec))
}

/// The changed members of `data` that decide where and how the password is sent.
fn changed(before: &Target, after: &Target) -> Vec<&'static str> {
    [
        ("host", before.host != after.host),
        ("port", before.port != after.port),
        ("username", before.username != after.username),
        ("sslmode", before.sslmode != after.sslmode),
        ("auth", before.auth != after.auth),
        (
            "channelBinding",
            before.channel_binding != after.channel_binding,
        ),
        ("sslrootcert", before.sslrootcert != after.sslrootcert),
    ]
    .into_iter()
    .filter_map(|(name, is_changed)| is_changed.then_some(name))
    .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const DAY: u64 = 86_400;

    fn object(value: Value) -> super::super::Object {
        value.as_object().unwrap().clone()
    }

    fn updated(body: Value) -> Result<Spec, Problems> {
        let old = Content {
            attributes: object(json!({"type": "postgresql"})),
            description: None,
            data: object(json!({"host": "db1,db2", "port": 5432, "username": "admin",
                "password": "hunter2", "sslmode": "verify-full",
                "sslrootcert": "-----BEGIN CERTIFICATE-----"})),
        };
        let patch = Patch::parse(object(body), &"a".parse().unwrap(), true).unwrap();
        revise(patch, old, DAY).map(|(_, spec)| spec)
    }

    #[test]
    fn a_kept_password_goes_where_it_went() {
        for (change, field) in [
            (json!({"host": "evil.example"}), "host"),
            (json!({"host": "db2,db1"}), "host"),
            (json!({"host": ["db1", "db2", "evil.example"]}), "host"),
            (json!({"port": 5433}), "port"),
            (json!({"username": "other"}), "username"),
            (json!({"sslmode": "disable"}), "sslmode"),
            (json!({"sslmode": null}), "sslmode"),
            (json!({"auth": "password"}), "auth"),
            (json!({"channelBinding": "disable"}), "channelBinding"),
            (json!({"sslrootcert": null}), "sslrootcert"),
            (json!({"sslrootcert": "-----BEGIN other"}), "sslrootcert"),
        ] {
            let problems = updated(json!({"data": change})).unwrap_err();
            let said = &problems["data.password"][0];
            assert!(problems.len() == 1 && said.contains(field), "{problems:?}");
            // Null is not a password, and the stored password does not replace it.
            let mut without = change.clone();
            without["password"] = Value::Null;
            let problems = updated(json!({"data": without})).unwrap_err();
            assert_eq!(problems["data.password"], ["is needed"]);
            let mut with = change.clone();
            with["password"] = json!("hunter2");
            assert!(updated(json!({"data": with})).is_ok(), "{change}");
        }
        let problems = updated(json!({"data": {"port": 1, "sslmode": "disable"}})).unwrap_err();
        assert!(problems["data.password"][0].contains("port, sslmode"));
    }

    #[test]
    fn other_changes_keep_it() {
        for change in [
            json!({}),
            json!({"database": "other"}),
            json!({"host": ["db1", "db2"], "port": 5432}),
            json!({"auth": "scram", "channelBinding": null}),
            json!({"password": "new"}),
        ] {
            assert!(updated(json!({"data": change})).is_ok(), "{change}");
        }
        assert!(updated(json!({"description": "x"})).is_ok());
        let problems = updated(
            json!({"overwrite": true, "attributes": {"type": "postgresql"},
            "data": {"host": "evil.example", "port": 1, "username": "admin"}}),
        );
        assert_eq!(problems.unwrap_err()["data.password"], ["is needed"]);
    }
}
