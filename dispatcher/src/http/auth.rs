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

/// Who calls. A handler that takes one is for the holder of a token.
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

    /// Whether secrets at this path may be seen.
    pub(super) fn may_read(&self, path: &SecretPath) -> bool {
        match self {
            Self::Root => true,
            Self::Reader(token) => token.read.iter().any(|glob| glob.matches(path)),
        }
    }

    /// Goes on only where this path may be read.
    pub(super) fn check_read(&self, path: &SecretPath) -> Result<(), ApiError> {
        if self.may_read(path) {
            Ok(())
        } else {
            Err(forbidden("this token may not read this path"))
        }
    }

    /// An error as this caller may hear it. Where a database is, who its admin is and what stands in
    /// it is for the root token; a read token hears the code, what that means, and a trace that
    /// leads the operator to the words in the log.
    pub(super) fn hears(&self, error: ApiError, trace: &str) -> ApiError {
        let meaning = match (self, error.code) {
            (Self::Root, _) => return error,
            (_, Code::DatabaseUnreachable) => "the database cannot be reached now",
            (_, Code::DatabaseRefusedLogin) => "the database refuses Mayfly's own login",
            (_, Code::AdminLacksRights) => "Mayfly's own login lacks a right in the database",
            (_, Code::NoSuchObject | Code::AmbiguousObject | Code::GrantRefused) => {
                "the grants of this secret cannot be made as they are"
            }
            (_, Code::ObjectLocked) => {
                "another transaction holds an object of this secret's grants; try again in a moment"
            }
            (_, Code::StatementFailed) => "the database refuses a statement of Mayfly",
            (_, Code::NoEngine) => "no engine can do it now",
            (_, Code::BrokerUnavailable) => "the message broker cannot be used now",
            _ => return error,
        };
        let message = match trace {
            "" => format!("{meaning}; the log of the dispatcher says more"),
            trace => format!("{meaning}; the log of the dispatcher says more under trace {trace}"),
        };
        ApiError { message, ..error }
    }

    /// Most leases it may have at a time.
    pub(super) fn max_leases(&self) -> Option<u64> {
        match self {
            Self::Root => None,
            Self::Reader(token) => token.max_leases,
        }
    }

    /// Whose leases alone it sees; none = all.
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
