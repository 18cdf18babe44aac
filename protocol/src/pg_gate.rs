//! Checks what a PostgreSQL server requests during a login. The check is between the server's bytes and the
//! driver: a request for a password in clear never reaches the driver, which would answer it. It reads no
//! socket.

use crate::pg_login::{Bound, Cause, Method, ROUNDS_MAX, Refusal, Rule};

/// Maximum length of a server's message during the login, in bytes.
const MESSAGE_MAX: usize = 64 * 1024;
const SCRAM: &[u8] = b"SCRAM-SHA-256";
const SCRAM_PLUS: &[u8] = b"SCRAM-SHA-256-PLUS";

/// The progress of a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The server has requested nothing yet.
    Begun,
    /// The server has requested this method.
    Asked(Method),
    /// The server has offered SCRAM. The client's first message selects the mechanism.
    Offered,
    /// The server has accepted the login.
    In(Method),
}

/// The check of one login. [`Gate::take`] gets the server's bytes. [`Gate::cleared`] returns them when the whole
/// message that they belong to was checked.
#[derive(Debug)]
pub struct Gate {
    rule: Rule,
    bound: Bound,
    stage: Stage,
    bytes: Vec<u8>,
    /// Number of `bytes` that are checked.
    checked: usize,
}

impl Gate {
    /// The check of a login under `rule`, on a connection with TLS or without.
    pub fn new(rule: Rule, tls: bool) -> Self {
        Self {
            rule,
            bound: rule.bound(tls),
            stage: Stage::Begun,
            bytes: Vec::new(),
            checked: 0,
        }
    }

    /// How the server accepted the login; `None` before that. After that nothing is checked.
    pub fn is_in(&self) -> Option<Method> {
        match self.stage {
            Stage::In(method) => Some(method),
            Stage::Begun | Stage::Asked(_) | Stage::Offered => None,
        }
    }

    /// Takes bytes that the server sent, and checks them.
    ///
    /// # Errors
    /// The server's request is not allowed. Then no byte of the message is cleared.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.bytes.extend_from_slice(bytes);
        while self.is_in().is_none() {
            let rest = &self.bytes[self.checked..];
            let Some(next) = message(rest).map_err(|cause| self.refuse(cause))? else {
                return Ok(());
            };
            let length = next.length;
            if next.tag == b'R' {
                let stage = self.asked(next.body).map_err(|cause| self.refuse(cause))?;
                self.stage = stage;
            }
            self.checked += length;
        }
        self.checked = self.bytes.len();
        Ok(())
    }

    /// The bytes that are checked and not yet passed on.
    pub fn cleared(&mut self) -> Vec<u8> {
        let rest = self.bytes.split_off(self.checked);
        self.checked = 0;
        std::mem::replace(&mut self.bytes, rest)
    }

    /// Checks the bytes that the client is about to send.
    ///
    /// # Errors
    /// The client begins SCRAM without channel binding although it is required.
    pub fn sends(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        if self.stage == Stage::Offered && !bytes.is_empty() {
            // SASLInitialResponse: its tag, its length, the mechanism's name and a zero byte.
            let name = bytes.get(5..).unwrap_or_default();
            let is_plus =
                bytes[0] == b'p' && name.split(|byte| *byte == 0).next() == Some(SCRAM_PLUS);
            if self.bound.scram && !is_plus {
                return Err(self.refuse(Cause::Unbindable));
            }
            self.stage = Stage::Asked(match is_plus {
                true => Method::ScramPlus,
                false => Method::Scram,
            });
        }
        Ok(())
    }

    fn refuse(&self, cause: Cause) -> Refusal {
        Refusal {
            cause,
            written_in: self.rule.written_in,
        }
    }

    /// An authentication request (PostgreSQL documentation, "Message Formats").
    fn asked(&self, body: &[u8]) -> Result<Stage, Cause> {
        let (number, rest) = body.split_first_chunk().ok_or(Cause::Garbled)?;
        let methods = &self.rule.methods;
        let allowed = |is_allowed: bool, method: Method| match is_allowed {
            true => Ok(Stage::Asked(method)),
            false => Err(Cause::Method(method)),
        };
        match u32::from_be_bytes(*number) {
            0 => match self.stage {
                Stage::Begun if self.bound.always && !self.rule.is_trial => Err(Cause::Unproven),
                Stage::Begun if !methods.none => Err(Cause::Method(Method::None)),
                Stage::Begun => Ok(Stage::In(Method::None)),
                Stage::Asked(method) | Stage::In(method) => Ok(Stage::In(method)),
                // The client has not answered yet.
                Stage::Offered => Err(Cause::Garbled),
            },
            3 => allowed(methods.password && !self.bound.always, Method::Password),
            5 => allowed(methods.md5 && !self.bound.always, Method::Md5),
            10 => {
                let mut names = rest.split(|byte| *byte == 0);
                let has_plus = names.clone().any(|name| name == SCRAM_PLUS);
                if !has_plus && !names.any(|name| name == SCRAM) {
                    return Err(Cause::Unsupported(10));
                }
                if !methods.scram {
                    return Err(Cause::Method(Method::Scram));
                }
                if self.bound.scram && !has_plus {
                    return Err(Cause::Unbound);
                }
                Ok(Stage::Offered)
            }
            11 => match rounds(rest) {
                Some(rounds) if rounds > ROUNDS_MAX => Err(Cause::Rounds(rounds)),
                _ => Ok(self.stage),
            },
            12 => Ok(self.stage),
            other => Err(Cause::Unsupported(other)),
        }
    }
}

/// A message of the server.
struct Message<'b> {
    tag: u8,
    body: &'b [u8],
    /// Length of the whole message, in bytes.
    length: usize,
}

/// The first message; `None` while it is incomplete.
fn message(bytes: &[u8]) -> Result<Option<Message<'_>>, Cause> {
    let [tag, a, b, c, d, ..] = *bytes else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if !(4..=MESSAGE_MAX).contains(&length) {
        return Err(Cause::Garbled);
    }
    Ok(bytes.get(5..=length).map(|body| Message {
        tag,
        body,
        length: length + 1,
    }))
}

/// The rounds in a server-first-message (RFC 5802, 7); `u64::MAX` where it is not a number.
fn rounds(message: &[u8]) -> Option<u64> {
    let text = message
        .split(|byte| *byte == b',')
        .find_map(|part| part.strip_prefix(b"i="))?;
    Some(
        std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(u64::MAX),
    )
}

#[cfg(test)]
#[path = "pg_gate_tests.rs"]
#[allow(clippy::unwrap_used)]
mod tests;
