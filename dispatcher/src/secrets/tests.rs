//! Tests of the bodies of secrets: what is accepted, and which field an error names.

use serde_json::json;

use super::*;
use crate::error::Code;

const DAY: u64 = 86_400;

fn content(value: Value) -> Content {
    let object = value.as_object().unwrap().clone();
    Body::parse(object, &"a".parse().unwrap(), false)
        .unwrap()
        .into_content()
}

fn problems(value: Value) -> Vec<String> {
    parse(&content(value), DAY)
        .unwrap_err()
        .into_keys()
        .collect()
}

fn dyn1() -> Value {
    json!({"attributes": {"grantPermissions": {"what": "SELECT", "where": "*.*"},
        "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:postgresql:root"},
        "pool": "pool1", "ttl": 1000}, "data": {}})
}

fn root() -> Value {
    json!({"attributes": {"type": "postgresql"}, "description": "postgresql root credentials",
        "data": {"host": "db.example", "password": "P@ssword!", "port": 3306, "username": "admin"}})
}

#[test]
fn the_documented_bodies_are_valid() {
    let Spec::Base(target) = parse(&content(root()), DAY).unwrap() else {
        panic!("a base secret")
    };
    assert_eq!(
        (target.port, target.database.as_str(), target.sslmode),
        (3306, "postgres", SslMode::Require)
    );
    let Spec::Dynamic(dynamic) = parse(&content(dyn1()), DAY).unwrap() else {
        panic!("a dynamic secret")
    };
    assert_eq!(
        (dynamic.ttl_seconds, dynamic.scram_iterations),
        (1000, 4096)
    );
    assert_eq!(dynamic.linked.as_str(), "db:postgresql:root");
    let anything = json!({"attributes": {"type": "mysql", "x": [1]}, "data": {"y": null}});
    assert_eq!(parse(&content(anything), DAY).unwrap().kind(), Kind::Static);
}

#[test]
fn a_base_secret_says_all_that_is_wrong() {
    let bad = json!({"attributes": {"type": "postgres", "port": 1},
        "data": {"host": "a,,b", "port": "5432", "password": "", "sslmode": "verify-full", "sslkey": "x", "hots": 1,
                 "auth": "gss", "channelBinding": true}});
    let expected = [
        "attributes.port",
        "data.auth",
        "data.channelBinding",
        "data.host",
        "data.hots",
        "data.password",
        "data.port",
        "data.sslcert",
        "data.sslkey",
        "data.username",
    ];
    assert_eq!(problems(bad), expected);
}

#[test]
fn a_base_secret_says_how_its_password_may_be_used() {
    let with = |more: Value| {
        let mut secret = root();
        for (name, value) in more.as_object().unwrap() {
            secret["data"][name] = value.clone();
        }
        parse(&content(secret), DAY)
    };
    let Ok(Spec::Base(target)) = with(json!({"sslmode": "verify-full"})) else {
        panic!("the machine's authorities are enough")
    };
    assert_eq!((target.auth, target.channel_binding), (Auth::Scram, None));
    let md5 = with(json!({"auth": "md5", "channelBinding": "prefer"}));
    let Ok(Spec::Base(target)) = md5 else {
        panic!("md5 may be asked for")
    };
    assert_eq!(target.auth, Auth::Md5);
    assert_eq!(target.channel_binding, Some(ChannelBinding::Prefer));
    for more in [
        json!({"auth": "password", "channelBinding": "require"}),
        json!({"sslmode": "disable", "channelBinding": "require"}),
    ] {
        let problems = with(more).unwrap_err();
        assert!(problems.contains_key("data.channelBinding"), "{problems:?}");
    }
}

#[test]
fn a_base_secret_may_have_several_hosts() {
    let with = |host: Value| {
        let mut secret = root();
        secret["data"]["host"] = host;
        parse(&content(secret), DAY)
    };
    for (host, text, mode) in [
        (json!("db1,db2:5433"), "db1,db2:5433", SslMode::Require),
        (
            json!(["localhost", "[::1]:5"]),
            "localhost,[::1]:5",
            SslMode::Prefer,
        ),
    ] {
        let Ok(Spec::Base(target)) = with(host) else {
            panic!("{text}: a base secret")
        };
        assert_eq!((target.host.as_str(), target.sslmode), (text, mode));
    }
    for (host, said) in [
        (json!("db1, db2"), "white space"),
        (json!(["db1", 2]), "a list of hosts"),
        (json!(["db1,db2"]), "a list of hosts"),
        (json!([]), "a list of hosts"),
        (json!("db1,db2:x"), "port"),
        (json!("db1:5433"), "`port`"),
    ] {
        let problems = with(host).unwrap_err();
        assert!(problems["data.host"][0].contains(said), "{problems:?}");
    }
}

