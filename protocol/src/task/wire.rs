//! The clear head of a message and its sealed body: versioned JSON, bound to the head.

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Kind;
use crate::names::{LeaseId, PoolName};
use crate::request::RequestId;
use crate::seal::{Form, KeyPair, Open, PublicKey, SealError};

/// Version of the bodies. A receiver refuses one it does not know.
pub const WIRE_VERSION: u32 = 1;

/// The clear part of a message. All but `attempt`, `settling` and `traceparent` is authenticated
/// with the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The kind of the message.
    pub kind: Kind,
    /// The pool of the receiver or of the sender.
    pub pool: PoolName,
    /// The lease of the message.
    pub lease: Option<LeaseId>,
    /// When it was sealed, by the sender's clock.
    pub issued: Timestamp,
    /// When its sender stops waiting, by the sender's clock.
    pub deadline: Option<Timestamp>,
    /// The number of earlier tries of this revocation.
    pub attempt: u32,
    /// Whether this revocation was done once while its create could still commit, and is done again now that
    /// it cannot.
    pub settling: bool,
    /// W3C Trace Context, level 1.
    pub traceparent: String,
}

impl Head {
    /// The bytes authenticated with the body.
    fn associated(&self) -> Vec<u8> {
        let lease = self.lease.map(|id| id.to_string()).unwrap_or_default();
        let deadline = self
            .deadline
            .map(|at| at.as_millisecond().to_string())
            .unwrap_or_default();
        format!(
            "{WIRE_VERSION}|{}|{}|{lease}|{}|{deadline}",
            self.kind.as_str(),
            self.pool,
            self.issued.as_millisecond()
        )
        .into_bytes()
    }

    /// Seals a body under this head, in the form that every version opens.
    ///
    /// # Errors
    /// See [`KeyPair::seal`].
    pub fn seal<T: Serialize>(
        &self,
        from: &KeyPair,
        to: &PublicKey,
        body: &T,
    ) -> Result<Vec<u8>, SealError> {
        self.seal_request(Form::Alone, from, to, body, None)
    }

    /// Seals a request under its name, or the answer to it. The name is inside the seal: earlier
    /// peers ignore it.
    ///
    /// # Errors
    /// See [`KeyPair::seal`].
    pub fn seal_request<T: Serialize>(
        &self,
        form: Form,
        from: &KeyPair,
        to: &PublicKey,
        body: &T,
        request: Option<RequestId>,
    ) -> Result<Vec<u8>, SealError> {
        let versioned = Versioned {
            v: WIRE_VERSION,
            request,
            body,
        };
        let text = zeroize::Zeroizing::new(
            serde_json::to_vec(&versioned)
                .unwrap_or_else(|e| unreachable!("a body cannot be serialized: {e}")),
        );
        from.seal_as(form, to, self.issued, &self.associated(), &text)
    }

    /// Opens a body that arrived with this head.
    ///
    /// # Errors
    /// [`OpenError`]: not authentic, or of an unknown version or form.
    pub fn open<T: DeserializeOwned>(
        &self,
        to: &impl Open,
        from: &PublicKey,
        envelope: &[u8],
    ) -> Result<T, OpenError> {
        self.open_request(to, from, envelope).map(|(body, _)| body)
    }

    /// Opens a request or an answer, with the name of the request if there is one.
    ///
    /// # Errors
    /// See [`Head::open`].
    pub fn open_request<T: DeserializeOwned>(
        &self,
        to: &impl Open,
        from: &PublicKey,
        envelope: &[u8],
    ) -> Result<(T, Option<RequestId>), OpenError> {
        let text = to.open(from, &self.associated(), envelope)?;
        let versioned: Versioned<T> =
            serde_json::from_slice(&text).map_err(|_| OpenError::UnknownBody)?;
        if versioned.v != WIRE_VERSION {
            return Err(OpenError::UnknownBody);
        }
        Ok((versioned.body, versioned.request))
    }
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    v: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<RequestId>,
    body: T,
}

/// Why a message is not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The message cannot be opened; see [`SealError`].
    #[error("{0}")]
    Sealed(#[from] SealError),
    /// Authentic, but not of this version.
    #[error("this engine does not know the version of the message")]
    UnknownBody,
}

impl OpenError {
    /// The `reason` label of refused tasks.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Sealed(SealError::UnknownForm) | Self::UnknownBody => "unknown_version",
            Self::Sealed(SealError::OtherKey) => "other_key",
            Self::Sealed(SealError::NotAuthentic | SealError::BadKey) => "not_authentic",
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            kind: Kind::Outcome,
            pool: "pool1".parse().unwrap(),
            lease: Some(LeaseId::random()),
            issued: Timestamp::now(),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        }
    }

    #[test]
    fn a_body_is_bound_to_its_head() {
        for form in [Form::Alone, Form::Shared] {
            is_bound_to_its_head(form);
        }
    }

    fn is_bound_to_its_head(form: Form) {
        let (engine, dispatcher) = (KeyPair::generate(), KeyPair::generate());
        let head = head();
        let sealed = head.seal_request(form, &engine, dispatcher.public(), &"hello", None);
        let sealed = sealed.unwrap();
        assert_eq!(Form::of(&sealed), form);
        let open = |head: &Head| head.open::<String>(&dispatcher, engine.public(), &sealed);
        assert_eq!(open(&head).unwrap(), "hello");
        assert!(
            open(&Head {
                kind: Kind::Reply,
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                lease: Some(LeaseId::random()),
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                pool: "pool2".parse().unwrap(),
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                deadline: Some(head.issued),
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                attempt: 7,
                settling: true,
                ..head.clone()
            })
            .is_ok(),
            "these two may change on the way"
        );
    }

    #[test]
    fn an_answer_names_its_request_inside_the_seal() {
        let (engine, dispatcher) = (KeyPair::generate(), KeyPair::generate());
        let (head, id) = (head(), RequestId::random());
        let seal = |id| head.seal_request(Form::Alone, &engine, dispatcher.public(), &"hello", id);
        let open = |sealed: Vec<u8>| {
            head.open_request::<String>(&dispatcher, engine.public(), &sealed)
                .unwrap()
        };
        assert_eq!(
            open(seal(Some(id)).unwrap()),
            ("hello".to_owned(), Some(id))
        );
        assert_eq!(open(seal(None).unwrap()).1, None, "of an older peer");
    }

    #[test]
    fn another_version_is_not_understood() {
        let (engine, dispatcher) = (KeyPair::generate(), KeyPair::generate());
        let head = head();
        let body = serde_json::to_vec(&serde_json::json!({"v": 2, "body": "x"})).unwrap();
        let sealed = engine
            .seal(dispatcher.public(), &head.associated(), &body)
            .unwrap();
        let opened = head.open::<String>(&dispatcher, engine.public(), &sealed);
        assert_eq!(opened.unwrap_err().reason(), "unknown_version");
    }
}
