//! The meaning of a server's answer to a wrong password.

use mayfly_protocol::task::{Finding, Topic};

use super::probe_login::LoginAnswer;

/// SQLSTATE of a wrong password.
const INVALID_PASSWORD: &str = "28P01";

/// The finding for the answer to a wrong password.
pub(super) fn login_finding(topic: Topic, who: &str, answer: LoginAnswer) -> Finding {
    match answer {
        LoginAnswer::LetIn => Finding::bad(
            topic,
            format!(
                "{who} can log in with a wrong password: a line of pg_hba.conf (`trust`, or another method without a password) lets in every client that reaches the server, as any account, even after its VALID UNTIL. Make it scram-sha-256 and reload"
            ),
        ),
        LoginAnswer::Refused { state, .. } if state == INVALID_PASSWORD => {
            Finding::good(topic, format!("{who} is refused with a wrong password"))
        }
        LoginAnswer::Refused { state, words } => Finding::bad(
            topic,
            format!(
                "a login of {who} is not asked for a password: pg_hba.conf selects another method, so accounts cannot log in from here: {words} (SQLSTATE {state})"
            ),
        ),
        LoginAnswer::NoAnswer(failure) => Finding::bad(topic, failure.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::task::{Failure, FailureCode};

    #[test]
    fn only_a_refused_password_refuses_a_login() {
        let refused = |state: &str| LoginAnswer::Refused {
            state: state.to_owned(),
            words: "no".to_owned(),
        };
        assert!(login_finding(Topic::AdminPassword, "r", refused("28P01")).ok);
        assert!(!login_finding(Topic::AdminPassword, "r", refused("28000")).ok);
        let open = login_finding(Topic::AdminPassword, "r", LoginAnswer::LetIn);
        assert!(!open.ok && open.message.contains("pg_hba.conf"));
        let gone = Failure::new(FailureCode::DatabaseUnreachable, "gone");
        assert!(!login_finding(Topic::AdminPassword, "r", LoginAnswer::NoAnswer(gone)).ok);
    }
}
