//! RabbitMQ's management API, for `mayfly init --broker`. It sets a policy that prevents other policies from
//! applying to Mayfly's queues, and checks that no queue has settings of another policy.

use std::io::Read;
use std::time::Duration;

use reqwest::{Method, Url};
use serde_json::{Value, json};

use crate::client::{Plain, plain_url};
use crate::failure::Failure;
use crate::tls::Tls;

/// Name of the policy.
pub(crate) const POLICY: &str = "mayfly";
/// The pattern of the policy.
const PATTERN: &str = r"^mayfly\.";
/// Priority of the policy, unless another policy has the same or a higher one. RabbitMQ applies only one of the
/// policies that match a queue: the one with the highest priority.
const PRIORITY: i64 = 1000;
/// A policy needs at least one setting. This limit, in messages, is never reached, and every type of queue has it.
const MAX_LENGTH: i64 = 1_000_000_000;
/// Settings that change how Mayfly's queues and exchanges work. RabbitMQ's other settings do not.
const OVERRIDING: [&str; 8] = [
    "alternate-exchange",
    "dead-letter-exchange",
    "dead-letter-routing-key",
    "delivery-limit",
    "expires",
    "max-length",
    "max-length-bytes",
    "message-ttl",
];
/// Number of times that the queues are read. A broker applies a new policy to one queue after another.
const LOOKS: u32 = 20;
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Largest file with a URL, in bytes.
const URL_BYTES: u64 = 16 * 1024;

/// A virtual host, through the management API.
pub(crate) struct Management {
    api: Plain,
    vhost: String,
}

/// A queue or exchange that another policy changes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overridden {
    pub(crate) name: String,
    /// The settings, with their values.
    pub(crate) settings: Vec<String>,
    /// The operator policy, if there is one. RabbitMQ applies one of these in addition to a policy.
    pub(crate) operator_policy: Option<String>,
}

/// The URL itself, or the content of `@FILE` or of standard input (`-`).
fn read_url(given: &str) -> Result<Url, Failure> {
    let mut text = String::new();
    let unreadable =
        |error: std::io::Error| Failure::Local(format!("--broker: cannot read {given}: {error}"));
    let url = match (given, given.strip_prefix('@')) {
        ("-", _) => {
            let stdin = std::io::stdin().lock();
            stdin
                .take(URL_BYTES)
                .read_to_string(&mut text)
                .map_err(unreadable)?;
            plain_url(text.trim())?
        }
        (_, Some(file)) => {
            let file = std::fs::File::open(file).map_err(unreadable)?;
            file.take(URL_BYTES)
                .read_to_string(&mut text)
                .map_err(unreadable)?;
            plain_url(text.trim())?
        }
        (url, None) => {
            let url = plain_url(url)?;
            if url.password().is_some() {
                return Err(Failure::Usage(
                    "--broker: other users of this machine see a password on the command line; write the URL to a file and give @FILE, or `-` for standard input".into(),
                ));
            }
            url
        }
    };
    Ok(url)
}

impl Management {
    /// Takes the URL, `@FILE` or `-` of `--broker`. It sends nothing yet.
    pub(crate) fn new(given: &str, tls: &Tls) -> Result<Self, Failure> {
        let url = read_url(given)?;
        let path = url.path().trim_matches('/');
        let vhost = percent_encoding::percent_decode_str(path)
            .decode_utf8()
            .map_err(|_| Failure::Usage("--broker: the virtual host is not UTF-8".into()))?;
        let vhost = match &*vhost {
            "" => "/".to_owned(),
            vhost => vhost.to_owned(),
        };
        Ok(Self {
            api: Plain::new(&url, tls)?,
            vhost,
        })
    }

    pub(crate) fn vhost(&self) -> &str {
        &self.vhost
    }

    /// Sets the policy, and returns its priority.
    pub(crate) async fn set_policy(&self) -> Result<i64, Failure> {
        let all = self.get("policies", &[]).await?;
        let priority = priority_above(&all);
        let policy = json!({
            "pattern": PATTERN,
            "definition": {"max-length": MAX_LENGTH},
            "priority": priority,
            "apply-to": "all",
        });
        let path = ["api", "policies", &self.vhost, POLICY];
        self.api
            .call(Method::PUT, &path, &[], Some(&policy))
            .await?;
        Ok(priority)
    }

