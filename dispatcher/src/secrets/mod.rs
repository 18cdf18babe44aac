//! What a secret is: static, base or dynamic, parsed from the JSON of its owner. All errors are collected, field by
//! field. The store resolves the names in it (linked secret, pool).

mod account;
mod body;
mod fields;
mod kept;

use std::ops::RangeInclusive;

use mayfly_protocol::account::Account;
use mayfly_protocol::authorities::Authorities;
use mayfly_protocol::grant::{Grant, OwnedObjects};
use mayfly_protocol::names::{PoolName, RoleName, SecretPath, UserPrefix};
use mayfly_protocol::pg_login::{Auth, ChannelBinding};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::{self, SslMode, Target};
use mayfly_protocol::task::GrantsOf;
use serde_json::Value;

pub(crate) use account::UsernameTemplate;
pub(crate) use body::{Body, Patch, parse_object};
use fields::Fields;
pub(crate) use kept::revise;

use crate::error::Problems;

pub(crate) type Object = serde_json::Map<String, Value>;

/// Grants of one secret.
const MAX_GRANTS: usize = 64;
const SCRAM_ITERATIONS: RangeInclusive<u64> = 1..=100_000;
/// Allowed values of `waitForReplicas`, in seconds. A create has 10 s in all.
const WAIT_FOR_REPLICAS: RangeInclusive<u64> = 1..=8;
/// Default for the concurrent sessions of an account.
const DEFAULT_CONNECTION_LIMIT: u32 = 20;
/// The word in a secret for no limit on sessions.
const UNLIMITED: &str = "unlimited";
const DEFAULT_SCRAM_ITERATIONS: u32 = 4096;
/// Default for the longest life with renewals: 24 h, or the ttl if that is longer.
const DEFAULT_MAX_TTL_SECONDS: u64 = 86_400;
const QUOTA: RangeInclusive<u64> = 1..=1_000_000_000;

/// The kinds of secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Static,
    Base,
    /// Reading it makes an account.
    Dynamic,
}

impl Kind {
    /// The word in the store and in messages.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Base => "base",
            Self::Dynamic => "dynamic",
        }
    }

    /// The kind with this word.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        [Self::Static, Self::Base, Self::Dynamic]
            .into_iter()
            .find(|kind| kind.as_str() == word)
    }
}

/// The content of a secret, as its owner writes it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Content {
    pub(crate) attributes: Object,
    pub(crate) description: Option<String>,
    pub(crate) data: Object,
}

/// The parsed content of a secret.
#[derive(Debug)]
pub(crate) enum Spec {
    Static,
    Base(Box<Target>),
    /// A dynamic secret, which makes accounts.
    Dynamic(Box<Dynamic>),
}

impl Spec {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Static => Kind::Static,
            Self::Base(_) => Kind::Base,
            Self::Dynamic(_) => Kind::Dynamic,
        }
    }
}

/// The options of a dynamic secret for its accounts.
#[derive(Debug, Clone)]
pub(crate) struct Dynamic {
    pub(crate) linked: SecretPath,
    pub(crate) pool: PoolName,
    /// What they may do.
    pub(crate) grants: Vec<Grant>,
    /// Life of the leases, in seconds.
    pub(crate) ttl_seconds: u64,
    /// Longest life of the leases with renewals, in seconds.
    pub(crate) max_ttl_seconds: u64,
    /// A caller's second read gets the same lease, if enough of its TTL is left.
    pub(crate) share: bool,
    /// Maximum number of leases at a time.
    pub(crate) max_leases: Option<u64>,
    /// Maximum number of leases of one caller at a time.
    pub(crate) max_leases_per_caller: Option<u64>,
    /// The prefix of the accounts' role names.
    pub(crate) user_prefix: UserPrefix,
    /// The database, if it is not that of the base secret.
    pub(crate) database: Option<String>,
    /// `CONNECTION LIMIT` of the accounts. `None`: no limit.
    pub(crate) connection_limit: Option<u32>,
    /// Rounds of the verifier.
    pub(crate) scram_iterations: u32,
    /// What happens to objects that the accounts own.
    pub(crate) owned_objects: OwnedObjects,
    /// Maximum wait until the replicas have the account, in seconds.
    pub(crate) wait_for_replicas: Option<u32>,
    /// Settings of their sessions, and attributes.
    pub(crate) account: Account,
    /// The form of the user name in the answer.
    pub(crate) username_template: UsernameTemplate,
}

impl Dynamic {
    /// The grants of its accounts, in its own database or else in the base secret's.
    pub(crate) fn grants_at(&self, base_database: &str) -> GrantsOf {
        GrantsOf {
            database: self
                .database
                .clone()
                .unwrap_or_else(|| base_database.to_owned()),
            grants: self.grants.clone(),
        }
    }
}

