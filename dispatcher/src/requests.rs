//! Requests to an engine of a pool that are answered while the caller waits: renewals, sweeps and
//! the like. They go to the pool's create queue, and leave it at their deadline.

use std::time::Duration;

use mayfly_common::broker::{Address, Message};
use mayfly_common::names::{LeaseId, PoolName};
use mayfly_common::target::Target;
use mayfly_common::task::{FailureCode, HasTarget, Head, Kind, Ledger, Reply, ReplyResult, Sweep};
use mayfly_common::topology;
use serde::Serialize;

use crate::app::App;
use crate::authorities;
use crate::error::{ApiError, Code};
use crate::replies::Expected;
use crate::store::Pool;

/// How often the pool is looked at while an answer is awaited.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long an engine may take to say what it sees.
const LOOK_PATIENCE: Duration = Duration::from_secs(10);
/// A pool seen empty so often in a row has no engine.
const EMPTY_LOOKS: u32 = 2;

/// What is asked of an engine.
pub(crate) struct Request<'r, T> {
    /// What it is.
    pub(crate) kind: Kind,
    /// The lease it is about.
    pub(crate) lease: Option<LeaseId>,
    /// W3C Trace Context of the caller; may be empty.
    pub(crate) traceparent: &'r str,
    /// The sealed part.
    pub(crate) body: &'r T,
    /// How long the answer is waited for.
    pub(crate) patience: Duration,
}

/// Asks an engine of a pool. Its failures come back as the API's errors.
///
/// # Errors
/// `no_engine`, `broker_unavailable`, `deadline`, and what the engine says.
pub(crate) async fn ask<T: Serialize + Clone + HasTarget>(
    app: &App,
    pool: &Pool,
    request: Request<'_, T>,
) -> Result<ReplyResult, ApiError> {
    match answer(app, pool, request).await? {
        ReplyResult::Failed(failure) => Err(failure.into()),
        answer => Ok(answer),
    }
}

/// Asks an engine of a pool. Its failures are answers, too.
///
/// # Errors
/// `no_engine`, `broker_unavailable`, `deadline`.
pub(crate) async fn answer<T: Serialize + Clone + HasTarget>(
    app: &App,
    pool: &Pool,
    request: Request<'_, T>,
) -> Result<ReplyResult, ApiError> {
    let recipient = pool.recipient()?;
    match app.broker.engines_of(&pool.name).await {
        Ok(0) => return Err(ApiError::no_engine(&pool.name)),
        Ok(_) => {}
        Err(error) => return Err(ApiError::broker(&error)),
    }
    // By the clock that decides when nothing can come of it any more.
    let now = app.now();
    let head = Head {
        kind: request.kind,
        pool: pool.name.clone(),
        lease: request.lease,
        issued: now,
        deadline: Some(now + request.patience),
        attempt: 0,
        settling: false,
        traceparent: request.traceparent.to_owned(),
    };
    let name = answer_name(request.lease);
    let mut reply = app
        .replies
        .expect(request.kind, name.clone(), pool.name.clone(), pool.keys());
    let mut body = request.body.clone();
    let target = body.target_mut();
    *target = authorities::refer(app, &pool.name, &recipient, target.clone()).await;
    let body = app
        .seal_request(&head, &recipient, &body, reply.request())
        .map_err(|error| ApiError::broker(&error))?;
    app.broker
        .publish(Message {
            to: Address::Queue(topology::create_queue(&pool.name)),
            head,
            body,
            reply_as: Some(name),
            answers: None,
            expires: Some(request.patience),
        })
        .await
        .map_err(|error| ApiError::broker(&error))?;
    let reply = wait(app, &pool.name, &mut reply, request.patience).await?;
    heed(app, &pool.name, &reply.result);
    Ok(reply.result)
}

/// An engine that does not understand may lack the authorities that were only named.
pub(crate) fn heed(app: &App, pool: &PoolName, result: &ReplyResult) {
    if let ReplyResult::Failed(failure) = result
        && failure.code == FailureCode::NotUnderstood
    {
        app.authorities.forget(pool);
    }
}

/// What an engine of a pool sees behind an admin connection: the server's identity and its clock.
///
/// # Errors
/// See [`ask`].
pub(crate) async fn look_at_server(
    app: &App,
    pool: &Pool,
    target: &Target,
) -> Result<Ledger, ApiError> {
    let body = Sweep {
        installation: None,
        target: target.clone(),
        expired_for_seconds: None,
        after: None,
        limit: 1,
    };
    let request = Request {
        kind: Kind::Sweep,
        lease: None,
        traceparent: "",
        body: &body,
        patience: LOOK_PATIENCE,
    };
    match ask(app, pool, request).await? {
        ReplyResult::Ledger(ledger) => Ok(Ledger {
            server: ledger.server.replace('\0', "\u{fffd}"),
            ..ledger
        }),
        _ => Err(odd_answer()),
    }
}

/// The name an answer comes under. One about a lease begins with its id, which the answer's head
/// must have too.
fn answer_name(lease: Option<LeaseId>) -> String {
    let random = format!("{:032x}", rand::random::<u128>());
    lease.map_or_else(|| random.clone(), |lease| format!("{lease}/{random}"))
}

/// Whether an answer of this name may be about this lease.
pub(crate) fn may_answer(name: &str, lease: &LeaseId) -> bool {
    name.strip_prefix(&lease.to_string())
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// An answer that is none to what was asked.
pub(crate) fn odd_answer() -> ApiError {
    ApiError::new(Code::Deadline, "the answer was lost")
}

/// Waits for an engine's answer, as long as there is an engine, the broker, and time.
///
/// # Errors
/// `no_engine`, `broker_unavailable`, `deadline`.
pub(crate) async fn wait(
    app: &App,
    pool: &PoolName,
    reply: &mut Expected,
    patience: Duration,
) -> Result<Reply, ApiError> {
    let deadline = tokio::time::sleep(patience);
    tokio::pin!(deadline);
    let mut empty_looks = 0;
    loop {
        let look = async {
            tokio::time::sleep(LOOK_EVERY).await;
            app.broker.engines_of(pool).await
        };
        let engines = tokio::select! {
            biased;
            answer = reply.answer() => return answer.ok_or_else(odd_answer),
            () = &mut deadline => {
                return Err(ApiError::new(Code::Deadline, "no engine answered in time"));
            }
            engines = look => engines,
        };
        // The answer would come on the connection that was lost.
        match engines {
            Ok(0) => empty_looks += 1,
            Ok(_) => empty_looks = 0,
            Err(_) if app.broker.is_up() => {}
            Err(error) => return Err(ApiError::broker(&error)),
        }
        if empty_looks == EMPTY_LOOKS {
            return Err(ApiError::no_engine(pool));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_about_the_lease_it_is_named_for() {
        let (one, two) = (LeaseId::random(), LeaseId::random());
        let name = answer_name(Some(one));
        assert!(may_answer(&name, &one) && !may_answer(&name, &two));
        assert!(may_answer(&one.to_string(), &one));
        assert!(!may_answer(&format!("{one}x"), &one));
    }
}
