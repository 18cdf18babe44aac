//! Moves a role's end. Renewals and revocations write the same row of `pg_authid`. If two run at the same time, one
//! of them gets XX000 and looks again. So a renewal happens completely or not at all.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::fault;
use mayfly_protocol::task::{Failure, FailureCode, Place, Renew, Renewed};

use super::moved::other_server;
use super::row::Row;
use super::servers::Servers;
use super::sql::{ident, lease_comment, literal, timestamp_text};
use super::sql_error::SqlError;
use super::uncommitted::working_on;

/// Maximum number of tries if other sessions write the same row.
const TRIES: u32 = 5;
/// SQLSTATE of Mayfly's own guards. PostgreSQL does not use the class `MF`.
const OVER: &str = "MF003";
const BEYOND: &str = "MF004";
const MOVED: &str = "MF005";

/// Moves `VALID UNTIL` forward and returns it. A role that already ends later is not changed. A role with another
/// end than the request names is not changed either, so a recorded request that is sent again moves nothing.
///
/// # Errors
/// `expired` if the role is gone, has lost its login or is past its end; `beyond_maximum`; and the errors of any
/// statement. If the connection was lost, the end may have been moved.
pub(crate) async fn renew(servers: &Servers, task: &Renew) -> Result<Renewed, Failure> {
    let mut tries = 0;
    loop {
        tries += 1;
        let home = match servers.home_for(&task.target, false).await {
            // The account itself may have taken every slot. It must still be renewed.
            Err(failure) if failure.full => match servers.kept_session(&task.target).await {
                Some(home) => home,
                None => servers.home_or_postgres(&task.target).await?,
            },
            found => found?,
        };
        let facts = home.facts();
        let is_other = task
            .server
            .as_ref()
            .is_some_and(|known| *known != facts.identity);
        // At the address of the earlier server the role's comment decides. At another address the role may belong to
        // a copy.
        if is_other && task.place != Some(Place::Own) {
            return Err(other_server(&task.target, task.role.as_str()));
        }
        let error = match home.transact(&statements(task)).await {
            Ok(rows) => {
                fault::point("renew", "committed").await;
                servers.want_one(&task.target);
                let until = last_timestamp(&rows);
                home.release();
                return until.map(Renewed::Until).ok_or_else(|| over(task));
            }
            Err(error) => error,
        };
        let step = step(&error, home.is_fresh(), tries);
        if step == Step::ReadEnd {
            let rows = home.transact(&end_of(task)).await;
            home.give_up().await;
            let rows = rows.map_err(|e| e.into_failure("looking at the account's end"))?;
            let moved = last_timestamp(&rows).map(Renewed::Moved);
            return moved.ok_or_else(|| over(task));
        }
        home.give_up().await;
        match step {
            Step::Over if is_other => return Err(other_server(&task.target, task.role.as_str())),
            Step::Over => return Err(over(task)),
            Step::Beyond => {
                return Err(Failure::new(
                    FailureCode::BeyondMaximum,
                    format!(
                        "the lease's maximum is {}; a renewal cannot exceed it",
                        task.not_after
                    ),
                ));
            }
            Step::Again => tokio::time::sleep(Duration::from_millis(20)).await,
            Step::ReadEnd | Step::Fail => {
                return Err(error.into_failure("moving the account's end"));
            }
        }
    }
}

/// What follows an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The end was moved meanwhile. The new end is read and reported.
    ReadEnd,
    /// The account is gone or at its end.
    Over,
    Beyond,
    Again,
    Fail,
}

/// The step after an error of a try. `is_fresh`: the connection was opened for this try. An older connection may have
/// been lost before the try.
fn step(error: &SqlError, is_fresh: bool, tries: u32) -> Step {
    match error.code() {
        MOVED => Step::ReadEnd,
        OVER => Step::Over,
        BEYOND => Step::Beyond,
        _ if tries >= TRIES => Step::Fail,
        _ if error.is_transient() || (error.is_lost() && !is_fresh) => Step::Again,
        _ => Step::Fail,
    }
}

fn over(task: &Renew) -> Failure {
    Failure::new(
        FailureCode::Expired,
        format!(
            "account {} has ended or is being ended; read the secret for a new one",
            task.role
        ),
    )
}

