//! Checks what accounts could do to their server: take its connection slots and, up to PostgreSQL 15, leave
//! objects behind as their grant role.

use mayfly_protocol::grant::Grant;
use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::{Connections, Failure, Finding, Topic};

use super::session::Session;
use super::sql::{ident, literal, readable};

/// Maximum number of schemas named in a message.
const SCHEMAS: usize = 10;

/// Compares the connections that accounts may take with those of the server. If the server is full, revocations use
/// connections that are reserved for the admin, or the kept connection of each engine.
pub(super) async fn connections(
    home: &Session<'_>,
    admin: &str,
    asked: Option<Connections>,
) -> Result<Finding, Failure> {
    let facts = home.facts();
    let query = "SELECT pg_catalog.current_setting('max_connections'), pg_catalog.current_setting('superuser_reserved_connections'), \
         coalesce(pg_catalog.current_setting('reserved_connections', true), '0'), \
         coalesce((SELECT pg_catalog.pg_has_role(oid, 'USAGE') FROM pg_catalog.pg_roles WHERE rolname = 'pg_use_reserved_connections'), false)";
    let limits = home
        .first_row("comparing the limits of connections", query)
        .await?;
    let limits = Limits {
        most: limits.parse(0).unwrap_or(0),
        for_superusers: limits.parse(1).unwrap_or(0),
        reserved: limits.parse(2).unwrap_or(0),
        may_use_reserved: limits.flag(3),
        version: facts.version,
        superuser: facts.superuser,
    };
    Ok(limits.finding(admin, asked))
}

/// The connection limits of a server, and which of them apply to the admin.
struct Limits {
    /// Connections of the server (`max_connections`).
    most: u64,
    /// Connections that are reserved for superusers (`superuser_reserved_connections`).
    for_superusers: u64,
    /// Connections that are reserved for a role (`reserved_connections`); 0 up to PostgreSQL 15.
    reserved: u64,
    may_use_reserved: bool,
    version: u32,
    superuser: bool,
}

impl Limits {
    /// Connections that any role may take.
    fn free(&self) -> u64 {
        self.most
            .saturating_sub(self.for_superusers + self.reserved)
    }

    /// Whether the admin gets a connection when accounts have taken all the free ones.
    fn admin_gets_in(&self) -> bool {
        match self.superuser {
            true => self.for_superusers > 0,
            false => self.reserved > 0 && self.may_use_reserved,
        }
    }

    fn finding(&self, admin: &str, asked: Option<Connections>) -> Finding {
        let topic = Topic::Connections;
        let (free, most) = (self.free(), self.most);
        let way_in = match (self.admin_gets_in(), self.superuser) {
            (true, true) => format!(
                "{} are reserved for superusers, as {admin} is one",
                self.for_superusers
            ),
            (true, false) => format!("{admin} may use {} reserved ones", self.reserved),
            (false, _) => "if the server is full, the engine uses the one connection that it keeps while accounts exist there".to_owned(),
        };
        let Some(Connections { each, accounts }) = asked else {
            return Finding::good(
                topic,
                format!("{free} of {most} connections are not reserved; {way_in}"),
            );
        };
        let all = match (each, accounts) {
            (None, _) => {
                "an account may take all of them (connectionLimit is \"unlimited\")".to_owned()
            }
            (Some(each), Some(accounts)) => format!(
                "maxLeases allows {accounts} accounts, which may take {} connections, {each} each",
                u64::from(each).saturating_mul(accounts)
            ),
            (Some(each), None) => format!(
                "an account may take {each} connections, so {} accounts may take all of them",
                free.div_ceil(u64::from(each.max(1)))
            ),
        };
        let message = format!("{free} of {most} connections are not reserved; {all}; {way_in}");
        let one_takes_all = each.is_none_or(|each| u64::from(each) >= free);
        if self.admin_gets_in() || !one_takes_all {
            return Finding::good(topic, message);
        }
        if self.version < 16 {
            let words =
                format!("{message}. Set connectionLimit below {free}, or raise max_connections");
            return Finding::bad(topic, words);
        }
        let words = format!(
            "{message}. Set connectionLimit below {free}, or reserve some: reserved_connections = 5 in postgresql.conf, a restart, and the GRANT"
        );
        let fix = format!("GRANT pg_use_reserved_connections TO {};", ident(admin));
        Finding::bad(topic, words).with_fix([fix])
    }
}

