//! All messages to and from engines. Only here is a message written out: its head, its seal
//! and the form of a reply. Other rooms send through [`call`] and [`outbox`], and receive through [`inbox`].

pub(crate) mod authorities;
pub(crate) mod call;
pub(crate) mod declare;
pub(crate) mod delays;
pub(crate) mod inbox;
pub(crate) mod outbox;
pub(crate) mod ping;
mod seal;
