//! What a check found: a topic that programs decide by, and a message for a person.

use serde::{Deserialize, Serialize};

use crate::account::Attribute;

/// What a finding is about. On the wire, in the API and in the log it is one word or two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Topic {
    /// The engine connects as the admin.
    Connect,
    /// The server refuses the admin with a wrong password.
    AdminPassword,
    /// The authentication method that the admin logs in with.
    Login,
    /// The protection of the connection.
    Tls,
    /// The difference between the engine's clock and the server's.
    Clock,
    /// The admin may make and drop roles.
    CreateRoles,
    /// The admin may end the sessions of accounts.
    EndSessions,
    /// The admin may end the accounts that exist.
    LiveAccounts,
    /// The quarantine role that exists is this installation's.
    QuarantineRole,
    /// The grant role that exists is this installation's.
    GrantRole,
    /// The connections that accounts may take.
    Connections,
    /// The connection limit of the admin.
    AdminConnections,
    /// A transaction pooler between engine and server.
    Pooler,
    /// The engine connects to the database of the accounts.
    Database,
    /// Up to PostgreSQL 15: accounts may create objects as their grant role.
    CreateObjects,
    /// One grant of the secret.
    Grant,
    /// The role that gets what accounts own.
    NewOwner,
    /// The settings of accounts.
    Settings,
    /// An attribute of accounts.
    Attribute(Attribute),
    /// A role that accounts may become.
    SetRole,
    /// The server gets the accounts' passwords in clear.
    ClearPassword,
    /// The server refuses an account with a wrong password.
    AccountPassword,
    /// The trial lease was issued.
    Issue,
    /// The trial lease was revoked, and its account is gone.
    Revoke,
    /// A topic of a newer version: its word.
    Other(String),
}

impl Topic {
    /// All topics that have a word of their own.
    const NAMED: [(Self, &str); 23] = [
        (Self::Connect, "connect"),
        (Self::AdminPassword, "admin password"),
        (Self::Login, "login"),
        (Self::Tls, "tls"),
        (Self::Clock, "clock"),
        (Self::CreateRoles, "create roles"),
        (Self::EndSessions, "end sessions"),
        (Self::LiveAccounts, "live accounts"),
        (Self::QuarantineRole, "quarantine role"),
        (Self::GrantRole, "grant role"),
        (Self::Connections, "connections"),
        (Self::AdminConnections, "admin connections"),
        (Self::Pooler, "pooler"),
        (Self::Database, "database"),
        (Self::CreateObjects, "create objects"),
        (Self::Grant, "grant"),
        (Self::NewOwner, "new owner"),
        (Self::Settings, "settings"),
        (Self::SetRole, "set role"),
        (Self::ClearPassword, "account password in clear"),
        (Self::AccountPassword, "account password"),
        (Self::Issue, "issue"),
        (Self::Revoke, "revoke"),
    ];

    /// The word on the wire, in the API and in the log.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Attribute(attribute) => attribute.key(),
            Self::Other(word) => word,
            named => {
                let mut words = Self::NAMED.iter().filter(|(topic, _)| topic == named);
                words.next().map_or("", |(_, word)| word)
            }
        }
    }

    /// Whether no account can be made while this topic has a bad finding.
    pub fn is_needed_for_accounts(&self) -> bool {
        matches!(self, Self::Connect | Self::CreateRoles)
    }
}

impl From<String> for Topic {
    fn from(word: String) -> Self {
        let named = Self::NAMED.into_iter().find(|(_, known)| *known == word);
        let attribute = || {
            let mut all = Attribute::ALL.into_iter();
            all.find(|attribute| attribute.key() == word)
        };
        match named {
            Some((topic, _)) => topic,
            None => match attribute() {
                Some(attribute) => Self::Attribute(attribute),
                None => Self::Other(word),
            },
        }
    }
}

impl From<Topic> for String {
    fn from(topic: Topic) -> Self {
        topic.as_str().to_owned()
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    #[serde(rename = "check")]
    pub topic: Topic,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found, for a person. No program reads it.
    pub message: String,
    /// SQL statements that correct it, for somebody who may run them.
    #[serde(default)]
    pub fix: Vec<String>,
}

impl Finding {
    /// A finding that is as it should be.
    pub fn good(topic: Topic, message: impl Into<String>) -> Self {
        Self::new(topic, true, message)
    }

    /// A finding that is not as it should be, and that no statement corrects.
    pub fn bad(topic: Topic, message: impl Into<String>) -> Self {
        Self::new(topic, false, message)
    }

    /// A finding without statements that correct it.
    pub fn new(topic: Topic, ok: bool, message: impl Into<String>) -> Self {
        Self {
            topic,
            ok,
            message: message.into(),
            fix: Vec::new(),
        }
    }

    /// The same finding, with statements that correct it.
    pub fn with_fix(self, fix: impl Into<Vec<String>>) -> Self {
        Self {
            fix: fix.into(),
            ..self
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_topic_survives_its_word() {
        let attributes = Attribute::ALL.map(Topic::Attribute);
        let named = Topic::NAMED.map(|(topic, _)| topic);
        let newer = Topic::Other("moon phase".to_owned());
        for topic in named.into_iter().chain(attributes).chain([newer]) {
            let word = String::from(topic.clone());
            assert!(!word.is_empty(), "{topic:?}");
            assert_eq!(Topic::from(word), topic);
        }
    }

    /// Engines and dispatchers of earlier versions have the word as a plain text.
    #[test]
    fn a_finding_travels_as_before() {
        let finding =
            Finding::bad(Topic::LiveAccounts, "no").with_fix(["GRANT a TO b;".to_owned()]);
        let text = r#"{"check":"live accounts","ok":false,"message":"no","fix":["GRANT a TO b;"]}"#;
        assert_eq!(serde_json::to_string(&finding).unwrap(), text);
        assert_eq!(serde_json::from_str::<Finding>(text).unwrap(), finding);
        let newer = r#"{"check":"moon phase","ok":true,"message":"full"}"#;
        let newer: Finding = serde_json::from_str(newer).unwrap();
        assert_eq!(newer.topic.as_str(), "moon phase");
        assert!(!newer.topic.is_needed_for_accounts());
    }
}
