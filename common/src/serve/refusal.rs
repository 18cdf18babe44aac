//! Why a connection ended before a handler had a request of it.

use super::seen::{Phase, Seen, Worth};

/// Why a connection was refused. The caller of [`super::serve`] counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There was no room for it, and all others were being served.
    NoRoom,
    /// It made room for another before its request was whole, or as it did not take its answer.
    MadeRoom,
    /// The head of its request was too large.
    HeadTooLarge,
    /// It does not speak HTTP/1.
    NotHttp,
    /// No TLS came about with it: it speaks none, or another version, or one side refuses the certificate of the other.
    NoTls,
    /// Its request was not there in time, or its answer not taken.
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

    /// Of a connection that hyper has ended.
    pub(super) fn of(error: &hyper::Error) -> Option<Self> {
        if error.is_parse_too_large() {
            Some(Self::HeadTooLarge)
        } else if error.is_parse() {
            Some(Self::NotHttp)
        } else {
            None
        }
    }

    /// Of a connection that has to make room. One that only waits for its next request is refused nothing.
    pub(super) fn of_leaving(worth: Worth) -> Option<Self> {
        match worth {
            Worth::Nothing | Worth::Slow => Some(Self::MadeRoom),
            Worth::Idle => None,
        }
    }

    /// Of a connection whose time is over.
    pub(super) fn of_late(seen: &Seen) -> Option<Self> {
        match seen.now().phase {
            Phase::Head | Phase::Body | Phase::Answer => Some(Self::TooSlow),
            Phase::Idle | Phase::Work => None,
        }
    }
}
