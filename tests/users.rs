//! Users of RabbitMQ with the rights of `deploy/rabbitmq/definitions.json`, for a virtual host and its
//! pools: what the system under test logs in as.

use std::path::Path;

use serde_json::Value;

use crate::word;

/// The holder of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Dispatcher,
    /// The engines of a pool.
    Engine(String),
    Monitoring,
}

impl Part {
    fn shipped(&self) -> &'static str {
        match self {
            Self::Dispatcher => "mayfly-dispatcher",
            Self::Engine(_) => "mayfly-engine-pool1",
            Self::Monitoring => "mayfly-monitoring",
        }
    }
}

/// A user of a virtual host.
#[derive(Debug, Clone)]
pub struct User {
    pub part: Part,
    pub(crate) name: String,
    password: String,
    vhost: String,
}

/// The shipped definitions.
pub(crate) fn definitions() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rabbitmq/definitions.json");
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

/// A text as an Erlang binary.
fn erlang(text: &str) -> String {
    format!("<<\"{}\">>", text.replace('\\', "\\\\"))
}

impl User {
    /// A user that is still to be made.
    pub fn new(part: Part, vhost: &str) -> Self {
        Self {
            part,
            name: format!("user-{}", word()),
            password: word() + &word(),
            vhost: vhost.to_owned(),
        }
    }

    /// The Erlang that makes it, with the shipped rights.
    pub fn making(&self) -> String {
        let all = definitions();
        let of_part = |key: &str| {
            let list = all[key].as_array().unwrap().clone();
            list.into_iter()
                .filter(|entry| entry["user"] == self.part.shipped())
                .collect::<Vec<_>>()
        };
        let text = |entry: &Value, key: &str| {
            let text = entry[key].as_str().unwrap();
            erlang(&match &self.part {
                Part::Engine(pool) => text.replace("pool1", pool),
                _ => text.to_owned(),
            })
        };
        let (name, vhost) = (erlang(&self.name), erlang(&self.vhost));
        let mut made = format!(
            r#"rabbit_auth_backend_internal:add_user({name}, {}, <<"test">>)"#,
            erlang(&self.password)
        );
        for entry in of_part("permissions") {
            let [configure, write, read] =
                ["configure", "write", "read"].map(|key| text(&entry, key));
            made += &format!(
                r#", rabbit_auth_backend_internal:set_permissions({name}, {vhost}, {configure}, {write}, {read}, <<"test">>)"#
            );
        }
        for entry in of_part("topic_permissions") {
            let [exchange, write, read] =
                ["exchange", "write", "read"].map(|key| text(&entry, key));
            made += &format!(
                r#", rabbit_auth_backend_internal:set_topic_permissions({name}, {vhost}, {exchange}, {write}, {read}, <<"test">>)"#
            );
        }
        made
    }

    /// Takes another password. The broker does not know it yet.
    pub fn forget_password(&mut self) {
        self.password = word() + &word();
    }

    /// The Erlang code that gives the broker another password for the user.
    pub fn changing(&self) -> String {
        format!(
            r#"rabbit_auth_backend_internal:change_password({}, {}, <<"test">>)"#,
            erlang(&self.name),
            erlang(&self.password)
        )
    }

    /// The Erlang that ends it.
    pub fn ending(&self) -> String {
        format!(
            r#"rabbit_auth_backend_internal:delete_user({}, <<"test">>)"#,
            erlang(&self.name)
        )
    }

    /// An URL with this user in place of its own.
    pub fn in_url(&self, url: &str) -> String {
        let (scheme, rest) = url.split_once("://").unwrap();
        let (_, place) = rest.split_once('@').unwrap();
        format!("{scheme}://{}:{}@{place}", self.name, self.password)
    }
}
