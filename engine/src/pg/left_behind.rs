//! Objects that accounts leave to their grant role. Up to PostgreSQL 15 an account may `SET ROLE` to its grant role,
//! and objects that it then makes belong to the grant role. They remain after the account, and a `SECURITY DEFINER`
//! function runs for everybody with the privileges of the secret. So they are given to the quarantine role, without
//! `SECURITY DEFINER`. The grant role keeps its privileges. On 16 and later accounts may not `SET ROLE`.
//!
//! The engine looks for such objects when an account is ended, and at each sweep. A second run finds nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use mayfly_protocol::names::InstallationId;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use tracing::warn;

use super::dependencies::{self, Held};
use super::due::Due;
use super::give_away::{give_away, without_security_definer};
use super::join::join;
use super::new_owner::quarantine;
use super::row::first_column;
use super::servers::Servers;
use super::session::Session;
use super::sql::{grant_prefix, ident, literal};

/// Maximum time for which the end of accounts waits for this.
const SOON: Duration = Duration::from_secs(1);
/// Maximum number of objects named in the log.
const OBJECTS: usize = 10;

/// Moves the objects of the installation's grant roles to the quarantine role. A failure is logged and tried
/// again at the next sweep; it does not prevent the end of an account.
pub(super) async fn take_away(
    servers: &Servers,
    home: &Session<'_>,
    target: &Target,
    installation: &InstallationId,
) {
    if home.facts().version >= 16 {
        return;
    }
    let owners = match owners(home, installation, None).await {
        Ok(owners) => owners,
        Err(failure) => {
            return warn!(
                reason = failure.message,
                "the objects that grant roles own could not be listed"
            );
        }
    };
    empty_all(servers, home, target, installation, &owners).await;
}

/// Like [`take_away`], for accounts that are due and for a short time. The sweep does what takes longer, for example
/// if a database refuses connections.
pub(super) async fn take_away_soon(servers: &Servers, home: &Session<'_>, due: &[Due<'_>]) {
    let Some(one) = due.first() else { return };
    if home.facts().version >= 16 {
        return;
    }
    let oids: Vec<u32> = due.iter().map(|role| role.oid).collect();
    let (target, installation) = (&one.task.target, &one.task.installation);
    let Ok(roles) = owners(home, installation, Some(&oids)).await else {
        return;
    };
    if roles.is_empty() {
        return;
    }
    let emptying = async {
        // This work does not use the connection of the batch, which must continue even if this work fails.
        match servers.session_of_server(target, &target.database).await {
            Ok(own) => {
                let own = own.for_ends();
                empty_all(servers, &own, target, installation, &roles).await;
                own.release();
            }
            Err(failure) => warn!(
                reason = failure.message,
                "grant roles still own objects that accounts left"
            ),
        }
    };
    if tokio::time::timeout(SOON, emptying).await.is_err() {
        warn!(
            ?roles,
            "the next sweep moves objects of grant roles to the quarantine role"
        );
    }
}

async fn empty_all(
    servers: &Servers,
    home: &Session<'_>,
    target: &Target,
    installation: &InstallationId,
    roles: &[String],
) {
    for role in roles {
        if let Err(failure) = empty(servers, home, target, installation, role).await {
            warn!(
                role,
                reason = failure.message,
                "a grant role still owns objects that an account left; the next sweep tries again"
            );
        }
    }
}

/// Grant roles that own something.
async fn owners(
    home: &Session<'_>,
    installation: &InstallationId,
    accounts: Option<&[u32]>,
) -> Result<Vec<String>, Failure> {
    let prefix = literal(&grant_prefix(installation));
    let owns = "EXISTS (SELECT 1 FROM pg_shdepend s WHERE s.refclassid = 'pg_authid'::regclass \
                AND s.refobjid = g.oid AND s.deptype = 'o')";
    let query = match accounts {
        // The grant roles are found by the accounts' memberships, so the cost does not depend on the number of
        // accounts.
        Some(oids) => {
            let oids: Vec<String> = oids.iter().map(u32::to_string).collect();
            format!(
                "SELECT g.rolname FROM (SELECT DISTINCT m.roleid FROM pg_auth_members m WHERE m.member IN ({})) held \
                 JOIN pg_roles g ON g.oid = held.roleid \
                 WHERE starts_with(shobj_description(g.oid, 'pg_authid'), {prefix}) AND {owns} ORDER BY 1",
                oids.join(", ")
            )
        }
        None => format!(
            "SELECT g.rolname FROM pg_roles g JOIN pg_shdescription d ON d.objoid = g.oid AND d.classoid = 'pg_authid'::regclass \
             WHERE starts_with(d.description, {prefix}) AND {owns} ORDER BY 1"
        ),
    };
    names(home, &query, "looking for objects of grant roles").await
}

