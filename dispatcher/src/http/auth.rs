//! The caller of a request, and what it may do.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use mayfly_protocol::names::SecretPath;
use mayfly_protocol::secret::Secret;

use crate::app::App;
use crate::error::{ApiError, Code};
use crate::store::{Bearer, Token};

/// The caller. A handler with this argument needs a token.
#[derive(Debug, Clone)]
pub(super) enum Caller {
    /// The root token, which may do everything.
    Root,
    Reader(Token),
}

impl Caller {
    /// What is written into `createdBy`.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Root => "root".to_owned(),
            Self::Reader(token) => token.id.clone(),
        }
    }

    /// Fails unless the caller has the root token.
    pub(super) fn root_only(&self) -> Result<(), ApiError> {
        match self {
            Self::Root => Ok(()),
            Self::Reader(_) => Err(forbidden(
                "this token may only read secrets and end its own leases",
            )),
        }
    }

    /// Whether the caller may see secrets at this path.
    pub(super) fn may_read(&self, path: &SecretPath) -> bool {
        match self {
            Self::Root => true,
            Self::Reader(token) => token.read.iter().any(|glob| glob.matches(path)),
        }
    }

    /// Fails unless the caller may read this path.
    pub(super) fn check_read(&self, path: &SecretPath) -> Result<(), ApiError> {
        if self.may_read(path) {
            Ok(())
        } else {
            Err(forbidden("this token may not read this path"))
        }
    }

    /// The error in the form for this caller. Only the root token sees hosts, admins and objects. A read
    /// token sees the code, its meaning, and a trace id with which the operator finds the message in the log.
    pub(super) fn hears(&self, error: ApiError, trace: &str) -> ApiError {
        let meaning = match (self, error.code) {
            (Self::Root, _) => return error,
            (_, Code::DatabaseUnreachable) => "the database cannot be reached",
            (_, Code::DatabaseRefusedLogin) => "the database refuses Mayfly's own login",
            (_, Code::AdminLacksRights) => "Mayfly's own login lacks a right in the database",
            (_, Code::NoSuchObject | Code::AmbiguousObject | Code::GrantRefused) => {
                "the grants of this secret are not possible"
            }
            (_, Code::ObjectLocked) => {
                "another transaction holds an object of this secret's grants; try again in a moment"
            }
            (_, Code::StatementFailed) => "the database refuses a statement of Mayfly",
            (_, Code::NoEngine) => "no engine can do this now",
            (_, Code::BrokerUnavailable) => "the message broker is not available",
            _ => return error,
        };
        let message = match trace {
            "" => format!("{meaning}; the log of the dispatcher says more"),
            trace => format!("{meaning}; the log of the dispatcher says more under trace {trace}"),
        };
        ApiError { message, ..error }
    }

    /// Maximum number of the caller's leases at a time.
    pub(super) fn max_leases(&self) -> Option<u64> {
        match self {
            Self::Root => None,
            Self::Reader(token) => token.max_leases,
        }
    }

    /// The creator whose leases the caller sees. `None`: those of all.
    pub(super) fn only_leases_of(&self) -> Option<String> {
        match self {
            Self::Root => None,
            Self::Reader(token) => Some(token.id.clone()),
        }
    }
}

/// `forbidden`: the token does not allow this request.
pub(super) fn forbidden(message: &str) -> ApiError {
    ApiError::new(Code::Forbidden, message)
}