    /// Finds what is overridden, after the policy had time to apply.
    pub(crate) async fn overridden(&self) -> Result<Vec<Overridden>, Failure> {
        let mut looks = 0;
        loop {
            let found = self.look().await?;
            looks += 1;
            if found.is_empty() || looks == LOOKS {
                return Ok(found);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self) -> Result<Vec<Overridden>, Failure> {
        let columns = [(
            "columns",
            "name,effective_policy_definition,operator_policy",
        )];
        let queues = self.get("queues", &columns).await?;
        let mut found = overridden_of(&queues, |queue| {
            queue["effective_policy_definition"].clone()
        });
        let policies = self.get("policies", &[]).await?;
        let exchanges = self.get("exchanges", &[("columns", "name,policy")]).await?;
        found.extend(overridden_of(&exchanges, |exchange| {
            definition_of(&policies, &exchange["policy"])
        }));
        Ok(found)
    }

    async fn get(&self, what: &str, query: &[(&str, &str)]) -> Result<Value, Failure> {
        let path = ["api", what, &self.vhost];
        self.api.call(Method::GET, &path, query, None).await
    }
}

fn list(answer: &Value) -> impl Iterator<Item = &Value> {
    answer.as_array().into_iter().flatten()
}

/// A priority that is higher than that of every other policy.
fn priority_above(policies: &Value) -> i64 {
    let others = list(policies).filter(|policy| policy["name"] != POLICY);
    let highest = others
        .filter_map(|policy| policy["priority"].as_i64())
        .max();
    highest.map_or(PRIORITY, |highest| PRIORITY.max(highest.saturating_add(1)))
}

fn definition_of(policies: &Value, name: &Value) -> Value {
    let policy = list(policies).find(|policy| policy["name"] == *name);
    policy.map_or(Value::Null, |policy| policy["definition"].clone())
}

fn overridden_of(all: &Value, definition: impl Fn(&Value) -> Value) -> Vec<Overridden> {
    let is_ours = |name: &str| name.starts_with("mayfly.");
    list(all)
        .filter_map(|one| {
            let name = one["name"].as_str().filter(|name| is_ours(name))?;
            let definition = definition(one);
            let settings: Vec<String> = OVERRIDING
                .into_iter()
                .filter_map(|key| Some((key, definition.get(key)?)))
                .filter(|(key, value)| *key != "max-length" || value.as_i64() != Some(MAX_LENGTH))
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            let operator_policy = one["operator_policy"].as_str().map(str::to_owned);
            (!settings.is_empty()).then(|| Overridden {
                name: name.to_owned(),
                settings,
                operator_policy: operator_policy.filter(|name| !name.is_empty()),
            })
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_priority_is_above_all_others() {
        for (others, expected) in [
            (json!([]), 1000),
            (json!([{"name": "all", "priority": 5}]), 1000),
            (json!([{"name": "all", "priority": 1000}]), 1001),
            (json!([{"name": "mayfly", "priority": 7000}]), 1000),
        ] {
            assert_eq!(priority_above(&others), expected, "{others}");
        }
    }

    #[test]
    fn only_what_changes_our_queues_is_told() {
        let queues = json!([
            {"name": "mayfly.v1.outcomes", "effective_policy_definition": {"max-length": MAX_LENGTH}},
            {"name": "mayfly.v1.unroutable", "effective_policy_definition": {"ha-mode": "all"}},
            {"name": "others", "effective_policy_definition": {"expires": 1}},
            {"name": "mayfly.v1.delay.L03", "operator_policy": "limits",
             "effective_policy_definition": {"expires": 1000, "max-length": 5}},
        ]);
        let found = overridden_of(&queues, |queue| {
            queue["effective_policy_definition"].clone()
        });
        assert_eq!(
            found,
            [Overridden {
                name: "mayfly.v1.delay.L03".to_owned(),
                settings: vec!["expires=1000".to_owned(), "max-length=5".to_owned()],
                operator_policy: Some("limits".to_owned()),
            }]
        );
    }

    #[test]
    fn a_password_is_not_for_the_command_line() {
        let refused = Management::new("http://u:hunter2@h:15672/mayfly", &Tls::default())
            .err()
            .unwrap();
        assert_eq!(refused.exit_code(), 2);
        assert!(!refused.to_string().contains("hunter2"));
        let file = tempfile::NamedTempFile::new().unwrap();
        for (url, vhost) in [
            ("http://u:p@127.0.0.1:15672/mayfly", "mayfly"),
            ("https://u:p@h:15671/%2f\n", "/"),
            ("http://u:p@localhost:15672", "/"),
        ] {
            std::fs::write(file.path(), url).unwrap();
            let given = format!("@{}", file.path().display());
            let management = Management::new(&given, &Tls::default()).unwrap();
            assert_eq!(management.vhost(), vhost, "{url}");
        }
        // The password is not sent in clear over a network either.
        std::fs::write(file.path(), "http://u:hunter2@h:15672/mayfly").unwrap();
        let given = format!("@{}", file.path().display());
        let refused = Management::new(&given, &Tls::default()).err().unwrap();
        let said = refused.to_string();
        assert!(
            said.contains("--allow-plaintext") && !said.contains("hunter2"),
            "{said}"
        );
    }
}
