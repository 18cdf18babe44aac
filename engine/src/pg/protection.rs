//! Findings about attackers between the engine and a server, and about what they could learn.

use mayfly_protocol::pg_login::Method;
use mayfly_protocol::target::{Endpoint, SslMode, Target};
use mayfly_protocol::task::{Failure, Finding, Topic};

use super::session::Session;

/// Whether engine and server are on the same machine: nobody is between them.
pub(super) fn is_local(target: &Target) -> bool {
    let endpoints = target.endpoints().unwrap_or_default();
    !endpoints.is_empty() && endpoints.iter().all(Endpoint::is_on_this_machine)
}

/// The finding about how the admin's password is used.
pub(super) fn login(target: &Target, method: Method) -> Finding {
    let is_verified = target.sslmode == SslMode::VerifyFull;
    match method {
        Method::Scram | Method::ScramPlus => Finding::good(Topic::Login, method.to_string()),
        // The trial with a wrong password shows whether the server really needs no password.
        Method::None => Finding::good(Topic::Login, method.to_string()),
        Method::Password | Method::Md5 => Finding::new(
            Topic::Login,
            is_verified || is_local(target),
            format!(
                "{method}, which `auth` of the base secret allows: an attacker between engine and server, or in place of the server, can use it to log in. Make the server's line of pg_hba.conf scram-sha-256, set the password again, and remove `auth`; or use sslmode verify-full"
            ),
        ),
    }
}

/// The finding about the protection of the connection.
pub(super) async fn tls(home: &Session<'_>, target: &Target) -> Result<Finding, Failure> {
    let query = "SELECT ssl, version, cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let tls = home
        .first_row("reading the connection's protection", query)
        .await?;
    let is_local = is_local(target);
    let advice = if is_local {
        ""
    } else {
        ". Use sslmode verify-full. If the engine's machine does not trust the authority, give its certificate as sslrootcert"
    };
    Ok(match (tls.flag(0), target.sslmode) {
        (true, SslMode::VerifyFull) => Finding::good(
            Topic::Tls,
            format!("{} {}, the server verified", tls.text(1), tls.text(2)),
        ),
        (true, _) => {
            let known = match &target.sslrootcert {
                Some(_) => "the certificate's chain verified, not its name",
                None => "the server not verified",
            };
            Finding::new(
                Topic::Tls,
                is_local,
                format!("{} {}, {known}{advice}", tls.text(1), tls.text(2)),
            )
        }
        (false, SslMode::Disable) => Finding::new(
            Topic::Tls,
            is_local,
            format!("none, because of sslmode disable{advice}"),
        ),
        (false, _) => Finding::new(
            Topic::Tls,
            is_local,
            format!("none: the server offers no TLS{advice}"),
        ),
    })
}
