//! Errors of the proxy itself. They are PostgreSQL errors, so that every driver understands them.

use super::frames::message;

/// SQLSTATE (PostgreSQL documentation, "PostgreSQL Error Codes").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// `admin_shutdown`: connection pools treat this as a lost connection, and connect again.
    AdminShutdown,
    /// `cannot_connect_now`: there is no account to log in with at present.
    CannotConnectNow,
    /// `sqlclient_unable_to_establish_sqlconnection`: the server is not reached.
    Unreachable,
    /// `protocol_violation`.
    ProtocolViolation,
    /// `feature_not_supported`.
    NotSupported,
    /// `invalid_password`.
    InvalidPassword,
    /// `invalid_catalog_name`.
    InvalidDatabase,
    /// `too_many_connections`.
    TooManyConnections,
}

impl State {
    fn code(self) -> &'static str {
        match self {
            Self::AdminShutdown => "57P01",
            Self::CannotConnectNow => "57P03",
            Self::Unreachable => "08001",
            Self::ProtocolViolation => "08P01",
            Self::NotSupported => "0A000",
            Self::InvalidPassword => "28P01",
            Self::InvalidDatabase => "3D000",
            Self::TooManyConnections => "53300",
        }
    }
}

/// An `ErrorResponse` that ends the connection.
pub(super) fn fatal(state: State, text: &str, hint: Option<&str>) -> Vec<u8> {
    let mut body = Vec::with_capacity(text.len() + 64);
    let mut field = |kind: u8, text: &str| {
        body.push(kind);
        body.extend(text.bytes().filter(|byte| *byte != 0));
        body.push(0);
    };
    field(b'S', "FATAL");
    field(b'V', "FATAL");
    field(b'C', state.code());
    field(b'M', text);
    if let Some(hint) = hint {
        field(b'H', hint);
    }
    body.push(0);
    message(b'E', &body)
}

/// The SQLSTATE of a server's `ErrorResponse`, by its body.
pub(super) fn state_of(body: &[u8]) -> Option<&str> {
    let field = body
        .split(|byte| *byte == 0)
        .find(|it| it.first() == Some(&b'C'))?;
    std::str::from_utf8(field.get(1..)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_fields_that_drivers_read() {
        let error = fatal(State::CannotConnectNow, "no account\0yet", Some("wait"));
        assert_eq!(error[0], b'E');
        assert_eq!(
            &error[5..],
            b"SFATAL\0VFATAL\0C57P03\0Mno accountyet\0Hwait\0\0"
        );
        assert_eq!(state_of(&error[5..]), Some("57P03"));
        assert_eq!(state_of(b"SFATAL\0"), None);
        assert_eq!(state_of(b""), None);
    }
}