#[test]
fn a_dynamic_secret_says_all_that_is_wrong() {
    let mut bad = dyn1();
    bad["data"]["x"] = json!(1);
    let attributes = bad["attributes"].as_object_mut().unwrap();
    attributes.insert(
        "grantPermissions".into(),
        json!([{"what": "SELEKT", "where": "*.*"}, {"what": "SELECT"}]),
    );
    attributes.insert(
        "linkConfig".into(),
        json!({"linkType": "static", "linkedSecret": "a::b"}),
    );
    attributes.insert("ttl".into(), json!(DAY + 1));
    attributes.insert("userPrefix".into(), json!("pg_x"));
    attributes.insert("scramIterations".into(), json!(0));
    attributes.insert("waitForReplicas".into(), json!(9));
    attributes.insert("ownedObjects".into(), json!("keep"));
    attributes.insert("tll".into(), json!(1));
    attributes.remove("pool");
    let expected = [
        "attributes.grantPermissions.0.what",
        "attributes.grantPermissions.1.where",
        "attributes.linkConfig.linkType",
        "attributes.linkConfig.linkedSecret",
        "attributes.ownedObjects",
        "attributes.pool",
        "attributes.scramIterations",
        "attributes.tll",
        "attributes.ttl",
        "attributes.userPrefix",
        "attributes.waitForReplicas",
        "data",
    ];
    assert_eq!(problems(bad), expected);
}

#[test]
fn a_longer_life_is_bounded_by_the_ttl_and_the_cap() {
    for (max_ttl, sound) in [(999, false), (1000, true), (DAY, true), (DAY + 1, false)] {
        let mut secret = dyn1();
        secret["attributes"]["maxTtl"] = json!(max_ttl);
        assert_eq!(parse(&content(secret), DAY).is_ok(), sound, "{max_ttl}");
    }
}

#[test]
fn owned_objects_have_three_forms() {
    for (form, sound) in [
        (json!("reassign"), true),
        (json!("drop"), true),
        (json!({"reassignTo": "app_owner"}), true),
        (json!({"reassignTo": ""}), false),
        (json!({"reassignTo": 1}), false),
        (json!(["drop"]), false),
    ] {
        let mut secret = dyn1();
        secret["attributes"]["ownedObjects"] = form.clone();
        assert_eq!(parse(&content(secret), DAY).is_ok(), sound, "{form}");
    }
}

#[test]
fn an_update_merges_or_replaces() {
    let update = |value: Value| {
        let object = value.as_object().unwrap().clone();
        Body::parse(object, &"a".parse().unwrap(), true)
            .unwrap()
            .apply(content(root()))
    };
    let merged = update(json!({"data": {"password": "new", "port": null}}));
    assert_eq!(merged.data["password"], "new");
    assert!(!merged.data.contains_key("port") && merged.data.contains_key("host"));
    assert_eq!(
        merged.description.as_deref(),
        Some("postgresql root credentials")
    );
    assert_eq!(update(json!({"description": null})).description, None);
    let replaced = update(json!({"overwrite": true, "data": {"x": 1}}));
    assert_eq!(
        (
            replaced.attributes.len(),
            replaced.data.len(),
            replaced.description
        ),
        (0, 1, None)
    );
}

#[test]
fn bodies_are_strict() {
    let path: SecretPath = "db:a".parse().unwrap();
    let refused = |value: Value| {
        Body::parse(value.as_object().unwrap().clone(), &path, false)
            .unwrap_err()
            .errors
            .into_keys()
            .collect::<Vec<_>>()
    };
    assert_eq!(
        refused(json!({"path": "db:b", "dat": {}, "data": []})),
        ["dat", "data", "path"]
    );
    assert_eq!(refused(json!({"overwrite": true})), ["overwrite"]);
    assert!(
        Body::parse(
            json!({"path": "db/a"}).as_object().unwrap().clone(),
            &path,
            false
        )
        .is_ok()
    );
    let broken = parse_object(b"{\n  \"a\": }").unwrap_err();
    assert!(
        broken.code == Code::Malformed && broken.message.contains("line 2 column 8"),
        "{broken}"
    );
    assert!(parse_object(b"[]").is_err());
}

#[test]
fn a_shown_base_secret_lacks_its_secrets() {
    let shown = shown_base(content(root()).data);
    assert_eq!(
        shown.keys().collect::<Vec<_>>(),
        ["host", "port", "username"]
    );
}

#[test]
fn an_account_has_twenty_sessions_unless_the_secret_says_otherwise() {
    let limit = |value: Option<serde_json::Value>| {
        let mut attributes = json!({
            "grantPermissions": {"what": "SELECT", "where": "*.*"},
            "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:root"},
            "pool": "pool1", "ttl": 60,
        });
        if let Some(value) = value {
            attributes["connectionLimit"] = value;
        }
        let content = Content {
            attributes: attributes.as_object().unwrap().clone(),
            ..Content::default()
        };
        match parse(&content, 1000) {
            Ok(Spec::Dynamic(dynamic)) => Ok(dynamic.connection_limit),
            Ok(other) => panic!("{other:?}"),
            Err(problems) => Err(problems["attributes.connectionLimit"].join(" ")),
        }
    };
    assert_eq!(limit(None), Ok(Some(20)));
    assert_eq!(limit(Some(json!(null))), Ok(Some(20)));
    assert_eq!(limit(Some(json!(3))), Ok(Some(3)));
    assert_eq!(limit(Some(json!("unlimited"))), Ok(None));
    for wrong in [
        json!(0),
        json!(-1),
        json!("none"),
        json!(1.5),
        json!(u64::MAX),
    ] {
        let reason = limit(Some(wrong)).unwrap_err();
        assert!(reason.contains("\"unlimited\""), "{reason}");
    }
}
