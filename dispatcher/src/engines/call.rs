//! Requests to an engine of a pool that are answered while the caller waits: renewals, sweeps and
//! the like. They go to the pool's create queue, and leave it at their deadline.

use std::marker::PhantomData;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::broker::{Address, BrokerError, Message};
use mayfly_protocol::names::{EngineName, LeaseId, PoolName};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{
    Failure, FailureCode, Head, Kind, Ledger, Reply, ReplyResult, Request, Sweep,
};
use mayfly_protocol::topology;

use super::authorities;
use super::seal::seal_often;
use crate::app::App;
use crate::app::replies::Expected;
use crate::error::{ApiError, Code};
use crate::store::{Pool, Recipient};

/// Pause between two looks at the pool while a caller waits for an answer.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Maximum time for an engine's answer.
const LOOK_PATIENCE: Duration = Duration::from_secs(10);
/// Looks in a row that found no engine, after which the pool counts as empty.
const EMPTY_LOOKS: u32 = 2;

/// Sends a request to any engine of a pool and returns its answer. `traceparent` is the caller's (W3C Trace
/// Context) and may be empty. `patience` bounds the wait for the answer.
///
/// # Errors
/// `no_engine`, `broker_unavailable`, `deadline`, and the engine's failures.
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

/// Like [`call`], but the engine's failure is returned as an answer.
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
    // The deadline is by the clock that decides when the request can have no effect any more.
    let deadline = app.now() + patience;
    let sent = send(app, pool, &recipient, request, traceparent, deadline)
        .await
        .map_err(|error| ApiError::broker(&error))?;
    Ok(sent.answer(app, patience).await?.result)
}

/// A request at the broker, whose answer is expected.
pub(crate) struct Sent<R> {
    pool: PoolName,
    expected: Expected,
    request: PhantomData<fn() -> R>,
}

/// An engine's answer to a request.
pub(crate) struct Answered<A> {
    /// The engine that answered.
    pub(crate) engine: EngineName,
    /// The answer, or the failure that the engine reports.
    pub(crate) result: Result<A, Failure>,
}

/// Publishes a request to a pool. It leaves its queue at `deadline`, by the store's clock.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`]; `Down` if the deadline has passed.
pub(crate) async fn send<R: Request>(
    app: &App,
    pool: &Pool,
    recipient: &Recipient,
    request: &R,
    traceparent: &str,
    deadline: Timestamp,
) -> Result<Sent<R>, BrokerError> {
    let name = answer_name(R::KIND, request.lease());
    let expected = app
        .replies
        .expect(R::KIND, name.clone(), pool.name.clone(), pool.keys());
    let mut body = request.clone();
    let target = body.target_mut();
    *target = authorities::refer(app, &pool.name, recipient, target.clone()).await;
    let now = app.now();
    let left = deadline.duration_since(now);
    if !left.is_positive() {
        // This process was suspended. The request would expire in the queue at once.
        return Err(BrokerError::Down);
    }
    let head = Head {
        kind: R::KIND,
        pool: pool.name.clone(),
        lease: request.lease(),
        issued: now,
        deadline: Some(deadline),
        attempt: 0,
        settling: false,
        traceparent: traceparent.to_owned(),
    };
    let body = seal_often(app, &head, recipient, &body, Some(expected.request())).await?;
    app.broker
        .publish(Message {
            to: Address::Queue(topology::create_queue(&pool.name)),
            head,
            body,
            reply_as: Some(name),
            answers: None,
            expires: Some(Duration::try_from(left).unwrap_or(Duration::ZERO)),
        })
        .await?;
    Ok(Sent {
        pool: pool.name.clone(),
        expected,
        request: PhantomData,
    })
}

impl<R: Request> Sent<R> {
    /// Waits for the answer no longer than `patience`.
    ///
    /// # Errors
    /// `no_engine`, `broker_unavailable`, `deadline`.
    pub(crate) async fn answer(
        mut self,
        app: &App,
        patience: Duration,
    ) -> Result<Answered<R::Answer>, ApiError> {
        let reply = wait(app, &self.pool, &mut self.expected, patience).await?;
        forget_unread_authorities(app, &self.pool, &reply.result);
        Ok(Answered {
            engine: reply.engine,
            result: answer::<R>(reply.result),
        })
    }
}

/// Takes the answer to a request from a reply. A reply to another kind of request is `not_understood`: a
/// fault of the engine, or another version.
fn answer<R: Request>(result: ReplyResult) -> Result<R::Answer, Failure> {
    match result {
        ReplyResult::Failed(failure) => Err(failure),
        result => R::from_reply(result).ok_or_else(|| unexpected_answer(R::KIND)),
    }
}

/// An engine that does not understand a message may lack the authorities that the message only names. So the next
/// message contains them.
fn forget_unread_authorities(app: &App, pool: &PoolName, result: &ReplyResult) {
    if let ReplyResult::Failed(failure) = result
        && failure.code == FailureCode::NotUnderstood
    {
        app.authorities.forget(pool);
    }
}

/// Finds the identity and the clock of the server that an engine of a pool reaches with an admin connection.
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

/// The name of an answer. A name about a lease begins with the lease's id, which the answer's head must have
/// too.
fn answer_name(kind: Kind, lease: Option<LeaseId>) -> String {
    // An account is made once for its lease, even if the request is repeated.
    if let (Kind::Create, Some(lease)) = (kind, lease) {
        return lease.to_string();
    }
    let random = format!("{:032x}", rand::random::<u128>());
    lease.map_or_else(|| random.clone(), |lease| format!("{lease}/{random}"))
}

/// Whether an answer of this name may be about this lease.
pub(crate) fn may_answer(name: &str, lease: &LeaseId) -> bool {
    name.strip_prefix(&lease.to_string())
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The failure for an answer that does not fit its request.
pub(crate) fn unexpected_answer(kind: Kind) -> Failure {
    Failure::new(
        FailureCode::NotUnderstood,
        format!("its answer does not fit a {} request", kind.as_str()),
    )
}

/// Waits for an engine's answer while the pool has an engine, the broker is connected, and the deadline has
/// not passed.
///
/// # Errors
/// `no_engine`, `broker_unavailable`, `deadline`.
async fn wait(
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
        // If the connection is lost, the answer cannot arrive.
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
        let name = answer_name(Kind::Renew, Some(one));
        assert!(may_answer(&name, &one) && !may_answer(&name, &two));
        assert!(may_answer(&one.to_string(), &one));
        assert!(!may_answer(&format!("{one}x"), &one));
        assert_eq!(answer_name(Kind::Create, Some(one)), one.to_string());
    }
}
