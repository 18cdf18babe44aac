//! Checks the connections to a server: whether a pooler shares sessions, and how many the admin may have.

use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, Finding, Topic};

use super::servers::Servers;
use super::session::Session;
use super::sql::ident;

/// How many times two connections are compared. A pooler can give the first connection's process to the second
/// connection only while no other client has it.
const LOOKS: usize = 3;
/// Number of connections that each engine needs: one for its work, a second to another database, and the kept
/// connection.
const EACH_ENGINE: i64 = 3;

/// Finds a pooler in transaction mode: the same server process serves a second connection that is opened while the
/// first is open.
pub(super) async fn pooler(
    servers: &Servers,
    home: &Session<'_>,
    target: &Target,
) -> Result<Option<Finding>, Failure> {
    let doing = "asking which process serves the connection";
    let query = "SELECT pg_backend_pid()";
    let Ok(other) = servers.session_beside(target, &target.database).await else {
        // Other findings report this failure.
        return Ok(None);
    };
    let mut is_shared = false;
    for _ in 0..LOOKS {
        let one = home.first_row(doing, query).await?;
        let two = other.first_row(doing, query).await?;
        is_shared |= one.get(0) == two.get(0);
    }
    other.release();
    Ok(is_shared.then(|| {
        Finding::bad(Topic::Pooler, "a transaction pooler stands between the engine and the server. Accounts are made, renewed and ended through it. But no connection of the server's is kept for revocations, so an account that takes every connection slot may delay its end; the engine's session settings, an empty search_path above all, reach other clients of this admin and database; and a wrong password of the admin may be reported as database_unreachable. Let the engine connect to the server directly; applications may still use the pooler",
        )
    }))
}

/// Checks the admin's connection limit.
pub(super) async fn limit(home: &Session<'_>, admin: &str) -> Result<Option<Finding>, Failure> {
    if home.facts().superuser {
        return Ok(None);
    }
    let query = "SELECT rolconnlimit FROM pg_catalog.pg_roles WHERE rolname = CURRENT_USER";
    let found = home
        .first_row("looking for the admin's connection limit", query)
        .await?;
    let limit: i64 = found.parse(0).unwrap_or(-1);
    if limit < 0 {
        return Ok(None);
    }
    let message = format!(
        "{admin} may have {limit} connections. Each engine needs 2 (one for its work, one that is kept for revocations), and one engine at a time needs a third"
    );
    Ok(Some(if limit >= EACH_ENGINE {
        Finding::good(Topic::AdminConnections, message)
    } else {
        let fix = format!("ALTER ROLE {} CONNECTION LIMIT 20;", ident(admin));
        Finding::bad(Topic::AdminConnections, message).with_fix([fix])
    }))
}
