//! Jobs that accounts have scheduled with pg_cron: they outlive the account, and at the next start of
//! the server a job whose role is gone ends the scheduler for everybody. They are unscheduled before
//! the account is dropped.
//!
//! pg_cron keeps them in one database, whose owner may plant objects that look like pg_cron's. So only members of
//! the extension are read or called there, and they must belong to a superuser: the owner of a database cannot make
//! this extension, or add to one that a superuser owns. The function must be that of the library.
//! <https://github.com/citusdata/pg_cron>

use std::collections::HashMap;
use std::time::{Duration, Instant};

use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use parking_lot::{Mutex, MutexGuard};
use tracing::{debug, info};

use super::due::Due;
use super::join::join_all;
use super::row::first_column;
use super::servers::Servers;
use super::session::Session;
use super::sql::literal;
use super::target_key::target_key;

/// How long the engine remembers which database has pg_cron.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// The databases with pg_cron by target, with the time when this was found.
#[derive(Default)]
pub(super) struct Schedulers(Mutex<HashMap<String, (Instant, Vec<String>)>>);

impl Schedulers {
    fn known(&self) -> MutexGuard<'_, HashMap<String, (Instant, Vec<String>)>> {
        self.0.lock()
    }
}

/// Finds the function that unschedules a job, if it and the table of jobs belong to pg_cron.
const GENUINE: &str = "SELECT 1 FROM pg_extension e JOIN pg_roles o ON o.oid = e.extowner AND o.rolsuper \
     JOIN pg_depend t ON t.refclassid = 'pg_extension'::regclass AND t.refobjid = e.oid AND t.deptype = 'e' AND t.classid = 'pg_class'::regclass \
     JOIN pg_class c ON c.oid = t.objid AND c.relname = 'job' AND c.relkind = 'r' AND c.relowner = o.oid \
     JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'cron' \
     JOIN pg_depend f ON f.refclassid = 'pg_extension'::regclass AND f.refobjid = e.oid AND f.deptype = 'e' AND f.classid = 'pg_proc'::regclass \
     JOIN pg_proc p ON p.oid = f.objid AND p.pronamespace = n.oid AND p.proname = 'unschedule' AND p.proowner = o.oid \
       AND p.pronargs = 1 AND p.proargtypes[0] = 'int8'::regtype AND p.prosrc = 'cron_unschedule' AND p.probin = '$libdir/pg_cron' \
     JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'c' \
     WHERE e.extname = 'pg_cron'";

