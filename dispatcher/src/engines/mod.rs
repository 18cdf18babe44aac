//! All messages to and from engines. Only these modules know the head, the seal and the form of a reply. Other
//! modules send through [`call`] and [`outbox`], and receive through [`inbox`].

pub(crate) mod authorities;
pub(crate) mod call;
pub(crate) mod declare;
pub(crate) mod delays;
pub(crate) mod inbox;
pub(crate) mod outbox;
pub(crate) mod ping;
mod seal;
