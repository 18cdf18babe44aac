//! An error as an answer: status, stable code, words, fields.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde_json::json;

use crate::error::{ApiError, Limit};

/// When to try again after a 503, in seconds.
const RETRY_AFTER_SECONDS: &str = "5";

/// Why a request is refused: an extension of its answer, for the metrics.
#[derive(Clone, Copy)]
pub(super) struct Refused(pub(super) &'static str);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (number, word) = self.code.row();
        let status = StatusCode::from_u16(number).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut body = json!({"code": number, "error": word, "message": self.message});
        if !self.errors.is_empty() {
            body["errors"] = json!(self.errors);
        }
        let mut response = (status, Json(body)).into_response();
        if number < 500 {
            let reason = self.limit.map_or(word, Limit::as_str);
            response.extensions_mut().insert(Refused(reason));
        }
        let headers = response.headers_mut();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(
                header::RETRY_AFTER,
                HeaderValue::from_static(RETRY_AFTER_SECONDS),
            );
        }
        if let Some(at) = self.retry_at {
            let seconds = at.duration_since(Timestamp::now()).as_secs().max(1);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
