//! Runs the statements of a grant role's plan. An object that fails does not keep the others from being
//! granted.

use std::time::Duration;

use mayfly_protocol::task::Failure;

use super::grant_plan::{Step, Thing};
use super::session::Session;
use super::sql::literal;
use super::sql_error::{LOCK_NOT_AVAILABLE, Meaning, SqlError, meaning};

/// Time limit of one transaction of grants.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(8);
/// After this number of locked objects, no other lock is waited for.
const WAITS: u32 = 3;

pub(super) const DOING: &str = "granting to the grant role";

/// An object that could not be granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) thing: Thing,
    pub(super) state: String,
    pub(super) message: String,
}

impl Failed {
    pub(super) fn meaning(&self) -> Meaning {
        meaning(&self.state)
    }

    pub(super) fn is_locked(&self) -> bool {
        self.state == LOCK_NOT_AVAILABLE
    }
}

/// Runs statements in one transaction. `lock` bounds the wait for each lock.
pub(super) async fn at_once(
    db: &Session<'_>,
    statements: &[String],
    lock: Duration,
) -> Result<(), SqlError> {
    let text = statements.join("; ");
    db.transact_within(STATEMENT_TIMEOUT, lock, &text)
        .await
        .map(|_| ())
}

/// Runs statements in one transaction, each in a subtransaction of its own, and returns those that failed. A failure
/// of the server, not of an object, fails the whole transaction.
///
/// # Errors
/// The transaction failed, and nothing was granted.
pub(super) async fn one_by_one(
    db: &Session<'_>,
    steps: Vec<Step>,
    lock: Duration,
) -> Result<Vec<Failed>, Failure> {
    let list = steps
        .iter()
        .map(|step| literal(&step.sql))
        .collect::<Vec<_>>()
        .join(", ");
    // A message of a database in SQL_ASCII may have any bytes. This form always arrives.
    let said = "translate(CASE WHEN getdatabaseencoding() = 'SQL_ASCII' \
         THEN regexp_replace(SQLERRM, '[^ -~]', '?', 'g') ELSE SQLERRM END, chr(10), ' ')";
    let body = format!(
        "DECLARE step text; n int := 0; waits int := 0; failed text := ''; BEGIN \
         FOREACH step IN ARRAY ARRAY[{list}]::text[] LOOP \
           n := n + 1; \
           BEGIN EXECUTE step; \
           EXCEPTION WHEN OTHERS THEN \
             IF left(SQLSTATE, 2) IN ('53', '57', '58', 'F0') THEN RAISE; END IF; \
             IF SQLSTATE = '{LOCK_NOT_AVAILABLE}' THEN \
               waits := waits + 1; \
               IF waits >= {WAITS} THEN PERFORM set_config('lock_timeout', '1', true); END IF; \
             END IF; \
             failed := failed || n || ' ' || SQLSTATE || ' ' || {said} || chr(10); \
           END; \
         END LOOP; \
         PERFORM set_config('mayfly.failed', failed, true); \
         END"
    );
    let text = format!(
        "DO {}; SELECT current_setting('mayfly.failed')",
        literal(&body)
    );
    let rows = db.transact_within(STATEMENT_TIMEOUT, lock, &text).await;
    let rows = rows.map_err(|error| error.into_failure(DOING))?;
    let answer = rows.first().map(|row| row.text(0)).unwrap_or_default();
    let failed = answer.lines().filter_map(|line| {
        let mut words = line.splitn(3, ' ');
        let n: usize = words.next()?.parse().ok()?;
        let state = words.next()?.to_owned();
        let message = words.next().unwrap_or_default().to_owned();
        let thing = steps.get(n.checked_sub(1)?)?.thing.clone();
        Some(Failed {
            thing,
            state,
            message,
        })
    });
    Ok(failed.collect())
}