/// Unschedules the jobs of accounts whose login is gone. If the database does not accept connections, the end is not
/// delayed: the scheduler cannot connect either.
///
/// # Errors
/// There is a job, and it could not be unscheduled.
pub(super) async fn unschedule(
    servers: &Servers,
    home: &Session<'_>,
    due: &[Due<'_>],
) -> Result<(), Failure> {
    let Some(one) = due.first() else {
        return Ok(());
    };
    let target = &one.task.target;
    for database in databases(servers, home, target).await {
        let Ok(db) = servers.session_of_server(target, &database).await else {
            continue;
        };
        let db = db.for_ends();
        let done = unschedule_in(home, &db, due).await;
        db.release();
        let jobs = done.map_err(|failure| Failure {
            message: format!("pg_cron in database {database:?}: {}", failure.message),
            ..failure
        })?;
        if jobs > 0 {
            info!(database, jobs, "unscheduled jobs of ended accounts");
        }
    }
    Ok(())
}

/// Finds the databases that may have pg_cron. If the admin may read all settings, it reads the name. Otherwise the
/// usual databases are searched.
async fn databases(servers: &Servers, home: &Session<'_>, target: &Target) -> Vec<String> {
    let key = target_key(target);
    {
        let mut known = servers.schedulers.known();
        known.retain(|_, (at, _)| at.elapsed() < KNOWN_FOR);
        if let Some((_, databases)) = known.get(&key) {
            return databases.clone();
        }
    }
    let setting = "SELECT pg_has_role(CURRENT_USER, 'pg_read_all_settings', 'USAGE'), \
         (SELECT setting FROM pg_settings WHERE name = 'cron.database_name')";
    let rows = match home.transact(setting).await {
        Ok(rows) => rows,
        Err(_) => return vec![],
    };
    let answer = rows.into_iter().next().unwrap_or_default();
    let candidates = match (answer.flag(0), answer.get(1)) {
        (_, Some(database)) => vec![database.to_owned()],
        (true, None) => vec![],
        _ if target.database == "postgres" => vec!["postgres".to_owned()],
        _ => vec!["postgres".to_owned(), target.database.clone()],
    };
    let (mut found, mut all) = (Vec::new(), true);
    for database in candidates {
        match servers.session_of_server(target, &database).await {
            Ok(db) => {
                match db.transact(GENUINE).await {
                    Ok(rows) if !rows.is_empty() => found.push(database),
                    Ok(_) => {}
                    Err(_) => all = false,
                }
                db.release();
            }
            Err(failure) => {
                debug!(
                    database,
                    reason = failure.message,
                    "could not find out whether pg_cron is installed"
                );
                // A missing slot is transient, so this database is tried again. A database that always refuses the
                // admin is not.
                all &= !failure.transient;
            }
        }
    }
    if all {
        let mut known = servers.schedulers.known();
        known.insert(key, (Instant::now(), found.clone()));
    }
    found
}

/// Unschedules the jobs in this database, and returns their number.
async fn unschedule_in(
    home: &Session<'_>,
    db: &Session<'_>,
    due: &[Due<'_>],
) -> Result<usize, Failure> {
    let doing = "unscheduling the account's jobs";
    let oids: Vec<String> = due.iter().map(|role| role.oid.to_string()).collect();
    let oids = oids.join(", ");
    // The extension is checked again in the same transaction, because it may have been dropped.
    let guard = format!("IF NOT EXISTS ({GENUINE}) THEN RETURN; END IF; ");
    let body = if db.facts().superuser {
        format!(
            "DECLARE job bigint; done int := 0; BEGIN {guard}\
             FOR job IN SELECT j.jobid FROM cron.job j JOIN pg_roles r ON r.rolname::text = j.username \
               WHERE r.oid IN ({oids}) LOOP \
               PERFORM cron.unschedule(job); done := done + 1; END LOOP; \
             PERFORM set_config('mayfly.jobs', done::text, true); END"
        )
    } else {
        // An admin that is no superuser neither sees nor unschedules the jobs of others.
        let may = format!(
            "SELECT r.oid FROM pg_roles r JOIN pg_namespace n ON n.nspname = 'cron' \
             WHERE r.oid IN ({oids}) AND has_schema_privilege(r.oid, n.oid, 'USAGE')"
        );
        let may = db.transact(&may).await;
        let may = may.map_err(|error| error.into_failure(doing))?;
        let may = first_column(&may);
        let those: Vec<Due<'_>> = due
            .iter()
            .filter(|role| may.contains(&role.oid.to_string()))
            .cloned()
            .collect();
        if those.is_empty() {
            return Ok(0);
        }
        let joined = join_all(home, &those).await;
        joined.map_err(|error| error.into_failure("joining the account"))?;
        format!(
            "DECLARE account oid; job bigint; done int := 0; BEGIN {guard}\
             SET LOCAL row_security = on; \
             FOREACH account IN ARRAY ARRAY[{}]::oid[] LOOP \
               EXECUTE 'SET LOCAL ROLE ' || account::regrole; \
               FOR job IN SELECT j.jobid FROM cron.job j WHERE j.username = CURRENT_USER LOOP \
                 PERFORM cron.unschedule(job); done := done + 1; END LOOP; \
               SET LOCAL ROLE NONE; \
             END LOOP; \
             PERFORM set_config('mayfly.jobs', done::text, true); END",
            may.join(", ")
        )
    };
    let text = format!(
        "DO {}; SELECT current_setting('mayfly.jobs', true)",
        literal(&body)
    );
    let rows = db.transact(&text).await;
    let rows = rows.map_err(|error| {
        let code = FailureCode::StatementFailed;
        Failure {
            code,
            ..error.into_failure(doing)
        }
    })?;
    Ok(rows.first().and_then(|row| row.parse(0)).unwrap_or(0))
}