/// Parses and checks a content. No `ttl` may be more than `max_ttl_seconds`.
///
/// # Errors
/// All problems, by field.
pub(crate) fn parse(content: &Content, max_ttl_seconds: u64) -> Result<Spec, Problems> {
    let mut problems = Problems::new();
    let attributes = &content.attributes;
    let spec =
        if attributes.contains_key("linkConfig") || attributes.contains_key("grantPermissions") {
            dynamic(content, max_ttl_seconds, &mut problems).map(|it| Spec::Dynamic(Box::new(it)))
        } else if attributes
            .get("type")
            .and_then(Value::as_str)
            .is_some_and(is_base_type)
        {
            base(content, &mut problems).map(|it| Spec::Base(Box::new(it)))
        } else {
            Some(Spec::Static)
        };
    match spec {
        Some(spec) if problems.is_empty() => Ok(spec),
        _ => Err(problems),
    }
}

fn is_base_type(word: &str) -> bool {
    matches!(word, "postgresql" | "postgres")
}

fn base(content: &Content, problems: &mut Problems) -> Option<Target> {
    Fields::new(&content.attributes, "attributes", problems).known(&["type"]);
    let mut data = Fields::new(&content.data, "data", problems);
    data.known(&[
        "host",
        "port",
        "username",
        "password",
        "database",
        "sslmode",
        "auth",
        "channelBinding",
        "sslrootcert",
        "sslcert",
        "sslkey",
    ]);
    let host = data.needed_host("host");
    let port = data.needed_integer("port", 1..=65_535);
    let username = data.needed_text("username");
    let password = data.needed_text("password");
    let database = data
        .database("database")
        .unwrap_or_else(|| "postgres".to_owned());
    let sslmode: Option<SslMode> =
        data.word("sslmode", "must be disable, prefer, require or verify-full");
    let auth: Option<Auth> = data.word("auth", "must be scram, md5 or password");
    let channel_binding: Option<ChannelBinding> =
        data.word("channelBinding", "must be require, prefer or disable");
    if auth > Some(Auth::Scram) && channel_binding == Some(ChannelBinding::Require) {
        data.problem(
            "channelBinding",
            "cannot be `require` with this `auth`: only scram supports channel binding",
        );
    }
    if sslmode == Some(SslMode::Disable) && channel_binding == Some(ChannelBinding::Require) {
        data.problem("channelBinding", "cannot be require without TLS");
    }
    let [sslrootcert, sslcert, sslkey] = ["sslrootcert", "sslcert", "sslkey"].map(|name| {
        let text = data.text(name)?;
        if !text.contains("-----BEGIN") {
            data.problem(name, "is PEM text, with -----BEGIN … and -----END … lines");
        }
        Some(text)
    });
    match (&sslcert, &sslkey) {
        (Some(_), None) => data.problem("sslkey", "is needed with sslcert"),
        (None, Some(_)) => data.problem("sslcert", "is needed with sslkey"),
        (Some(_), Some(_)) | (None, None) => {}
    }
    let port = port.and_then(|port| u16::try_from(port).ok());
    // If the port is wrong, the host is still checked.
    let endpoints = match target::endpoints(host.as_ref()?, port.unwrap_or(1)) {
        Ok(endpoints) => endpoints,
        Err(reason) => {
            data.problem("host", reason);
            return None;
        }
    };
    Some(Target {
        sslmode: sslmode.unwrap_or_else(|| SslMode::default_for(&endpoints)),
        host: host?,
        port: port?,
        database,
        username: username?,
        password: Secret::new(password?),
        auth: auth.unwrap_or_default(),
        channel_binding,
        sslrootcert: sslrootcert.map(Authorities::Pem),
        sslcert,
        sslkey: sslkey.map(Secret::new),
    })
}

fn dynamic(content: &Content, cap: u64, problems: &mut Problems) -> Option<Dynamic> {
    if !content.data.is_empty() {
        fields::add(
            problems,
            "data",
            "must be empty in a dynamic secret: each read makes its own credentials",
        );
    }
    let grants = grants(content.attributes.get("grantPermissions"), problems);
    let linked = link(content.attributes.get("linkConfig"), problems);
    let mut attributes = Fields::new(&content.attributes, "attributes", problems);
    let known = [
        "grantPermissions",
        "linkConfig",
        "pool",
        "ttl",
        "maxTtl",
        "userPrefix",
        "database",
        "connectionLimit",
        "scramIterations",
        "ownedObjects",
        "share",
        "maxLeases",
        "maxLeasesPerCaller",
        "waitForReplicas",
    ];
    attributes.known(&[known.as_slice(), &account::KEYS].concat());
    let pool = attributes
        .needed_text("pool")
        .and_then(|text| attributes.parsed("pool", &text));
    let ttl = attributes.needed_integer("ttl", 1..=cap);
    let max_ttl = attributes.integer("maxTtl", ttl.unwrap_or(1)..=cap);
    let share = attributes.boolean("share").unwrap_or(false);
    let max_leases = attributes.integer("maxLeases", QUOTA);
    let max_leases_per_caller = attributes.integer("maxLeasesPerCaller", QUOTA);
    let user_prefix = match attributes.text("userPrefix") {
        Some(text) => attributes.parsed("userPrefix", &text),
        None => Some(UserPrefix::default()),
    };
    let database = attributes.database("database");
    let connection_limit = connection_limit(&mut attributes);
    let scram_iterations = attributes.integer("scramIterations", SCRAM_ITERATIONS);
    let wait_for_replicas = attributes.integer("waitForReplicas", WAIT_FOR_REPLICAS);
    let account = account::account(&mut attributes, grants.as_deref());
    let username_template = account::username_template(&mut attributes);
    let owned_objects = owned_objects(content.attributes.get("ownedObjects"), problems);
    Some(Dynamic {
        linked: linked?,
        pool: pool?,
        grants: grants?,
        ttl_seconds: ttl?,
        max_ttl_seconds: max_ttl.unwrap_or(ttl?.max(DEFAULT_MAX_TTL_SECONDS).min(cap)),
        share,
        max_leases,
        max_leases_per_caller,
        user_prefix: user_prefix?,
        database,
        connection_limit,
        scram_iterations: scram_iterations
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(DEFAULT_SCRAM_ITERATIONS),
        owned_objects: owned_objects?,
        wait_for_replicas: wait_for_replicas.and_then(|n| u32::try_from(n).ok()),
        account,
        username_template: username_template?,
    })
}

