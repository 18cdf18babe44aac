//! Waits until a server's replicas have replayed a commit, for callers who log in there at once. Only replicas that
//! report their replay position to the primary count. Replicas of replicas, backups, logical subscribers and WAL
//! receivers are not seen.

use std::time::Duration;

use mayfly_common::arrival::Arrival;
use mayfly_protocol::task::{Create, Failure, FailureCode};
use mayfly_protocol::timing::timing;
use tracing::{debug, warn};

use super::notes::Notes;
use super::row::first_column;
use super::servers::Servers;
use super::session::Session;
use super::sql::literal;
use super::sql_error::SqlError;

/// The part of the create's budget that is reserved for the answer.
const KEEP: Duration = Duration::from_millis(500);
/// First pause between two looks: 5 ms, doubling, at most 200 ms.
const LOOK_FIRST: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_millis(200);

/// Checks whether the admin sees what replicas have replayed. This is asked before the role is made, so that the
/// first issue reports a missing right, whether there are replicas or not.
///
/// # Errors
/// `admin_lacks_rights`, with the statement that helps.
pub(super) async fn may_look(home: &Session<'_>) -> Result<(), Failure> {
    let rows = home
        .transact("SELECT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'), quote_ident(current_user)")
        .await
        .map_err(|error| error.into_failure("checking whether the admin may see replicas"))?;
    let answer = rows.into_iter().next().unwrap_or_default();
    if answer.flag(0) {
        return Ok(());
    }
    Err(Failure::new(
        FailureCode::AdminLacksRights,
        format!(
            "waitForReplicas needs the right to see what replicas have replayed: GRANT pg_monitor TO {}",
            answer.text(1)
        ),
    ))
}

/// Waits until every replica has the present commits, for as long as the task requests and its budget allows. The
/// caller gets the account in any case.
pub(crate) async fn wait_for_replicas(
    servers: &Servers,
    task: &Create,
    arrived: Arrival,
    notes: &mut Notes,
) {
    let Some(seconds) = task.wait_for_replicas else {
        return;
    };
    let left = (timing().create_budget - KEEP).saturating_sub(arrived.elapsed());
    let limit = left.min(Duration::from_secs(seconds.into()));
    let behind = match tokio::time::timeout(limit, caught_up(servers, task)).await {
        Ok(Ok(())) => return,
        Ok(Err(failure)) => failure.message,
        Err(_) => format!("not done within {} s", limit.as_secs_f32()),
    };
    notes.retries.push("replica_lag");
    warn!(role = %task.role, reason = behind, "the credential was given out before every replica has the account");
}

async fn caught_up(servers: &Servers, task: &Create) -> Result<(), Failure> {
    let failed = |error: SqlError| error.into_failure("looking at the replicas");
    let home = servers.session(&task.target, &task.target.database).await?;
    let rows = home
        .transact("SELECT pg_current_wal_lsn()")
        .await
        .map_err(failed)?;
    let committed = first_column(&rows).into_iter().next();
    let committed = committed.ok_or_else(|| {
        Failure::new(
            FailureCode::StatementFailed,
            "the server does not report its WAL position",
        )
    })?;
    let behind = format!(
        "SELECT count(*) FROM pg_stat_replication r WHERE state = 'streaming' AND replay_lsn < {}::pg_lsn \
         AND NOT EXISTS (SELECT 1 FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')",
        literal(&committed)
    );
    let mut pause = LOOK_FIRST;
    loop {
        let rows = home.transact(&behind).await.map_err(failed)?;
        let count: Option<u64> = rows.first().and_then(|row| row.parse(0));
        if count == Some(0) {
            home.release();
            return Ok(());
        }
        debug!(count, committed, "replicas lag behind");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_MAX);
    }
}
