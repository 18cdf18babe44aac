//! The HTTP answer for an error: status, stable code, message and fields.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde_json::json;

use crate::error::{ApiError, Code, Limit};

/// When to try again after a 503, in seconds.
const RETRY_AFTER_SECONDS: &str = "5";

/// Why a request is refused: an extension of its answer, for the metrics.
#[derive(Clone, Copy)]
pub(super) struct Refused(pub(super) &'static str);

/// The HTTP status of a code (DESIGN §5).
fn status(code: Code) -> u16 {
    match code {
        Code::Malformed | Code::Invalid => 400,
        Code::Unauthenticated => 401,
        Code::Forbidden => 403,
        Code::NotFound => 404,
        Code::MethodNotAllowed => 405,
        Code::Exists | Code::InUse => 409,
        Code::NoSuchObject
        | Code::AmbiguousObject
        | Code::GrantRefused
        | Code::AdminLacksRights
        | Code::StatementFailed => 422,
        Code::Quota => 429,
        Code::DatabaseUnreachable | Code::DatabaseRefusedLogin => 502,
        Code::ObjectLocked | Code::NoEngine | Code::BrokerUnavailable | Code::StoreUnavailable => {
            503
        }
        Code::Deadline => 504,
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (number, word) = (status(self.code), self.code.as_str());
        let code = StatusCode::from_u16(number).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut body = json!({"code": number, "error": word, "message": self.message});
        if !self.errors.is_empty() {
            body["errors"] = json!(self.errors);
        }
        let mut response = (code, Json(body)).into_response();
        if self.code.is_refusal() {
            let reason = self.limit.map_or(word, Limit::as_str);
            response.extensions_mut().insert(Refused(reason));
        }
        let headers = response.headers_mut();
        if code == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(
                header::RETRY_AFTER,
                HeaderValue::from_static(RETRY_AFTER_SECONDS),
            );
        }
        if let Some(at) = self.retry_at {
            let seconds = at.duration_since(Timestamp::now()).as_secs().max(1);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if code == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_a_status_below_500() {
        for code in Code::ALL {
            let is_refusal = status(code) < 500;
            assert_eq!(code.is_refusal(), is_refusal, "{}", code.as_str());
        }
    }
}
