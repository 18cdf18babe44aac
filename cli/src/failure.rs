//! Why a command failed, and its exit code.

use std::fmt;

use serde_json::Value;

/// The failure of a command.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line, or a file that it names, is wrong. The dispatcher was not called.
    Usage(String),
    /// Something on this machine failed: a file, the terminal, or an answer without a field that the command needs.
    Local(String),
    /// No token was given.
    NoToken(String),
    /// The dispatcher could not be reached, so it has changed nothing.
    Unreachable(String),
    /// The dispatcher was called, but no answer arrived. It may have acted or not.
    NoAnswer(String),
    /// The dispatcher answered with an error.
    Refused(Refusal),
}

/// An error answer of the API.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    /// The stable code, such as `not_found`. Empty: the answer was not the API's own.
    pub(crate) error: String,
    /// What happened, for a person.
    pub(crate) message: String,
    /// One line for each invalid field.
    pub(crate) fields: Vec<String>,
}

impl Failure {
    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Local(_) => 1,
            Failure::Usage(_) => 2,
            Failure::NoToken(_) => 4,
            Failure::Unreachable(_) | Failure::NoAnswer(_) => 5,
            Failure::Refused(refusal) => match refusal.status {
                404 => 3,
                401 | 403 => 4,
                502..=504 => 5,
                _ => 1,
            },
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(text)
            | Failure::Local(text)
            | Failure::NoToken(text)
            | Failure::Unreachable(text)
            | Failure::NoAnswer(text) => f.write_str(text),
            Failure::Refused(refusal) => {
                f.write_str(&refusal.message)?;
                if !refusal.error.is_empty() {
                    write!(f, " ({})", refusal.error)?;
                }
                refusal
                    .fields
                    .iter()
                    .try_for_each(|line| write!(f, "\n  {line}"))
            }
        }
    }
}

impl Refusal {
    /// Parses an error answer. If the answer is not the API's own, such as a proxy's page, only its status is shown.
    pub(crate) fn read(status: u16, body: &[u8]) -> Self {
        let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let text = |key: &str| body.get(key).and_then(Value::as_str).map(str::to_owned);
        let fields = match body.get("errors") {
            Some(Value::Object(errors)) => errors
                .iter()
                .map(|(field, reasons)| format!("{field}: {}", join(reasons)))
                .collect(),
            _ => Vec::new(),
        };
        Self {
            status,
            error: text("error").unwrap_or_default(),
            message: text("message")
                .unwrap_or_else(|| format!("the answer is HTTP status {status}")),
            fields,
        }
    }
}

fn join(reasons: &Value) -> String {
    match reasons {
        Value::String(reason) => reason.clone(),
        Value::Array(reasons) => reasons.iter().map(join).collect::<Vec<_>>().join("; "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_documented() {
        for (status, code) in [
            (400, 1),
            (401, 4),
            (403, 4),
            (404, 3),
            (409, 1),
            (422, 1),
            (429, 1),
            (500, 1),
            (502, 5),
            (503, 5),
            (504, 5),
            (307, 1),
        ] {
            let failure = Failure::Refused(Refusal::read(status, b""));
            assert_eq!(failure.exit_code(), code, "status {status}");
        }
        assert_eq!(Failure::Usage(String::new()).exit_code(), 2);
        assert_eq!(Failure::Local(String::new()).exit_code(), 1);
        assert_eq!(Failure::NoToken(String::new()).exit_code(), 4);
        assert_eq!(Failure::Unreachable(String::new()).exit_code(), 5);
        assert_eq!(Failure::NoAnswer(String::new()).exit_code(), 5);
    }

    #[test]
    fn a_refusal_names_its_code_and_its_fields() {
        let body = br#"{"code":400,"error":"invalid","message":"the secret is not valid",
            "errors":{"data.port":["is missing"],"ttl":["is not a number","is negative"]}}"#;
        let failure = Failure::Refused(Refusal::read(400, body));
        assert_eq!(
            failure.to_string(),
            "the secret is not valid (invalid)\n  data.port: is missing\n  \
             ttl: is not a number; is negative"
        );
    }

    #[test]
    fn a_page_that_is_not_the_apis_is_told_by_its_status() {
        let failure = Failure::Refused(Refusal::read(502, b"<html>Bad Gateway</html>"));
        assert_eq!(failure.to_string(), "the answer is HTTP status 502");
    }
}