fn statements(task: &Renew) -> String {
    let name = literal(task.role.as_str());
    let look = format!(
        "SELECT rolcanlogin, rolvaliduntil INTO role FROM pg_roles \
         WHERE rolname = {name} AND shobj_description(oid, 'pg_authid') = {}; ",
        literal(&lease_comment(&task.installation, &task.lease))
    );
    let body = format!(
        "DECLARE role record; until timestamptz; \
         BEGIN {look}\
         IF NOT FOUND OR NOT role.rolcanlogin OR role.rolvaliduntil <= clock_timestamp() THEN \
           RAISE EXCEPTION 'over' USING ERRCODE = '{OVER}'; END IF; \
         until := clock_timestamp() + interval '{increment} seconds'; \
         IF until > {not_after}::timestamptz THEN \
           RAISE EXCEPTION 'beyond the maximum' USING ERRCODE = '{BEYOND}'; END IF; \
         IF until > role.rolvaliduntil THEN \
           {unmoved}\
           EXECUTE {alter} || quote_literal(until::text); \
           {look}\
           IF NOT FOUND OR NOT role.rolcanlogin THEN \
             RAISE EXCEPTION 'over' USING ERRCODE = '{OVER}'; END IF; \
         END IF; END",
        increment = task.increment_seconds,
        unmoved = task.from.map_or_else(String::new, |from| format!(
            // The dispatcher stores milliseconds.
            "IF role.rolvaliduntil >= {}::timestamptz + interval '1 millisecond' THEN \
               RAISE EXCEPTION 'moved meanwhile' USING ERRCODE = '{MOVED}'; END IF; ",
            literal(&from.to_string())
        )),
        not_after = literal(&task.not_after.to_string()),
        alter = literal(&format!(
            "ALTER ROLE {} VALID UNTIL ",
            ident(task.role.as_str())
        )),
    );
    format!(
        "SET LOCAL application_name = {}; DO {}; {}",
        literal(&working_on(&task.lease)),
        literal(&body),
        end_of(task)
    )
}

/// The query for the role's end.
fn end_of(task: &Renew) -> String {
    format!(
        "SELECT {} FROM pg_roles WHERE rolname = {}",
        timestamp_text("rolvaliduntil"),
        literal(task.role.as_str())
    )
}

fn last_timestamp(rows: &[Row]) -> Option<Timestamp> {
    rows.last()?.timestamp(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let deadlock = SqlError::for_tests(Some("40P01"), false);
        let others = SqlError::for_tests(Some("XX000"), false);
        let standby = SqlError::for_tests(Some("25006"), false);
        let lost = SqlError::for_tests(None, true);
        let rights = SqlError::for_tests(Some("42501"), false);
        for (error, is_fresh, tries, expected) in [
            // A revocation changed the same row of `pg_authid`.
            (&others, true, 1, Step::Again),
            (&deadlock, true, 4, Step::Again),
            (&deadlock, true, 5, Step::Fail),
            // The renewal may have been done on a connection that broke during it.
            (&lost, true, 1, Step::Fail),
            (&lost, false, 4, Step::Again),
            (&lost, false, 5, Step::Fail),
            // After a failover an old connection leads to a standby.
            (&standby, false, 1, Step::Again),
            (&standby, true, 1, Step::Fail),
            (&rights, false, 1, Step::Fail),
        ] {
            assert_eq!(
                step(error, is_fresh, tries),
                expected,
                "{error:?} {is_fresh} {tries}"
            );
        }
    }

    /// What the statement found is final, in the last try too.
    #[test]
    fn our_own_states_are_understood() {
        for (state, expected) in [
            ("MF003", Step::Over),
            ("MF004", Step::Beyond),
            ("MF005", Step::ReadEnd),
            // A SQLSTATE of another statement of Mayfly.
            ("MF001", Step::Fail),
        ] {
            for tries in [1, TRIES] {
                assert_eq!(
                    step(&SqlError::for_tests(Some(state), false), false, tries),
                    expected,
                    "{state}"
                );
            }
        }
    }
}
