//! What holds a role back from being dropped: objects it owns and privileges it holds, in any
//! database of the server. Objects go to a powerless quarantine role (never to a privileged one:
//! triggers and views would run as it), to the role the operator named, or away.

use mayfly_protocol::grant::OwnedObjects;
use mayfly_protocol::names::InstallationId;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use tokio_postgres::error::SqlState;
use tracing::{info, warn};

use super::new_owner::{Unfit, unfit};
use super::own_role::find_or_make;
use super::revoke::Due;
use super::row::{Row, first_column};
use super::servers::Servers;
use super::session::Session;
use super::sql::{NOT_UTF8, ident, literal, moment, quarantine_comment, short_hash, shown};
use super::sql_error::{LOCK_NOT_AVAILABLE, SqlError};

/// Objects named in a message, at most.
const OBJECTS_IN_A_MESSAGE: usize = 10;

/// Makes the admin a member of a role, which is what ending its sessions and giving its objects
/// away take. A superuser needs none.
pub(super) async fn join(home: &Session<'_>, role: &str) -> Result<(), SqlError> {
    let facts = home.facts();
    if facts.superuser {
        return Ok(());
    }
    let options = membership_options(facts.version);
    home.transact(&format!("GRANT {} TO CURRENT_USER{options}", ident(role)))
        .await
        .map(drop)
}

/// [`join`] for the accounts that are due, in one go.
pub(super) async fn join_all(home: &Session<'_>, due: &[Due<'_>]) -> Result<(), SqlError> {
    let facts = home.facts();
    if facts.superuser || due.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = due
        .iter()
        .map(|role| ident(role.task.role.as_str()))
        .collect();
    let text = format!(
        "GRANT {} TO CURRENT_USER{}",
        names.join(", "),
        membership_options(facts.version)
    );
    home.transact(&text).await.map(drop)
}

/// A membership by which the admin may do as the role, and act for it.
fn membership_options(version: u32) -> &'static str {
    match version {
        16.. => " WITH INHERIT TRUE, SET TRUE",
        _ => "",
    }
}

/// Takes away everything in every database that holds the role back.
///
/// # Errors
/// What could not be taken away; the role then stays, without a login.
pub(super) async fn detach(
    servers: &Servers,
    home: &Session<'_>,
    role: &Due<'_>,
) -> Result<(), Failure> {
    let doing = "clearing up after the account";
    let prepared = format!(
        "SELECT gid, database FROM pg_prepared_xacts WHERE owner = {} ORDER BY prepared",
        literal(role.task.role.as_str())
    );
    let prepared = home
        .transact(&prepared)
        .await
        .map_err(|e| e.into_failure(doing))?;
    if let Some(row) = prepared.first() {
        let message = format!(
            "the account's prepared transaction {:?} in database {:?} holds it; end it with COMMIT PREPARED or ROLLBACK PREPARED",
            said(row, 0),
            said(row, 1)
        );
        let named = prepared.iter().take(OBJECTS_IN_A_MESSAGE).map(|row| {
            format!(
                "prepared transaction {:?} in database {:?}",
                said(row, 0),
                said(row, 1)
            )
        });
        return Err(Failure {
            objects: named.collect(),
            ..Failure::new(FailureCode::StatementFailed, message)
        });
    }
    join(home, role.task.role.as_str())
        .await
        .map_err(|e| e.into_failure("joining the account"))?;
    let new_owner = choose_new_owner(home, role).await?;
    open_own_databases(home, role)
        .await
        .map_err(|e| e.into_failure("opening the account's databases"))?;
    // Rows of shared objects (databases, tablespaces) have no database of their own.
    let databases = format!(
        "SELECT DISTINCT d.datname, d.oid FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid OR (s.dbid = 0 AND d.datname = current_database()) \
         WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = {} ORDER BY 1",
        role.oid
    );
    let databases = home
        .transact(&databases)
        .await
        .map_err(|e| e.into_failure(doing))?;
    let (mut held, mut objects) = (None, Vec::new());
    for row in &databases {
        let (Some(database), shown) = (row.get(0), said(row, 0)) else {
            continue;
        };
        match detach_in(servers, &role.task.target, database, role, &new_owner).await {
            Ok(()) => {
                info!(role = %role.task.role, database, new_owner = new_owner.name, "cleared up after an account");
            }
            // Dropped meanwhile, and with it what held the role.
            Err(failure) if failure.code == FailureCode::NoSuchObject => {}
            // The others can be cleared up all the same.
            Err(failure) => {
                let message = format!(
                    "{doing} in database {shown:?} (oid {}): {}",
                    said(row, 1),
                    failure.message
                );
                objects.push(format!("database {shown:?} (oid {})", said(row, 1)));
                held.get_or_insert(Failure::new(failure.code, message));
            }
        }
    }
    objects.truncate(OBJECTS_IN_A_MESSAGE);
    match held {
        Some(failure) => Err(Failure { objects, ..failure }),
        None => Ok(()),
    }
}

