//! What a PostgreSQL server may demand of a login, and the error if it demands more. The check
//! itself is in [`crate::pg_gate`].

use std::fmt;

pub use crate::target::{Auth, ChannelBinding};
use crate::target::{SslMode, Target};

/// Maximum number of PBKDF2 iterations that a server may request. PostgreSQL's default is 4096; a million
/// take about 1 s.
pub(crate) const ROUNDS_MAX: u64 = 1_000_000;

/// How a server accepted a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The server requested no password: `trust`, `cert`, `peer`, `ident` or a similar method.
    None,
    /// The password in clear.
    Password,
    /// MD5 of the password and a salt.
    Md5,
    /// SCRAM-SHA-256, as in RFC 7677.
    Scram,
    /// SCRAM-SHA-256 bound to the TLS connection.
    ScramPlus,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no password was asked for",
            Self::Password => "the password in clear",
            Self::Md5 => "md5",
            Self::Scram => "scram-sha-256",
            Self::ScramPlus => "scram-sha-256 bound to the TLS connection",
        })
    }
}

/// Methods that a login may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Methods {
    /// A login without a challenge.
    pub none: bool,
    /// The password in clear text.
    pub password: bool,
    /// MD5 of the password and a salt.
    pub md5: bool,
    /// SCRAM-SHA-256, with channel binding or without.
    pub scram: bool,
}

impl Methods {
    /// The methods of libpq's `require_auth` (PostgreSQL documentation): names separated by commas.
    ///
    /// # Errors
    /// A name that is not known here.
    pub fn parse(list: &str) -> Result<Self, String> {
        let mut methods = Self {
            none: false,
            password: false,
            md5: false,
            scram: false,
        };
        for name in list.split(',') {
            match name.trim() {
                "none" => methods.none = true,
                "password" => methods.password = true,
                "md5" => methods.md5 = true,
                "scram-sha-256" => methods.scram = true,
                _ => {
                    return Err(
                        "has an unknown require_auth; known: scram-sha-256, md5, password, none"
                            .to_owned(),
                    );
                }
            }
        }
        Ok(methods)
    }
}

impl From<Auth> for Methods {
    fn from(auth: Auth) -> Self {
        Self {
            none: true,
            password: auth >= Auth::Password,
            md5: auth >= Auth::Md5,
            scram: true,
        }
    }
}

/// Where the rule of a login is written, for the message of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrittenIn {
    /// A base secret: `data.auth`, `data.channelBinding`.
    BaseSecret,
    /// The store's URL: `require_auth`, `channel_binding`.
    StoreUrl,
}

impl WrittenIn {
    fn auth(self, word: &str) -> String {
        match self {
            Self::BaseSecret => format!("\"auth\": \"{word}\" in the base secret"),
            Self::StoreUrl => format!("require_auth={word} in the store's URL"),
        }
    }

    fn unbound(self) -> &'static str {
        match self {
            Self::BaseSecret => "\"channelBinding\": \"disable\" in the base secret",
            Self::StoreUrl => "channel_binding=disable in the store's URL",
        }
    }
}

/// What a login may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Methods it may use.
    pub methods: Methods,
    /// Protection of the connection.
    pub sslmode: SslMode,
    /// The channel binding as it is written. If none is written, see [`Rule::binding`].
    pub channel_binding: Option<ChannelBinding>,
    /// The place where an operator can change this rule.
    pub written_in: WrittenIn,
    /// A test login with a wrong password. The server may accept it without proving its identity: the test
    /// finds this out.
    pub is_trial: bool,
}

/// The required channel binding of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bound {
    /// A SCRAM exchange must be bound to the connection.
    pub(crate) scram: bool,
    /// Every login must be bound to the connection, so the server must not accept a login without SCRAM.
    pub(crate) always: bool,
}

impl Rule {
    /// The rule of a base secret.
    pub fn of(target: &Target) -> Self {
        Self {
            methods: target.auth.into(),
            sslmode: target.sslmode,
            channel_binding: target.channel_binding,
            written_in: WrittenIn::BaseSecret,
            is_trial: false,
        }
    }