/// Checks whether accounts of a secret may create objects, up to PostgreSQL 15. There they can create them as their
/// grant role (`SET ROLE`), and such objects outlive the account.
pub(super) async fn may_create(
    db: &Session<'_>,
    group: Option<&RoleName>,
    grants: &[Grant],
) -> Result<Option<Finding>, Failure> {
    let version = db.facts().version;
    if version >= 16 {
        return Ok(None);
    }
    // Privileges of the grant role itself, or of the roles that it will be a member of.
    let roles: Vec<String> = group
        .map(ToString::to_string)
        .into_iter()
        .chain(grants.iter().filter_map(Grant::role).map(str::to_owned))
        .map(|role| literal(&role))
        .collect();
    let by_role = |privilege: &str| match roles.as_slice() {
        [] => "false".to_owned(),
        roles => format!(
            "EXISTS (SELECT 1 FROM pg_catalog.pg_roles r WHERE r.rolname IN ({}) AND {privilege})",
            roles.join(", ")
        ),
    };
    let query = format!(
        "SELECT pg_catalog.string_agg(what, ', '), \
           pg_catalog.string_agg(fix, ' ') FROM (\
           SELECT 'schema ' || {shown} AS what, \
             CASE WHEN open THEN 'REVOKE CREATE ON SCHEMA ' || {shown} || ' FROM PUBLIC;' END AS fix \
           FROM pg_catalog.pg_namespace n, LATERAL (SELECT EXISTS (SELECT 1 FROM \
             pg_catalog.aclexplode(coalesce(n.nspacl, pg_catalog.acldefault('n', n.nspowner))) a \
             WHERE a.grantee = 0 AND a.privilege_type = 'CREATE') AS open) o \
           WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND (open OR {in_schema}) \
           UNION ALL SELECT 'the database', NULL FROM pg_catalog.pg_database d \
           WHERE d.datname = pg_catalog.current_database() AND {in_database} \
           ORDER BY 1 LIMIT {SCHEMAS}) found",
        shown = readable("pg_catalog.quote_ident(n.nspname)"),
        in_schema = by_role("pg_catalog.has_schema_privilege(r.oid, n.oid, 'CREATE')"),
        in_database = by_role("pg_catalog.has_database_privilege(r.oid, d.oid, 'CREATE')"),
    );
    let found = db
        .first_row("looking where accounts may create objects", &query)
        .await?;
    let mut places: Vec<String> = found.get(0).map(str::to_owned).into_iter().collect();
    places.extend(
        grants
            .iter()
            .filter(|grant| grant.creates())
            .map(|grant| format!("{grant}")),
    );
    if places.is_empty() {
        return Ok(None);
    }
    let fix = found.get(1).map(str::to_owned);
    let message = format!(
        "accounts may create objects ({}). On PostgreSQL {version} they may do so as their grant role, with all privileges of the secret. Such objects go to the quarantine role when an account ends; until then others may use them. Revoke CREATE, or upgrade to 16 or later",
        places.join("; ")
    );
    Ok(Some(
        Finding::bad(Topic::CreateObjects, message).with_fix(fix.into_iter().collect::<Vec<_>>()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(version: u32) -> Limits {
        Limits {
            most: 100,
            for_superusers: 3,
            reserved: 0,
            may_use_reserved: false,
            version,
            superuser: false,
        }
    }

    #[test]
    fn an_account_that_can_take_all_connections_is_bad_unless_the_admin_gets_in() {
        let each = |each| Connections {
            each,
            accounts: None,
        };
        let reserved = |may_use_reserved| Limits {
            reserved: 5,
            may_use_reserved,
            ..limits(16)
        };
        let superuser = Limits {
            superuser: true,
            ..limits(16)
        };
        for (limits, asked, ok, fixes) in [
            (limits(15), None, true, 0),
            (limits(15), Some(each(Some(96))), true, 0),
            (limits(15), Some(each(Some(97))), false, 0),
            (limits(15), Some(each(None)), false, 0),
            (limits(16), Some(each(None)), false, 1),
            (reserved(false), Some(each(Some(92))), false, 1),
            (reserved(true), Some(each(None)), true, 0),
            (superuser, Some(each(None)), true, 0),
        ] {
            let found = limits.finding("me", asked);
            assert_eq!((found.ok, found.fix.len()), (ok, fixes), "{found:?}");
        }
    }
}
