//! The name of one request. It is random, travels inside the seal in both directions, and is used
//! once: an answer counts for the request it names and for no other.

use serde::{Deserialize, Serialize};

/// 128 random bits, written as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestId(u128);

impl RequestId {
    /// A new random id.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl From<RequestId> for String {
    fn from(id: RequestId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for RequestId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let bits = u128::from_str_radix(&text, 16).ok();
        bits.filter(|_| text.len() == 32 && digits)
            .map(Self)
            .ok_or("a request id is 32 hexadecimal digits")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn it_travels_as_text() {
        let id = RequestId::random();
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(text.len(), 34);
        assert_eq!(serde_json::from_str::<RequestId>(&text).unwrap(), id);
        for wrong in [
            "\"\"",
            "\"+f\"",
            "7",
            "\"0123456789abcdef0123456789abcdefg\"",
        ] {
            assert!(serde_json::from_str::<RequestId>(wrong).is_err(), "{wrong}");
        }
    }
}