    /// The channel binding, in libpq's words. If none is written, it is required when TLS does not verify the
    /// server's name: otherwise a server in the middle could pass the login on and keep the connection. It is
    /// not required if a weaker method is allowed, which cannot be bound.
    pub fn binding(&self) -> ChannelBinding {
        let weak = self.methods.md5 || self.methods.password;
        match (self.channel_binding, self.sslmode) {
            (Some(written), _) => written,
            (None, SslMode::Require) if !weak => ChannelBinding::Require,
            (None, _) => ChannelBinding::Prefer,
        }
    }

    pub(crate) fn bound(&self, tls: bool) -> Bound {
        let always = self.binding() == ChannelBinding::Require;
        let weak = self.methods.md5 || self.methods.password;
        Bound {
            always,
            // With `prefer` a server may have no TLS. If it has TLS, the login must be bound to it.
            scram: always
                || (tls
                    && self.channel_binding.is_none()
                    && self.sslmode == SslMode::Prefer
                    && !weak),
        }
    }
}

/// Why a login was aborted before the password was used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What the server did.
    pub cause: Cause,
    pub(crate) written_in: WrittenIn,
}

/// What a server did that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The server asks for a method that is not allowed.
    Method(Method),
    /// The server asks for a method that Mayfly does not have; PostgreSQL's number of the request.
    Unsupported(u32),
    /// The server offers no SCRAM that is bound to the connection.
    Unbound,
    /// The server's certificate is of a kind that has no channel binding (RFC 5929), such as Ed25519.
    Unbindable,
    /// The server accepted the login without a proof of its identity.
    Unproven,
    /// The server asks for this number of SCRAM rounds, more than the limit.
    Rounds(u64),
    /// The server does not speak PostgreSQL's protocol.
    Garbled,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unbound = self.written_in.unbound();
        let verify = "use sslmode verify-full";
        match self.cause {
            Cause::Method(method @ (Method::Password | Method::Md5)) => {
                let (what, word) = match method {
                    Method::Md5 => ("an MD5 hash of the password", "md5"),
                    _ => ("the password in clear", "password"),
                };
                write!(
                    f,
                    "the server asks for {what}, which was not sent: make its line of pg_hba.conf scram-sha-256 (and set the password again, so that it is stored as SCRAM), or allow it with {}",
                    self.written_in.auth(word)
                )
            }
            Cause::Method(Method::None) => f.write_str(
                "the server asks for no password, which require_auth in the store's URL does not allow",
            ),
            Cause::Method(Method::Scram | Method::ScramPlus) => f.write_str(
                "the server asks for scram-sha-256, which require_auth in the store's URL does not allow",
            ),
            Cause::Unsupported(number) => write!(
                f,
                "the server asks for an authentication method that Mayfly does not have (request {number}); make its line of pg_hba.conf scram-sha-256"
            ),
            Cause::Unbound => write!(
                f,
                "the server's certificate is not verified by name, and its SCRAM cannot be bound to the TLS connection (channel binding): a server in the middle could use the login, so it was aborted; {verify}, or {unbound} if you trust the network"
            ),
            Cause::Unbindable => write!(
                f,
                "the server's certificate is not verified by name, and its kind has no channel binding (such as Ed25519), so the login was aborted; {verify}, give the server a certificate signed by RSA or ECDSA, or {unbound} if you trust the network"
            ),
            Cause::Unproven => write!(
                f,
                "the server asked for no password, and its certificate is not verified by name: it may be any server, so the connection was closed; {verify}, make its line of pg_hba.conf scram-sha-256, or {unbound} if you trust the network"
            ),
            Cause::Rounds(rounds) => write!(
                f,
                "the server asks for {rounds} iterations of SCRAM; the maximum is {ROUNDS_MAX}"
            ),
            Cause::Garbled => f.write_str("the server does not speak PostgreSQL's protocol"),
        }
    }
}

impl std::error::Error for Refusal {}

impl Refusal {
    /// The refusal that caused an error, if any. It may be a source of the error, or inside a [`std::io::Error`].
    pub fn in_error<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(refusal) = error.downcast_ref() {
                return Some(refusal);
            }
            if let Some(inner) = error
                .downcast_ref::<std::io::Error>()
                .and_then(std::io::Error::get_ref)
                && let Some(refusal) = inner.downcast_ref()
            {
                return Some(refusal);
            }
            next = error.source();
        }
        None
    }
}
