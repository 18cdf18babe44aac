//! Making a role for a lease.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Failure, FailureCode, Kind, ReplyResult, Request};
use crate::account::Account;
use crate::grant::Grant;
use crate::names::{InstallationId, LeaseId, RoleName};
use crate::secret::Secret;
use crate::target::Target;

/// Make a role for a lease. Run twice, the second finds the role by its comment and succeeds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Create {
    /// The lease that the role stands for.
    pub lease: LeaseId,
    /// The installation that owns the lease. The role's comment names it.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
    /// The database the account is for.
    pub database: String,
    /// The role to make.
    pub role: RoleName,
    /// SCRAM-SHA-256 verifier (RFC 5803), if the account has nothing beyond its grants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verifier: Option<String>,
    /// The account's verifier, and what it has besides its grants. An engine without this field looks for the
    /// verifier in its earlier place, does not find it, and refuses the task: it must not make the account without
    /// the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub special: Option<Special>,
    /// Life of the account, in seconds, from the database's clock at the time it is made.
    pub ttl_seconds: u64,
    /// What it may do.
    pub grants: Vec<Grant>,
    /// `CONNECTION LIMIT` of the role. `None`: no limit.
    #[serde(default)]
    pub connection_limit: Option<u32>,
    /// Maximum wait until the server's replicas have the new role, in seconds.
    #[serde(default)]
    pub wait_for_replicas: Option<u32>,
    /// No statement that makes the role begins later than this, by the database's clock. An engine's
    /// clocks stand still while its machine is suspended. `None`: the dispatcher does not know the
    /// database's clock yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
}

/// An account that has more than grants.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Special {
    /// The verifier of the account, as in [`Create::verifier`].
    pub verifier: String,
    /// The password, for a server that makes the verifier itself. In all other cases the dispatcher sends it to the
    /// caller only.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::secret::expose_option"
    )]
    pub password: Option<Secret>,
    /// What it has beyond its grants.
    #[serde(flatten)]
    pub account: Account,
}

impl Create {
    /// The account's password, if the server gets it in clear.
    pub fn clear_password(&self) -> Option<&Secret> {
        self.special.as_ref()?.password.as_ref()
    }

    /// The account's verifier, and its settings besides grants, if it has any.
    ///
    /// # Errors
    /// The task has no verifier.
    pub fn account(&self) -> Result<(&str, Option<&Account>), Failure> {
        match (&self.special, &self.verifier) {
            (Some(special), _) => Ok((&special.verifier, Some(&special.account))),
            (None, Some(verifier)) => Ok((verifier, None)),
            (None, None) => Err(Failure::new(
                FailureCode::NotUnderstood,
                "the task has no verifier",
            )),
        }
    }
}

/// A role was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Created {
    /// The account's `VALID UNTIL`, by the database's clock.
    pub expiration: Timestamp,
    /// Identity of the server it was made on.
    pub server: String,
    /// What the account lacks at present and gets later, as a message for users. An older engine sends none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl Request for Create {
    const KIND: Kind = Kind::Create;
    type Answer = Created;

    fn lease(&self) -> Option<LeaseId> {
        Some(self.lease)
    }

    fn to_reply(answer: Self::Answer) -> ReplyResult {
        ReplyResult::Created(answer)
    }

    fn from_reply(reply: ReplyResult) -> Option<Self::Answer> {
        match reply {
            ReplyResult::Created(answer) => Some(answer),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// An earlier engine has a field for the verifier and none for the rest: it must not make the
    /// account without the rest.
    #[test]
    fn an_older_engine_refuses_a_special_account() {
        #[derive(Deserialize)]
        struct Older {
            #[serde(rename = "verifier")]
            _verifier: String,
        }
        let create = |verifier: Option<String>, special| Create {
            lease: LeaseId::random(),
            installation: InstallationId::random(),
            target: crate::fixtures::target(),
            database: "d".to_owned(),
            role: "r".parse().unwrap(),
            verifier,
            special,
            ttl_seconds: 1,
            grants: vec![],
            connection_limit: None,
            wait_for_replicas: None,
            not_after: None,
        };
        let account = Account {
            attributes: vec![crate::account::Attribute::BypassRls],
            ..Account::default()
        };
        let special = Special {
            verifier: "v".to_owned(),
            password: None,
            account: account.clone(),
        };
        let text = |create: &Create| serde_json::to_string(create).unwrap();
        let (plain, special) = (
            create(Some("v".to_owned()), None),
            create(None, Some(special)),
        );
        assert!(serde_json::from_str::<Older>(&text(&plain)).is_ok());
        assert!(serde_json::from_str::<Older>(&text(&special)).is_err());
        let read: Create = serde_json::from_str(&text(&special)).unwrap();
        assert_eq!(read.account().unwrap(), ("v", Some(&account)));
        let read: Create = serde_json::from_str(&text(&plain)).unwrap();
        assert_eq!(read.account().unwrap(), ("v", None));
        assert!(create(None, None).account().is_err());
    }
}
