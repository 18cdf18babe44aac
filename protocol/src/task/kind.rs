//! The list of all kinds of message, and of what an engine answers. A new kind of request is one entry here: the
//! compiler then asks for everything else that belongs to it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::*;
use crate::target::Target;

/// Makes [`Kind`], [`ReplyResult`], [`HasTarget`] for each request, and the macro `each_request`.
/// An entry is a variant of `Kind` and its word on the wire. The variant of a request is also the name of its type.
/// After its word come the variants of `ReplyResult` that answer it.
/// `$dollar` is the character `$`, which the definition of `each_request` needs.
macro_rules! messages {
    (
        $dollar:tt
        requests { $($(#[$about:meta])* $request:ident = $request_word:literal => $answers:tt)* }
        to_engines { $($(#[$about_order:meta])* $order:ident = $order_word:literal,)* }
        others { $($(#[$about_other:meta])* $other:ident = $other_word:literal,)* }
    ) => {
        /// The kind of a message. Tasks and verdicts go from dispatcher to engine. Replies, outcomes and heartbeats
        /// go back.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Kind {
            $($(#[$about])* #[serde(rename = $request_word)] $request,)*
            $($(#[$about_order])* #[serde(rename = $order_word)] $order,)*
            $($(#[$about_other])* #[serde(rename = $other_word)] $other,)*
            /// A kind of a newer version.
            #[serde(rename = "unknown")]
            Unknown,
        }

        impl Kind {
            /// All kinds that this version knows.
            pub const ALL: &[Self] = &[$(Self::$request,)* $(Self::$order,)* $(Self::$other,)*];

            /// The kinds that engines take.
            pub const TO_ENGINES: &[Self] = &[$(Self::$request,)* $(Self::$order,)*];

            /// The word on the wire, in logs and in metrics.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$request => $request_word,)*
                    $(Self::$order => $order_word,)*
                    $(Self::$other => $other_word,)*
                    Self::Unknown => "unknown",
                }
            }
        }

        $(impl HasTarget for $request {
            fn target(&self) -> &Target {
                &self.target
            }

            fn target_mut(&mut self) -> &mut Target {
                &mut self.target
            }
        })*

        /// Calls a macro with the names of the types of all requests: `each_request!(name)` is
        /// `name!(Create, Renew, …)`.
        #[macro_export]
        macro_rules! each_request {
            ($dollar name:ident) => { $dollar name!($($request),*) };
        }

        reply_result! { $($answers)* }
    };
}

/// Makes [`ReplyResult`] out of the variants of each request.
macro_rules! reply_result {
    ($({ $($(#[$about:meta])* $variant:ident $fields:tt,)* })*) => {
        /// What the engine did.
        #[derive(Debug, Clone, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum ReplyResult {
            /// It was not done, or not for certain. The lease of a create must be revoked.
            Failed(Failure),
            /// Answer to a ping.
            Pong(Heartbeat),
            $($($(#[$about])* $variant $fields,)*)*
        }
    };
}

messages! {
    $
    requests {
        /// Make a role for a lease.
        Create = "create" => {
            /// The role was made, or exists already.
            Created(Created),
        }
        /// Move a role's end.
        Renew = "renew" => {
            /// The role now ends then, by the database's clock.
            Renewed(Timestamp),
            /// The role ends then, later than [`super::Renew::from`]: nothing was moved.
            Moved(Timestamp),
        }
        /// Change the admin's own password.
        Rotate = "rotate" => {
            /// Which password is in force.
            Rotated(Rotated),
        }
        /// Report what the admin can and cannot do.
        Check = "check" => {
            /// What the check has found.
            Checked(Vec<Finding>),
        }
        /// Remove the grant and quarantine roles that nothing needs.
        Tidy = "tidy" => {
            /// Which roles were removed and which stay.
            Tidied(Tidied),
        }
        /// List the roles of leases on a server.
        Sweep = "sweep" => {
            /// The roles of leases on the server.
            Ledger(Ledger),
        }
        /// Grant new objects to the grant role of live accounts.
        Refresh = "refresh" => {
            /// A grant role is up to date.
            Refreshed {
                /// Whether accounts are members of it. If not, nothing was done.
                in_use: bool,
            },
        }
    }
    to_engines {
        /// End the role of a lease.
        Revoke = "revoke",
        /// Ask one engine for a sign of life.
        Ping = "ping",
        /// A revocation that failed needs no more tries.
        Verdict = "verdict",
    }
    others {
        /// Answer to a request.
        Reply = "reply",
        /// The result of a revocation.
        Outcome = "outcome",
        /// The sign of life of an engine.
        Heartbeat = "heartbeat",
        /// A dispatcher tests whether delayed messages arrive.
        Probe = "probe",
        /// A bundle of certificate authorities, for messages that name it.
        Authorities = "authorities",
    }
}

impl Kind {
    /// The kind with this word.
    pub fn parse(word: &str) -> Self {
        let known = Self::ALL.iter().find(|kind| kind.as_str() == word);
        known.copied().unwrap_or(Self::Unknown)
    }
}