/// The first column of the rows.
async fn names(home: &Session<'_>, query: &str, doing: &str) -> Result<Vec<String>, Failure> {
    let rows = home
        .transact(query)
        .await
        .map_err(|error| error.into_failure(doing))?;
    Ok(first_column(&rows))
}

/// Gives everything a grant role owns to the quarantine role, in every database.
async fn empty(
    servers: &Servers,
    home: &Session<'_>,
    target: &Target,
    installation: &InstallationId,
    role: &str,
) -> Result<(), Failure> {
    let doing = "giving objects to the quarantine role";
    let owner = format!("{}::regrole", literal(&ident(role)));
    join(home, role)
        .await
        .map_err(|error| error.into_failure("joining the grant role"))?;
    let new_owner = quarantine(home, installation, &target.username).await?;
    let databases = dependencies::databases(home, &owner, Held::Owned).await;
    let databases = databases.map_err(|error| error.into_failure(doing))?;
    for database in first_column(&databases) {
        let db = match servers.session_beside(target, &database).await {
            Ok(db) => db,
            // The database was dropped meanwhile, together with the objects.
            Err(failure) if failure.code == FailureCode::NoSuchObject => continue,
            Err(failure) => return Err(failure),
        };
        let named = format!(
            "SELECT pg_describe_object(classid, objid, objsubid) FROM pg_shdepend \
             WHERE refclassid = 'pg_authid'::regclass AND refobjid = {owner} AND deptype = 'o' \
             AND dbid IN (0, (SELECT oid FROM pg_database WHERE datname = current_database())) ORDER BY 1 LIMIT {OBJECTS}",
        );
        let objects = names(&db, &named, doing).await?;
        let text = [
            no_default_privileges(role),
            no_user_mappings(role),
            give_away(&owner, &new_owner, db.facts().superuser),
            without_security_definer(&new_owner.name),
        ];
        db.transact(&text.join("; "))
            .await
            .map_err(|error| error.into_failure(doing))?;
        db.release();
        servers
            .quarantined
            .fetch_add(objects.len() as u64, Ordering::Relaxed);
        warn!(
            role,
            database,
            new_owner = new_owner.name,
            objects = objects.join("; "),
            "objects that an account left to its grant role now belong to the quarantine role"
        );
    }
    Ok(())
}

/// Resets a role's default privileges. `REASSIGN OWNED` does not change them, and `DROP OWNED` would also remove the
/// role's privileges.
fn no_default_privileges(role: &str) -> String {
    let body = format!(
        "DECLARE d record; head text; grantee oid; BEGIN \
         FOR d IN SELECT a.defaclacl, n.nspname, CASE a.defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' \
             WHEN 'f' THEN 'FUNCTIONS' WHEN 'T' THEN 'TYPES' WHEN 'n' THEN 'SCHEMAS' END AS kind \
           FROM pg_default_acl a LEFT JOIN pg_namespace n ON n.oid = a.defaclnamespace WHERE a.defaclrole = {text}::regrole LOOP \
           head := 'ALTER DEFAULT PRIVILEGES FOR ROLE ' || {text} || \
             CASE WHEN d.nspname IS NULL THEN '' ELSE format(' IN SCHEMA %I', d.nspname) END; \
           FOR grantee IN SELECT DISTINCT a.grantee FROM aclexplode(d.defaclacl) a LOOP \
             EXECUTE format('%s REVOKE ALL ON %s FROM %s', head, d.kind, \
               CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END); \
           END LOOP; \
           IF d.nspname IS NULL THEN \
             EXECUTE format('%s GRANT ALL ON %s TO %s', head, d.kind, {text}); \
             IF d.kind IN ('FUNCTIONS', 'TYPES') THEN \
               EXECUTE format('%s GRANT ALL ON %s TO PUBLIC', head, d.kind); END IF; \
           END IF; \
         END LOOP; END",
        text = literal(&ident(role)),
    );
    format!("DO {}", literal(&body))
}

/// Drops a role's user mappings, if the admin may.
fn no_user_mappings(role: &str) -> String {
    let body = format!(
        "DECLARE server name; BEGIN \
         FOR server IN SELECT srvname FROM pg_user_mappings WHERE umuser = {text}::regrole LOOP \
           BEGIN EXECUTE format('DROP USER MAPPING IF EXISTS FOR %s SERVER %I', {text}, server); \
           EXCEPTION WHEN insufficient_privilege THEN NULL; END; \
         END LOOP; END",
        text = literal(&ident(role)),
    );
    format!("DO {}", literal(&body))
}
