//! Names what prevents the end of an account, for the failure that an operator reads.

use mayfly_protocol::task::{Failure, FailureCode};

use super::due::Due;
use super::row::Row;
use super::session::Session;
use super::sql::{shown, timestamp_text};
use super::sql_error::{LOCK_NOT_AVAILABLE, SqlError};

/// Maximum number of objects named in a message.
pub(super) const OBJECTS_IN_A_MESSAGE: usize = 10;

/// Names the session that holds a lock for which a statement waited.
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
        since = timestamp_text("a.xact_start"),
        prepared = timestamp_text("p.prepared"),
    );
    let rows = home.transact(&query).await.unwrap_or_default();
    held_by_these(holders(&rows), doing)
}

/// Describes sessions and prepared transactions, from rows of their kind, name, owner and begin. A session of Mayfly
/// is short and holds other roles, so it is named only if there is no other.
fn holders(rows: &[Row]) -> Vec<String> {
    let others = rows.iter().any(|row| row.text(0) != "ours");
    rows.iter()
        .filter(|row| !others || row.text(0) != "ours")
        .map(|row| {
            let (name, of, since) = (cell(row, 1), cell(row, 2), cell(row, 3));
            match row.text(0) {
                "prepared" => format!(
                    "prepared transaction {name:?} in database {of:?} (end it with COMMIT PREPARED or ROLLBACK PREPARED)"
                ),
                _ => format!("session {name} of {of:?}, whose transaction began at {since}"),
            }
        })
        .collect()
}

fn held_by_these(holders: Vec<String>, doing: &str) -> Failure {
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

/// Names what still prevents the drop of a role.
pub(super) async fn explain(home: &Session<'_>, role: &Due<'_>, error: SqlError) -> Failure {
    let query = format!(
        "SELECT coalesce(d.datname, ''), CASE WHEN s.dbid = 0 OR d.datname = current_database() \
         THEN pg_describe_object(s.classid, s.objid, s.objsubid) ELSE s.classid::regclass::text || ' ' || s.objid END, s.deptype \
         FROM pg_shdepend s LEFT JOIN pg_database d ON d.oid = s.dbid \
         WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = {} ORDER BY 1, 2 LIMIT {}",
        role.oid,
        OBJECTS_IN_A_MESSAGE + 1
    );
    let failure = error.into_failure("dropping the role");
    match home.transact(&query).await {
        Ok(rows) => with_objects(failure, &rows),
        Err(_) => failure,
    }
}

/// Adds the objects to a failure, from rows of their database, description and kind of dependency.
fn with_objects(mut failure: Failure, rows: &[Row]) -> Failure {
    let mut objects: Vec<String> = rows
        .iter()
        .map(|row| {
            let how = match row.text(2) {
                "o" => "owner of",
                _ => "privileges on",
            };
            match cell(row, 0) {
                "" => format!("{how} {}", cell(row, 1)),
                database => format!("{how} {} in database {database}", cell(row, 1)),
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

/// The failure if a prepared transaction of the account holds it and the admin may not end that transaction. The
/// rows have its name and database.
pub(super) fn prepared(rows: &[Row]) -> Option<Failure> {
    let first = rows.first()?;
    let message = format!(
        "the account's prepared transaction {:?} in database {:?} holds it; end it with COMMIT PREPARED or ROLLBACK PREPARED",
        cell(first, 0),
        cell(first, 1)
    );
    let named = rows.iter().take(OBJECTS_IN_A_MESSAGE).map(|row| {
        format!(
            "prepared transaction {:?} in database {:?}",
            cell(row, 0),
            cell(row, 1)
        )
    });
    Some(Failure {
        objects: named.collect(),
        ..Failure::new(FailureCode::StatementFailed, message)
    })
}

/// A column as text for a message.
pub(super) fn cell(row: &Row, n: usize) -> &str {
    shown(row.text(n))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn row(cells: [&str; 4]) -> Row {
        Row::from(cells.map(Some))
    }

    #[test]
    fn a_session_of_ours_is_named_only_if_there_is_no_other() {
        let ours = row(["ours", "1", "mayfly", "now"]);
        let theirs = row(["session", "2", "bob", "today"]);
        let prepared = row(["prepared", "gid", "app", "today"]);
        assert!(holders(&[]).is_empty());
        assert_eq!(
            holders(std::slice::from_ref(&ours)),
            ["session 1 of \"mayfly\", whose transaction began at now"]
        );
        let named = holders(&[ours, theirs, prepared]);
        assert_eq!(named.len(), 2);
        assert!(named[0].starts_with("session 2 of \"bob\""));
        assert!(named[1].contains("ROLLBACK PREPARED"));
        let failure = held_by_these(vec![], "dropping it");
        assert!(
            failure
                .message
                .contains("by another transaction (SQLSTATE 55P03)")
        );
        assert_eq!(held_by_these(named.clone(), "dropping it").objects, named);
    }

    #[test]
    fn what_holds_a_role_back_is_named_up_to_a_limit() {
        let failure = || Failure::new(FailureCode::StatementFailed, "dropping the role");
        assert_eq!(with_objects(failure(), &[]).message, "dropping the role");
        let two = [
            Row::from([Some(""), Some("database app"), Some("o")]),
            Row::from([Some("app"), Some("table t"), Some("a")]),
        ];
        let named = with_objects(failure(), &two);
        assert_eq!(
            named.objects,
            [
                "owner of database app",
                "privileges on table t in database app"
            ]
        );
        let many = vec![two[1].clone(); OBJECTS_IN_A_MESSAGE + 1];
        let named = with_objects(failure(), &many);
        assert_eq!(named.objects.len(), OBJECTS_IN_A_MESSAGE);
        assert!(named.message.ends_with("; and more"));
    }

    #[test]
    fn a_prepared_transaction_is_named_with_its_database() {
        assert!(prepared(&[]).is_none());
        let rows = vec![Row::from([Some("gid"), None]); OBJECTS_IN_A_MESSAGE + 2];
        let failure = prepared(&rows).unwrap();
        assert!(failure.message.contains("\"gid\""));
        assert_eq!(failure.objects.len(), OBJECTS_IN_A_MESSAGE);
    }
}
