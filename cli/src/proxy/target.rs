//! The server of a lease: its hosts, and how a connection to it is protected, as the base secret says.

use std::sync::Arc;

use mayfly_common::tls;
use mayfly_protocol::authorities::Authorities;
use mayfly_protocol::pg_login::Rule;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::{SslMode, Target, endpoints};
use serde_json::Value;
use tokio::sync::Semaphore;

use super::upstream::{Account, HASHING};
use crate::client::Api;
use crate::failure::Failure;
use crate::keeper::Lease;
use crate::protection::{self, Protection};

/// Asks the dispatcher. If it is of an earlier version, the defaults are used, which bind the login to a TLS
/// connection.
pub(super) async fn protection(api: &Api, path: &str) -> Result<Protection, Failure> {
    let known = protection::ask(api, path).await?;
    Ok(known.unwrap_or_default())
}

/// The account of a lease.
///
/// # Errors
/// What the answer lacks, or what is wrong with the certificates.
pub(super) fn account(lease: &Lease, protection: &Protection) -> Result<Account, String> {
    let text = |name: &str| {
        let value = lease.answer.pointer(&format!("/data/{name}"));
        value
            .and_then(Value::as_str)
            .map(str::to_owned)
            .ok_or_else(|| format!("the answer does not have data.{name}"))
    };
    let port = lease.answer.pointer("/data/port").and_then(Value::as_u64);
    let port = port
        .and_then(|port| u16::try_from(port).ok())
        .ok_or("the answer does not have data.port")?;
    let host = text("host")?;
    let endpoints = endpoints(&host, port).map_err(|why| format!("data.host {why}"))?;
    let sslmode = protection
        .sslmode
        .unwrap_or_else(|| SslMode::default_for(&endpoints));
    let target = Target {
        host,
        port,
        database: text("database")?,
        username: text("username")?,
        password: Secret::new(text("password")?),
        sslmode,
        auth: protection.auth,
        channel_binding: protection.channel_binding,
        sslrootcert: protection.sslrootcert.clone().map(Authorities::Pem),
        sslcert: None,
        sslkey: None,
    };
    Ok(Account {
        endpoints,
        rule: Rule::of(&target),
        tls: match sslmode {
            SslMode::Disable => None,
            SslMode::Prefer | SslMode::Require | SslMode::VerifyFull => {
                Some(Arc::new(tls::client_config(&target)?))
            }
        },
        database: target.database,
        hashing: Semaphore::new(HASHING),
        user: target.username,
        password: target.password,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::pg_login::ChannelBinding;
    use serde_json::json;
    use tokio::time::Instant;

    fn of(host: &str, protection: Value) -> Result<Account, String> {
        let answer = json!({"data": {"leaseId": "l", "ttl": 60, "host": host, "port": 5432,
            "database": "app", "username": "u", "password": "p"}});
        let lease = Lease::of("db:app", answer, None, Instant::now()).unwrap();
        account(&lease, &serde_json::from_value(protection).unwrap())
    }

    #[test]
    fn the_protection_is_that_of_the_secret_or_the_default_for_the_host() {
        for (host, protection, mode) in [
            ("db.example", json!({}), SslMode::Require),
            ("127.0.0.1", json!({}), SslMode::Prefer),
            (
                "db.example",
                json!({"sslmode": "disable"}),
                SslMode::Disable,
            ),
            (
                "db1,db2:1",
                json!({"sslmode": "require", "auth": "md5", "new": 1}),
                SslMode::Require,
            ),
        ] {
            let account = of(host, protection).unwrap();
            assert_eq!(account.rule.sslmode, mode, "{host}");
            assert_eq!(account.tls.is_some(), mode != SslMode::Disable);
        }
        let bound = of("db.example", json!({})).unwrap().rule.binding();
        assert_eq!(bound, ChannelBinding::Require);
        let wrong = of("db", json!({"sslmode": "verify-full", "sslrootcert": "x"}));
        assert!(wrong.err().unwrap().contains("sslrootcert"));
        assert!(of("", json!({})).err().unwrap().contains("data.host"));
    }
}
