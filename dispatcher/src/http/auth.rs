//! Who calls, and what they may.

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
    /// The root token: everything.
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

    /// Only the root token goes on.
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

    /// Maximum number of its leases at a time.
    pub(super) fn max_leases(&self) -> Option<u64> {
        match self {
            Self::Root => None,
            Self::Reader(token) => token.max_leases,
        }
    }

    /// The creator whose leases it sees; `None`: all.
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
            .map_err(|_| refuse("malformed bearer token"))?
            .trim();
        let token = match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            Some(_) | None => text,
        };
        match app
            .tokens
            .bearer(&app.store, &app.metrics, &Secret::new(token))
            .await?
        {
            None => Err(refuse("no such token, or it has expired")),
            Some(Bearer::Root) => Ok(Self::Root),
            Some(Bearer::Reader(token)) => Ok(Self::Reader(token)),
        }
    }
}