/// A column for a message.
fn said(row: &Row, n: usize) -> &str {
    shown(row.text(n))
}

/// Lets connections into the databases that the account made: it may have closed them, and what is in
/// them holds it back.
async fn open_own_databases(home: &Session<'_>, role: &Due<'_>) -> Result<(), SqlError> {
    let closed = format!(
        "SELECT datname FROM pg_database WHERE datdba = {} AND (NOT datallowconn OR datconnlimit >= 0)",
        role.oid
    );
    let closed = home.transact(&closed).await?;
    for database in first_column(&closed)
        .into_iter()
        .filter(|name| name != NOT_UTF8)
    {
        let open = format!(
            "ALTER DATABASE {} WITH ALLOW_CONNECTIONS true CONNECTION LIMIT -1",
            ident(&database)
        );
        match home.transact(&open).await {
            Err(error) if error.code() != "3D000" => return Err(error),
            // Or it was dropped meanwhile.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

async fn detach_in(
    servers: &Servers,
    target: &Target,
    database: &str,
    role: &Due<'_>,
    new_owner: &NewOwner,
) -> Result<(), Failure> {
    let db = servers.session_beside(target, database).await?.for_ends();
    // By its oid: in a database of another encoding it may be called otherwise.
    let owner = role.oid.to_string();
    if role.task.owned_objects == OwnedObjects::Drop {
        // Databases are not dropped: they get the new owner.
        let mut text = vec![drop_owned(&owner)];
        text.extend(give_away(&db, &owner, new_owner));
        match db.transact(&text.join("; ")).await {
            Ok(_) => {
                db.release();
                return Ok(());
            }
            // Something of somebody else's rests on it: that is not ours to take along.
            Err(error) if error.is(&[SqlState::DEPENDENT_OBJECTS_STILL_EXIST]) => {
                warn!(role = %role.task.role, database, new_owner = new_owner.name, "what the account owned is used by others; it was not dropped");
            }
            Err(error) => return Err(error.into_failure("dropping what it owned")),
        }
    }
    let mut text = give_away(&db, &owner, new_owner);
    if new_owner.name == quarantine_name(&role.task.installation, &target.username) {
        text.push(without_security_definer(&new_owner.name));
    }
    text.push(drop_owned(&owner));
    db.transact(&text.join("; "))
        .await
        .map_err(|e| e.into_failure("giving away what it owned"))?;
    db.release();
    Ok(())
}

fn drop_owned(owner: &str) -> String {
    format!("DO 'BEGIN EXECUTE ''DROP OWNED BY '' || {owner}::oid::regrole; END'")
}

/// Statements that give all that a role owns in this database to the new_owner. `owner` is an expression
/// for the role's oid. A new owner needs CREATE on the schemas concerned; where it may not create
/// yet, it may for the moment of the change.
pub(super) fn give_away(db: &Session<'_>, owner: &str, new_owner: &NewOwner) -> Vec<String> {
    let body = format!(
        "DECLARE owner regrole := {owner}; new_owner regrole := {new_owner}; place name; places name[]; BEGIN \
         IF NOT {superuser} THEN places := ARRAY({schemas}); END IF; \
         FOREACH place IN ARRAY coalesce(places, '{{}}') LOOP \
           EXECUTE format('GRANT CREATE ON SCHEMA %I TO %s', place, new_owner); END LOOP; \
         EXECUTE format('REASSIGN OWNED BY %s TO %s', owner, new_owner); \
         FOREACH place IN ARRAY coalesce(places, '{{}}') LOOP \
           EXECUTE format('REVOKE CREATE ON SCHEMA %I FROM %s', place, new_owner); END LOOP; END",
        new_owner = new_owner.oid,
        superuser = db.facts().superuser,
        schemas = owning_schemas(owner, new_owner.oid),
    );
    vec![format!("DO {}", literal(&body))]
}

/// Makes the functions of the quarantine role run with the rights of whoever calls them: what is in
/// quarantine must not be a way to the rest of it.
pub(super) fn without_security_definer(quarantine: &str) -> String {
    let body = format!(
        "DECLARE routine regprocedure; BEGIN \
         FOR routine IN SELECT oid FROM pg_proc WHERE prosecdef AND proowner = {}::regrole LOOP \
           EXECUTE format('ALTER ROUTINE %s SECURITY INVOKER', routine); END LOOP; END",
        literal(&ident(quarantine))
    );
    format!("DO {}", literal(&body))
}

/// Schemas in which the role owns something and its new_owner may not create yet. Where it may, the
/// right is its own, and must not be taken away after the change.
fn owning_schemas(owner: &str, new_owner: u32) -> String {
    let owned = [
        ("pg_class", "relnamespace", "relowner"),
        ("pg_proc", "pronamespace", "proowner"),
        ("pg_type", "typnamespace", "typowner"),
        ("pg_operator", "oprnamespace", "oprowner"),
        ("pg_opclass", "opcnamespace", "opcowner"),
        ("pg_opfamily", "opfnamespace", "opfowner"),
        ("pg_collation", "collnamespace", "collowner"),
        ("pg_conversion", "connamespace", "conowner"),
        ("pg_ts_config", "cfgnamespace", "cfgowner"),
        ("pg_ts_dict", "dictnamespace", "dictowner"),
        ("pg_statistic_ext", "stxnamespace", "stxowner"),
    ]
    .map(|(catalog, schema, column)| {
        format!("SELECT {schema} FROM {catalog} WHERE {column} = {owner}")
    })
    .join(" UNION ");
    format!(
        "SELECT nspname FROM pg_namespace WHERE oid IN ({owned}) AND nspname !~ '^pg_(toast|temp)' \
         AND NOT has_schema_privilege({new_owner}, oid, 'CREATE') ORDER BY 1"
    )
}

/// Who gets what an account owned.
pub(super) struct NewOwner {
    pub(super) name: String,
    oid: u32,
}

/// The role of this name as an new_owner.
async fn new_owner_named(home: &Session<'_>, name: String) -> Result<NewOwner, Failure> {
    let doing = "looking for the new owner";
    let query = format!(
        "SELECT oid FROM pg_roles WHERE rolname = {}",
        literal(&name)
    );
    let rows = home.transact(&query).await;
    let rows = rows.map_err(|error| error.into_failure(doing))?;
    let oid = rows.first().and_then(|row| row.parse(0));
    let oid = oid.ok_or_else(|| Failure::new(FailureCode::StatementFailed, doing))?;
    Ok(NewOwner { name, oid })
}

/// Who gets what the account owned.
async fn choose_new_owner(home: &Session<'_>, role: &Due<'_>) -> Result<NewOwner, Failure> {
    if let OwnedObjects::ReassignTo(named) = &role.task.owned_objects {
        let why_not = unfit(home, named).await?.map(|unfit| match unfit {
            Unfit::Absent => "it does not exist",
            Unfit::Privileged => "it is privileged",
            Unfit::NotMember => "the admin is not a member of it",
        });
        match why_not {
            None => return new_owner_named(home, named.clone()).await,
            Some(reason) => {
                warn!(role = %role.task.role, owner = named, reason, "what the account owned goes to quarantine instead");
            }
        }
    }
    quarantine(home, &role.task.installation, &role.task.target.username).await
}

/// The name of the quarantine role of an installation and admin.
pub(super) fn quarantine_name(installation: &InstallationId, admin: &str) -> String {
    format!(
        "mayfly_quarantine_{}",
        short_hash(&[&installation.to_string(), admin])
    )
}

/// The quarantine role of this installation and admin, made where it is not there.
pub(super) async fn quarantine(
    home: &Session<'_>,
    installation: &InstallationId,
    admin: &str,
) -> Result<NewOwner, Failure> {
    let name = quarantine_name(installation, admin);
    let comment = quarantine_comment(installation);
    let doing = "making the quarantine role";
    find_or_make(home, &name, "NOINHERIT", &comment, doing).await?;
    join(home, &name).await.map_err(|e| e.into_failure(doing))?;
    new_owner_named(home, name).await
}

/// Says who is in the way of a statement that waited for a lock in vain.
pub(super) async fn held_by(home: &Session<'_>, error: SqlError, doing: &str) -> Failure {
    if error.code() != LOCK_NOT_AVAILABLE {
        return error.into_failure(doing);
    }
    let holding = "SELECT l.pid, l.virtualtransaction FROM pg_locks l WHERE l.granted AND (l.locktype = 'object' AND l.classid = 'pg_authid'::regclass \
         OR l.locktype = 'relation' AND l.relation IN ('pg_authid'::regclass, 'pg_auth_members'::regclass, 'pg_shdepend'::regclass, 'pg_shdescription'::regclass) \
         AND l.mode ~ 'Exclusive')";
    let query = format!(
        "WITH holding AS ({holding}) \
         SELECT CASE WHEN a.usename = CURRENT_USER AND a.application_name LIKE 'mayfly%' THEN 'ours' ELSE 'session' END, \
             a.pid::text, coalesce(a.usename, ''), {since} FROM pg_stat_activity a \
           WHERE a.pid <> pg_backend_pid() AND a.pid IN (SELECT pid FROM holding) \
         UNION ALL SELECT 'prepared', p.gid, p.database, {prepared} FROM pg_prepared_xacts p \
           WHERE EXISTS (SELECT 1 FROM holding h JOIN pg_locks own ON own.virtualtransaction = h.virtualtransaction \
             WHERE h.pid IS NULL AND own.pid IS NULL AND own.transactionid = p.transaction) \
         ORDER BY 4 LIMIT {OBJECTS_IN_A_MESSAGE}",
        since = moment("a.xact_start"),
        prepared = moment("p.prepared"),
    );
    let mut rows = home.transact(&query).await.unwrap_or_default();
    // A session of Mayfly's own comes and goes, and holds other roles: it is the culprit only where
    // there is no other.
    if rows.iter().any(|row| row.text(0) != "ours") {
        rows.retain(|row| row.text(0) != "ours");
    }
    let holders: Vec<String> = rows
        .iter()
        .map(|row| {
            let (name, of, since) = (said(row, 1), said(row, 2), said(row, 3));
            match said(row, 0) {
                "prepared" => format!(
                    "prepared transaction {name:?} in database {of:?} (end it with COMMIT PREPARED or ROLLBACK PREPARED)"
                ),
                _ => format!("session {name} of {of:?}, whose transaction began at {since}"),
            }
        })
        .collect();
    let by = match holders.is_empty() {
        true => "another transaction".to_owned(),
        false => holders.join("; "),
    };
    Failure {
        objects: holders,
        ..Failure::new(
            FailureCode::StatementFailed,
            format!("{doing}: the account is held by {by} (SQLSTATE {LOCK_NOT_AVAILABLE})"),
        )
    }
}

/// Says what still holds a role back.
pub(super) async fn explain(home: &Session<'_>, role: &Due<'_>, error: SqlError) -> Failure {
    let query = format!(
        "SELECT coalesce(d.datname, ''), CASE WHEN s.dbid = 0 OR d.datname = current_database() \
         THEN pg_describe_object(s.classid, s.objid, s.objsubid) ELSE s.classid::regclass::text || ' ' || s.objid END, s.deptype \
         FROM pg_shdepend s LEFT JOIN pg_database d ON d.oid = s.dbid \
         WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = {} ORDER BY 1, 2 LIMIT {}",
        role.oid,
        OBJECTS_IN_A_MESSAGE + 1
    );
    let mut failure = error.into_failure("dropping the role");
    let Ok(rows) = home.transact(&query).await else {
        return failure;
    };
    let mut objects: Vec<String> = rows
        .iter()
        .map(|row| {
            let how = if row.text(2) == "o" {
                "owner of"
            } else {
                "privileges on"
            };
            match said(row, 0) {
                "" => format!("{how} {}", said(row, 1)),
                database => format!("{how} {} in database {database}", said(row, 1)),
            }
        })
        .collect();
    let are_more = objects.len() > OBJECTS_IN_A_MESSAGE;
    objects.truncate(OBJECTS_IN_A_MESSAGE);
    failure.objects.clone_from(&objects);
    if are_more {
        objects.push("and more".to_owned());
    }
    if !objects.is_empty() {
        failure
            .message
            .push_str(&format!("; still: {}", objects.join("; ")));
    }
    failure
}
