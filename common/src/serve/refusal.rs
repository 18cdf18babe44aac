//! Why a connection ended before a handler had its request.

use super::seen::{Phase, Seen, Worth};

/// Why a connection was refused. The caller of [`super::serve`] counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There was no room for the connection, and all others were being served.
    NoRoom,
    /// The connection made room for another before its request was complete, or while its client did not read the
    /// answer.
    MadeRoom,
    /// The head of the request was too large.
    HeadTooLarge,
    /// The client does not speak HTTP/1.
    NotHttp,
    /// The handshake of TLS failed: no TLS, another version, or a refused certificate.
    NoTls,
    /// The request did not come in time, or the answer was not read in time.
    TooSlow,
}

impl Refusal {
    /// All reasons, for metrics.
    pub const ALL: [Self; 6] = [
        Self::NoRoom,
        Self::MadeRoom,
        Self::HeadTooLarge,
        Self::NotHttp,
        Self::NoTls,
        Self::TooSlow,
    ];

    /// The value of the label `reason`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoRoom => "no_room",
            Self::MadeRoom => "made_room",
            Self::HeadTooLarge => "head_too_large",
            Self::NotHttp => "not_http",
            Self::NoTls => "no_tls",
            Self::TooSlow => "too_slow",
        }
    }

    /// The reason of a connection that hyper has ended.
    pub(super) fn of(error: &hyper::Error) -> Option<Self> {
        if error.is_parse_too_large() {
            Some(Self::HeadTooLarge)
        } else if error.is_parse() {
            Some(Self::NotHttp)
        } else {
            None
        }
    }

    /// The reason of a connection that has to make room. `None`: it waits for its next request, so no request is
    /// refused.
    pub(super) fn of_leaving(worth: Worth) -> Option<Self> {
        match worth {
            Worth::Nothing | Worth::Slow => Some(Self::MadeRoom),
            Worth::Idle => None,
        }
    }

    /// The reason of a connection that exceeded a time limit.
    pub(super) fn of_late(seen: &Seen) -> Option<Self> {
        match seen.now().phase {
            Phase::Head | Phase::Body | Phase::Answer => Some(Self::TooSlow),
            Phase::Idle | Phase::Work => None,
        }
    }
}