/// Reads the limit on concurrent sessions of an account. A secret must state `unlimited` for no limit: such an
/// account can take every connection slot of its server.
fn connection_limit(attributes: &mut Fields<'_>) -> Option<u32> {
    let name = "connectionLimit";
    if attributes.is(name, UNLIMITED) {
        return None;
    }
    if !attributes.has(name) {
        return Some(DEFAULT_CONNECTION_LIMIT);
    }
    let range = 1..=i32::MAX as u64;
    let limit = attributes.integer_or(name, range, UNLIMITED);
    limit.and_then(|limit| u32::try_from(limit).ok())
}

fn link(value: Option<&Value>, problems: &mut Problems) -> Option<SecretPath> {
    let here = "attributes.linkConfig";
    let Some(value) = value else {
        fields::add(problems, here, "is needed");
        return None;
    };
    let Some(object) = value.as_object() else {
        fields::add(
            problems,
            here,
            "must be {\"linkType\": \"dynamic\", \"linkedSecret\": PATH}",
        );
        return None;
    };
    let mut link = Fields::new(object, here, problems);
    link.known(&["linkType", "linkedSecret"]);
    if let Some(word) = link.needed_text("linkType")
        && word != "dynamic"
    {
        link.problem("linkType", "is `dynamic`");
    }
    link.needed_text("linkedSecret")
        .and_then(|text| link.parsed("linkedSecret", &text))
}

fn grants(value: Option<&Value>, problems: &mut Problems) -> Option<Vec<Grant>> {
    let here = "attributes.grantPermissions";
    match value {
        None => {
            fields::add(problems, here, "is needed");
            None
        }
        Some(Value::Array(list)) if list.is_empty() || list.len() > MAX_GRANTS => {
            fields::add(
                problems,
                here,
                format!("must be one grant or a list of 1 to {MAX_GRANTS}"),
            );
            None
        }
        Some(Value::Array(list)) => {
            let parsed: Vec<_> = list
                .iter()
                .enumerate()
                .map(|(n, one)| grant(one, &format!("{here}.{n}"), problems))
                .collect();
            parsed.into_iter().collect()
        }
        Some(one) => grant(one, here, problems).map(|grant| vec![grant]),
    }
}

fn grant(value: &Value, here: &str, problems: &mut Problems) -> Option<Grant> {
    let Some(object) = value.as_object() else {
        fields::add(problems, here, "must be {\"what\": …, \"where\": …}");
        return None;
    };
    let mut fields = Fields::new(object, here, problems);
    fields.known(&["what", "where", "setRole"]);
    let (what, on) = (fields.needed_text("what"), fields.needed_text("where"));
    match Grant::parse(&what?, &on?) {
        Ok(grant) => account::with_set_role(&mut fields, grant),
        Err(error) => {
            fields.problem(error.field, error.reason);
            None
        }
    }
}

fn owned_objects(value: Option<&Value>, problems: &mut Problems) -> Option<OwnedObjects> {
    let here = "attributes.ownedObjects";
    let Some(value) = value else {
        return Some(OwnedObjects::default());
    };
    let parsed = match serde_json::from_value(value.clone()) {
        Ok(OwnedObjects::ReassignTo(role)) => match role.parse::<RoleName>() {
            Ok(_) => Some(OwnedObjects::ReassignTo(role)),
            Err(error) => {
                fields::add(problems, format!("{here}.reassignTo"), error.to_string());
                return None;
            }
        },
        Ok(other) => Some(other),
        Err(_) => None,
    };
    if parsed.is_none() {
        fields::add(
            problems,
            here,
            "must be \"reassign\", \"drop\" or {\"reassignTo\": ROLE}",
        );
    }
    parsed
}

/// Members of a base secret that leave the dispatcher only sealed.
const NEVER_SHOWN: [&str; 2] = ["password", "sslkey"];

/// The data of a base secret without the admin's password and key. Nobody needs to read these back, and they leave
/// the dispatcher only sealed to a pool.
pub(crate) fn shown_base(mut data: Object) -> Object {
    for name in NEVER_SHOWN {
        data.remove(name);
    }
    data
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
