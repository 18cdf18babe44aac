//! Who calls, and what they may.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use mayfly_common::names::SecretPath;
use mayfly_common::secret::Secret;

use crate::app::App;
use crate::error::{ApiError, Code};
use crate::store::{Bearer, Token};
use crate::tokens;

/// Who calls. A handler that takes one is for the holder of a token.
#[derive(Debug, Clone)]
pub(super) enum Caller {
    /// The root token: everything.
    Root,
    /// A read token.
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

/// `forbidden`.
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
            .map_err(|_| refuse("the token is none"))?
            .trim();
        let token = match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            Some(_) | None => text,
        };
        match tokens::bearer(app, &Secret::new(token)).await? {
            None => Err(refuse("no such token, or it has expired")),
            Some(Bearer::Root) => Ok(Self::Root),
            Some(Bearer::Reader(token)) => Ok(Self::Reader(token)),
        }
    }
}
