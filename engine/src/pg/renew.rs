//! Moving a role's end. Renewals and revocations write the same row of `pg_authid`, so of two at
//! once one gets XX000 and looks again: a renewal wins whole or not at all.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::fault;
use mayfly_common::task::{Failure, FailureCode, Renew};

use super::door::place;
use super::session::Servers;
use super::sql::{ident, lease_comment, literal, moment, parse_moment};

/// Tries against others that write the same row.
const TRIES: u32 = 5;
/// SQLSTATE of our own guards (class `MF` is nobody's).
const OVER: &str = "MF003";
const BEYOND: &str = "MF004";

/// Moves `VALID UNTIL` forward and gives it. A role that ends later already is left as it is.
///
/// # Errors
/// `expired` where the role is gone, has no login any more or is past its end;
/// `beyond_maximum`; and as any statement. After a lost connection it may have been done.
pub(crate) async fn renew(servers: &Servers, task: &Renew) -> Result<Timestamp, Failure> {
    let mut tries = 0;
    loop {
        tries += 1;
        let home = servers.home_or_postgres(&task.target).await?;
        let facts = home.facts();
        if task
            .server
            .as_ref()
            .is_some_and(|known| *known != facts.identity)
        {
            return Err(Failure::new(
                FailureCode::OtherServer,
                format!(
                    "{} is now another server than the one role {} was made on",
                    place(&task.target),
                    task.role
                ),
            ));
        }
        let error = match home.transact(&statements(task)).await {
            Ok(rows) => {
                fault::point("renew", "committed").await;
                servers.want_one(&task.target);
                let until = rows
                    .last()
                    .and_then(|row| row.first().cloned().flatten())
                    .and_then(|text| parse_moment(&text));
                home.release();
                return until.ok_or_else(|| over(task));
            }
            Err(error) => error,
        };
        let again = error.is_passing() || (error.is_lost() && !home.is_fresh());
        match error.code() {
            OVER => return Err(over(task)),
            BEYOND => {
                return Err(Failure::new(
                    FailureCode::BeyondMaximum,
                    format!(
                        "the lease's maximum is at {}; a renewal can reach no further",
                        task.not_after
                    ),
                ));
            }
            _ if again && tries < TRIES => tokio::time::sleep(Duration::from_millis(20)).await,
            _ => return Err(error.into_failure("moving the account's end")),
        }
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
           EXECUTE {alter} || quote_literal(until::text); \
           {look}\
           IF NOT FOUND OR NOT role.rolcanlogin THEN \
             RAISE EXCEPTION 'over' USING ERRCODE = '{OVER}'; END IF; \
         END IF; END",
        increment = task.increment_seconds,
        not_after = literal(&task.not_after.to_string()),
        alter = literal(&format!(
            "ALTER ROLE {} VALID UNTIL ",
            ident(task.role.as_str())
        )),
    );
    format!(
        "DO {}; SELECT {} FROM pg_roles WHERE rolname = {name}",
        literal(&body),
        moment("rolvaliduntil")
    )
}