/// The token of an `Authorization` header, after the scheme `Bearer` or alone.
fn token_of(header: &str) -> &str {
    let text = header.trim();
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        Some(_) | None => text,
    }
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let refuse = |message: &str| ApiError::new(Code::Unauthenticated, message);
        let given = parts
            .headers
            .get(header::AUTHORIZATION)
            .ok_or_else(|| refuse("a token is needed: Authorization: Bearer TOKEN"))?;
        let text = given
            .to_str()
            .map_err(|_| refuse("malformed bearer token"))?;
        match app
            .tokens
            .bearer(&app.store, &app.metrics, &Secret::new(token_of(text)))
            .await?
        {
            None => Err(refuse("no such token, or it has expired")),
            Some(Bearer::Root) => Ok(Self::Root),
            Some(Bearer::Reader(token)) => Ok(Self::Reader(token)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::at;
    use mayfly_protocol::task::{Failure, FailureCode};

    fn reader(globs: &[&str]) -> Caller {
        Caller::Reader(Token {
            id: "t1".to_owned(),
            read: globs.iter().map(|glob| glob.parse().unwrap()).collect(),
            created: at(0),
            expiration: at(60),
            max_leases: Some(3),
        })
    }

    #[test]
    fn the_scheme_of_a_token_may_be_absent() {
        for (header, expected) in [
            ("Bearer mft_x", "mft_x"),
            ("bearer mft_x", "mft_x"),
            (" BEARER   mft_x ", "mft_x"),
            ("mft_x", "mft_x"),
            // Another scheme is no part of any token, so this header matches no token.
            ("Basic mft_x", "Basic mft_x"),
            ("Bearermft_x", "Bearermft_x"),
            ("Bearer", "Bearer"),
            ("", ""),
        ] {
            assert_eq!(token_of(header), expected, "{header:?}");
        }
    }

    #[test]
    fn a_read_token_may_read_its_paths_and_nothing_more() {
        let path = |path: &str| path.parse::<SecretPath>().unwrap();
        let caller = reader(&["app:*", "db:one"]);
        for (name, expected) in [("app:a", true), ("db:one", true), ("db:two", false)] {
            assert_eq!(caller.may_read(&path(name)), expected, "{name}");
            assert_eq!(caller.check_read(&path(name)).is_ok(), expected, "{name}");
            assert!(Caller::Root.check_read(&path(name)).is_ok());
            assert!(!reader(&[]).may_read(&path(name)));
        }
        let refused = caller.root_only().unwrap_err();
        assert_eq!(refused.code, Code::Forbidden);
        assert_eq!(Caller::Root.root_only(), Ok(()));
        // The token sees its own leases, up to its own limit.
        assert_eq!(caller.only_leases_of().as_deref(), Some("t1"));
        assert_eq!(caller.max_leases(), Some(3));
        assert_eq!(
            (Caller::Root.only_leases_of(), Caller::Root.max_leases()),
            (None, None)
        );
    }

    /// Messages of engines have hosts, admins and objects in them.
    #[test]
    fn a_read_token_learns_nothing_about_a_server_from_a_failure() {
        for code in FailureCode::ALL {
            let error = ApiError::from(Failure::new(code, "admin at db.internal"));
            let heard = reader(&[]).hears(error.clone(), "abc123");
            assert_eq!(heard.code, error.code);
            // These two codes are about the caller's own lease. Their messages name nothing else.
            let is_own = matches!(code, FailureCode::Expired | FailureCode::BeyondMaximum);
            assert_eq!(heard.message == error.message, is_own, "{code:?}");
            if !is_own {
                assert!(!heard.message.contains("db.internal"), "{heard:?}");
                assert!(heard.message.ends_with("under trace abc123"), "{heard:?}");
            }
            assert_eq!(Caller::Root.hears(error.clone(), "abc123"), error);
        }
        let no_trace = reader(&[]).hears(ApiError::new(Code::BrokerUnavailable, "mq.internal"), "");
        assert!(no_trace.message.ends_with("says more"), "{no_trace:?}");
    }

    #[test]
    fn a_read_token_learns_what_it_can_mend_itself() {
        for code in [
            Code::Invalid,
            Code::NotFound,
            Code::Quota,
            Code::InUse,
            Code::Deadline,
        ] {
            let error = ApiError::new(code, "words");
            assert_eq!(reader(&[]).hears(error.clone(), "abc123"), error);
        }
    }
}
