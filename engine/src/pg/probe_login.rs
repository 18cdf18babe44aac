//! Tests a login with a wrong password: a server that accepts it does not require passwords.

use mayfly_common::pg_connect::Login;
use mayfly_protocol::names::random_text;
use mayfly_protocol::pg_login::Rule;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};

use super::connect::{connect, limit_for};
use super::hosts::Hosts;
use super::limits::server_name;
use super::refused::{Refused, silent};

/// A server's answer to a login.
#[derive(Debug)]
pub(super) enum LoginAnswer {
    /// The server accepts the login.
    LetIn,
    /// The server refuses the login, with this SQLSTATE and message.
    Refused { state: String, words: String },
    /// There was no answer, or none about the login.
    NoAnswer(Failure),
}

/// Tries a login and nothing more. If one of several hosts accepts the login, that is the result. Otherwise it is
/// the answer of the first host that refuses. Use it only with a password that no role has.
pub(super) async fn probe_login(hosts: &Hosts, target: &Target, database: &str) -> LoginAnswer {
    let silence = |reason: String| {
        LoginAnswer::NoAnswer(Failure::new(FailureCode::DatabaseUnreachable, reason))
    };
    let rule = Rule {
        is_trial: true,
        ..Rule::of(target)
    };
    let (endpoints, login) = match (target.endpoints(), Login::new(target, rule)) {
        (Ok(endpoints), Ok(login)) => (endpoints, login),
        (Err(reason), _) => return silence(format!("host: {reason}")),
        (_, Err(reason)) => return silence(format!("{}: {reason}", server_name(target))),
    };
    let limit = limit_for(&endpoints);
    let mut answer = silence(format!("{}: no host", server_name(target)));
    for endpoint in &endpoints {
        let trying = connect(hosts, target, endpoint, database, &login, None);
        let said = match tokio::time::timeout(limit, trying).await {
            Ok(Ok(_)) => return LoginAnswer::LetIn,
            // The server looks for the database after the login.
            Ok(Err(refused)) if refused.failure.code == FailureCode::NoSuchObject => {
                return LoginAnswer::LetIn;
            }
            Ok(Err(Refused {
                state: Some(state),
                failure,
                ..
            })) if failure.code == FailureCode::DatabaseRefusedLogin => LoginAnswer::Refused {
                state: state.code().to_owned(),
                words: failure.message,
            },
            Ok(Err(refused)) => LoginAnswer::NoAnswer(refused.failure),
            Err(_) => LoginAnswer::NoAnswer(silent(endpoint, limit).failure),
        };
        if matches!(answer, LoginAnswer::NoAnswer(_)) {
            answer = said;
        }
    }
    answer
}

/// The same admin with a random, wrong password.
pub(super) fn wrong_password(target: &Target) -> Target {
    Target {
        password: Secret::new(random_text(32)),
        ..target.clone()
    }
}
