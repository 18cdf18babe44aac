//! Requests to an engine of a pool that are answered while the caller waits: renewals, sweeps and
//! the like. They go to the pool's create queue, and leave it at their deadline.

use std::time::Duration;

use mayfly_common::broker::{Address, Message};
use mayfly_common::names::{LeaseId, PoolName};
use mayfly_common::target::Target;
use mayfly_common::task::{
    Failure, FailureCode, Head, Kind, Ledger, Reply, ReplyResult, Request, Sweep,
};
use mayfly_common::topology;

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

/// Has any engine of a pool meet a request, and gives its answer. `traceparent` is the caller's (W3C
/// Trace Context); it may be empty. The answer is waited for no longer than `patience`.
///
/// # Errors
/// `no_engine`, `broker_unavailable`, `deadline`, and what the engine says.
pub(crate) async fn call<R: Request>(
    app: &App,
    pool: &Pool,
    request: &R,
    traceparent: &str,
    patience: Duration,
) -> Result<R::Answer, ApiError> {
    let answer = try_call(app, pool, request, traceparent, patience).await?;
    answer.map_err(ApiError::from)
}

/// [`call`], where the engine's failure is an answer, too.
///
/// # Errors
/// `no_engine`, `broker_unavailable`, `deadline`.
pub(crate) async fn try_call<R: Request>(
    app: &App,
    pool: &Pool,
    request: &R,
    traceparent: &str,
    patience: Duration,
) -> Result<Result<R::Answer, Failure>, ApiError> {
    let recipient = pool.recipient()?;
    match app.broker.engines_of(&pool.name).await {
        Ok(0) => return Err(ApiError::no_engine(&pool.name)),
        Ok(_) => {}
        Err(error) => return Err(ApiError::broker(&error)),
    }
    // By the clock that decides when nothing can come of it any more.
    let now = app.now();
    let head = Head {
        kind: R::KIND,
        pool: pool.name.clone(),
        lease: request.lease(),
        issued: now,
        deadline: Some(now + patience),
        attempt: 0,
        settling: false,
        traceparent: traceparent.to_owned(),
    };
    let name = answer_name(request.lease());
    let mut reply = app
        .replies
        .expect(R::KIND, name.clone(), pool.name.clone(), pool.keys());
    let mut body = request.clone();
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
            expires: Some(patience),
        })
        .await
        .map_err(|error| ApiError::broker(&error))?;
    let reply = wait(app, &pool.name, &mut reply, patience).await?;
    heed(app, &pool.name, &reply.result);
    Ok(answer::<R>(reply.result))
}

/// The answer to a request, out of a reply.
///
/// # Errors
/// What the engine says; `not_understood` where its answer does not fit the request: a fault of its own,
/// or another version.
pub(crate) fn answer<R: Request>(result: ReplyResult) -> Result<R::Answer, Failure> {
    match result {
        ReplyResult::Failed(failure) => Err(failure),
        result => R::from_reply(result).ok_or_else(|| unexpected_answer(R::KIND)),
    }
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
/// See [`call`].
pub(crate) async fn look_at_server(
    app: &App,
    pool: &Pool,
    target: &Target,
) -> Result<Ledger, ApiError> {
    let sweep = Sweep {
        installation: None,
        target: target.clone(),
        expired_for_seconds: None,
        after: None,
        limit: 1,
    };
    let ledger = call(app, pool, &sweep, "", LOOK_PATIENCE).await?;
    Ok(Ledger {
        server: ledger.server.replace('\0', "\u{fffd}"),
        ..ledger
    })
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

/// An answer that does not fit the request.
pub(crate) fn unexpected_answer(kind: Kind) -> Failure {
    Failure::new(
        FailureCode::NotUnderstood,
        format!("its answer does not fit a {} request", kind.as_str()),
    )
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
            answer = reply.answer() => return answer.ok_or_else(|| {
                ApiError::new(Code::Deadline, "the answer was lost")
            }),
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
