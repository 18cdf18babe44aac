//! Revocations whose role was found on another server than the one that they name. The role is ended there. At the
//! address where the lease was made, that server has replaced the earlier one, so its results count from now on. At
//! another address it may be a copy, so the account on the lease's own server must still be ended.
//!
//! A second run finds the role absent. The dispatcher learns of the other server before the role is dropped there,
//! so that this absence counts.

use mayfly_common::broker::Address;
use mayfly_common::fault;
use mayfly_protocol::task::{Failure, FailureCode, Kind, Outcome, OutcomeResult, Place, Revoke};
use tracing::{debug, info};

use super::item::Item;
use crate::pg;
use crate::work::Engine;
use mayfly_protocol::revocation::Ended;

/// The results of the revocations of a batch. `None`: it must be done alone.
type Results = Vec<Option<Result<Ended, Failure>>>;

/// Ends those roles of a batch that were found on another server.
pub(super) async fn follow(engine: &Engine, batch: &[Item], mut results: Results) -> Results {
    let mut again = Vec::new();
    for (index, item) in batch.iter().enumerate() {
        if let Some(Some(Ok(Ended::Moved { server }))) = results.get(index)
            && let Some(there) = there(engine, item, server).await
        {
            again.push((index, there, item.is_conclusive()));
        }
    }
    if again.is_empty() {
        return results;
    }
    fault::point("revoke", "moved").await;
    let tasks: Vec<(&Revoke, bool)> = again.iter().map(|one| (&one.1, one.2)).collect();
    let ended = pg::revoke(&engine.servers, &tasks).await;
    for ((index, task, _), result) in again.iter().zip(ended) {
        if let Some(one) = results.get_mut(*index) {
            *one = result.map(|result| judged(task, result));
        }
    }
    results
}

/// Like [`follow`], for a revocation that was done alone.
pub(super) async fn follow_alone(
    engine: &Engine,
    item: &Item,
    result: Result<Ended, Failure>,
) -> Result<Ended, Failure> {
    let Ok(Ended::Moved { server }) = &result else {
        return result;
    };
    let Some(there) = there(engine, item, server).await else {
        return result;
    };
    let ended = pg::revoke_alone(&engine.servers, &there, item.is_conclusive()).await;
    judged(&there, ended)
}

/// The revocation for this server. `None`: the dispatcher could not be informed, so the revocation is tried again.
async fn there(engine: &Engine, item: &Item, server: &str) -> Option<Revoke> {
    if item.task.place == Some(Place::Own) && !report_found(engine, item, server).await {
        return None;
    }
    Some(Revoke {
        server: Some(server.to_owned()),
        ..item.task.clone()
    })
}

/// The part of the result that counts.
fn judged(task: &Revoke, result: Result<Ended, Failure>) -> Result<Ended, Failure> {
    match task.place {
        Some(Place::Own) => result,
        Some(Place::Other) | None => result.and_then(|ended| of_a_copy(task, ended)),
    }
}

/// Reports to the dispatcher that the role is on this server. Returns whether the broker has the message.
async fn report_found(engine: &Engine, item: &Item, server: &str) -> bool {
    let Item { task, held } = item;
    info!(lease = %task.lease, role = %task.role, server,
        "the account is on another server, which has replaced the one on which it was made; it is ended there");
    let body = Outcome {
        lease: task.lease,
        engine: engine.name.clone(),
        attempts: held.head.attempt.saturating_add(1),
        role: Some(task.role.clone()),
        found_at: Some(task.target.address()),
        result: OutcomeResult::Moved {
            server: server.to_owned(),
        },
        ticket: None,
        again_ms: None,
        others: vec![],
    };
    let trace = &held.head.traceparent;
    let sent = engine.send(
        Address::Outcomes,
        Kind::Outcome,
        Some(task.lease),
        trace,
        &body,
    );
    match sent.await {
        Ok(()) => true,
        Err(error) => {
            debug!(lease = %task.lease, %error, "the dispatcher does not know the other server yet");
            false
        }
    }
}

/// An end on a server at another address is not an end of the account on the lease's own server.
fn of_a_copy(task: &Revoke, ended: Ended) -> Result<Ended, Failure> {
    let what = match ended {
        Ended::NotTried | Ended::Moved { .. } => return Ok(Ended::NotTried),
        Ended::Dropped { .. } => "its account there is ended",
        Ended::Absent { .. } => "it no longer has such an account",
        Ended::NotDue { .. } => "its account there is not due",
    };
    Err(Failure::new(
        FailureCode::OtherServer,
        format!(
            "{}:{} is not the server on which role {} was made; {what}, which proves nothing about that server",
            task.target.host, task.target.port, task.role
        ),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    use jiff::Timestamp;
    use mayfly_protocol::fixtures::revocation;

    fn results() -> [Ended; 5] {
        let (at, server) = (Timestamp::UNIX_EPOCH, "s".to_owned());
        [
            Ended::Dropped {
                at,
                server: server.clone(),
                late_seconds: 1.0,
            },
            Ended::Absent {
                at,
                server: server.clone(),
            },
            Ended::NotDue {
                until: at,
                left: Duration::ZERO,
            },
            Ended::NotTried,
            Ended::Moved { server },
        ]
    }

    /// A server at the lease's own address has replaced the earlier server, and what it shows counts.
    #[test]
    fn what_the_successor_shows_counts() {
        let task = Revoke {
            place: Some(Place::Own),
            ..revocation()
        };
        for ended in results() {
            let word = ended.word();
            assert_eq!(judged(&task, Ok(ended)).unwrap().word(), word);
        }
    }

    /// A server at another address may be a copy. Its accounts are ended too, which proves nothing about the other.
    #[test]
    fn an_end_on_a_copy_is_no_end() {
        for place in [Some(Place::Other), None] {
            let task = Revoke {
                place,
                ..revocation()
            };
            for (ended, words) in results().into_iter().zip([
                Some("its account there is ended"),
                Some("it no longer has such an account"),
                Some("its account there is not due"),
                None,
                None,
            ]) {
                match (judged(&task, Ok(ended)), words) {
                    (Err(failure), Some(words)) => {
                        assert_eq!(failure.code, FailureCode::OtherServer);
                        assert!(failure.message.contains(words), "{failure:?}");
                    }
                    // The revocation is tried again.
                    (Ok(ended), None) => assert!(matches!(ended, Ended::NotTried), "{ended:?}"),
                    (found, words) => panic!("{place:?}: {found:?}, not {words:?}"),
                }
            }
            let away = Failure::new(FailureCode::DatabaseUnreachable, "x");
            assert_eq!(judged(&task, Err(away.clone())).unwrap_err(), away);
        }
    }
}
