//! Requests. Each is taken from the pool's queue, admitted and opened, gets a permit of its server, and is met,
//! answered and settled. These steps are the same for all kinds. Each kind has its own file. Every request may be run
//! twice: a second create finds the role and gives the same answer.

mod check;
mod create;
mod refresh;
mod renew;
mod rotate;
mod sweep;
mod tidy;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::arrival::Arrival;
use mayfly_common::broker::Incoming;
use mayfly_common::fault;
use mayfly_common::panics::caught;
use mayfly_protocol::each_request;
use mayfly_protocol::request::RequestId;
use mayfly_protocol::task::{self, Failure, FailureCode, Kind, ReplyResult, Request};
use mayfly_protocol::timing::{Freshness, freshness, timing};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, info_span, warn};

use crate::metrics::Ending;
use crate::pg;
use crate::work::Engine;

/// Maximum number of requests that are delivered and not settled. Eight of them can be in progress at one server;
/// the others wait.
pub(crate) const PREFETCH: u16 = 32;
/// How long a request waits for a place at a server that does not answer earlier requests.
const PATIENCE: Duration = Duration::from_secs(2);

/// The context of a request that is worked on.
struct Work<'w> {
    engine: &'w Engine,
    /// When the request was delivered.
    arrived: Arrival,
    /// One of the places at its server.
    permit: pg::Permit,
}

/// The work of an engine for one kind of request.
trait Meet: Request {
    /// Refuses a request before it waits for a place at its server.
    ///
    /// # Errors
    /// The reason.
    fn check(&self, _engine: &Engine) -> Result<(), Failure> {
        Ok(())
    }

    /// Does what the request asks for.
    ///
    /// # Errors
    /// The failure, which the reply then contains.
    async fn meet(&self, work: Work<'_>) -> Result<Self::Answer, Failure>;
}

/// Works on requests until the source ends.
pub(crate) async fn run(
    engine: Arc<Engine>,
    mut creates: mpsc::Receiver<Incoming>,
    tasks: TaskTracker,
) {
    while let Some(incoming) = creates.recv().await {
        let engine = engine.clone();
        tasks.spawn(async move {
            let lease = incoming
                .head
                .lease
                .map(|id| id.to_string())
                .unwrap_or_default();
            let span = info_span!(
                "request",
                kind = incoming.head.kind.as_str(),
                lease,
                traceparent = incoming.head.traceparent
            );
            caught("a request", handle(&engine, incoming).instrument(span)).await;
        });
    }
}

async fn handle(engine: &Engine, mut incoming: Incoming) {
    let kind = incoming.head.kind;
    engine.metrics.begun(kind);
    let arrived = incoming.arrived;
    fault::point(kind.as_str(), "delivered").await;
    let mut name = None;
    let result = match admit(engine, &incoming) {
        Ok(()) => {
            let work = Box::pin(work(engine, &incoming, &mut name));
            let work = caught(kind.as_str(), work);
            work.await.unwrap_or_else(|| Err(engine.mistaken()))
        }
        Err(refused) => Err(refused),
    };
    let (ending, result) = match result {
        Ok(result) => (Ending::Ok, result),
        Err(mut failure) => {
            // If the message cannot be acked for certain, another engine gets the request and may make the account.
            failure.nothing_made = failure.nothing_made && incoming.take_for_good().await;
            warn!(
                kind = kind.as_str(),
                code = failure.code.as_str(),
                reason = failure.message,
                "a request failed"
            );
            if let Some(span) = &mut incoming.span {
                span.fail(failure.code.as_str());
            }
            let ending = match failure.code {
                FailureCode::NotUnderstood | FailureCode::PastDeadline => Ending::Refused,
                _ => Ending::Failed,
            };
            (ending, ReplyResult::Failed(failure))
        }
    };
    engine.reply(&incoming, name, result).await;
    fault::point(kind.as_str(), "replied").await;
    incoming.ack().await;
    engine
        .metrics
        .ended(kind, ending, arrived.elapsed().as_secs_f64());
}

/// Refuses a request that was recorded and is sent again after its deadline. The engine's clock and the clock
/// allowance decide. An honest request does not depend on the clock: it leaves its queue at its deadline, and the
/// engine's work for it ends within the [create budget](mayfly_protocol::timing::Timing::create_budget).
fn admit(engine: &Engine, incoming: &Incoming) -> Result<(), Failure> {
    let head = &incoming.head;
    let (reason, words) = match freshness(head.issued, head.deadline, Timestamp::now()) {
        Freshness::Fresh => return Ok(()),
        Freshness::Late => ("past_deadline", "refuses the task as too late"),
        Freshness::FromTheFuture => (
            "clock_behind",
            "has a clock that is behind the dispatcher's, so it cannot distinguish an old task from a new one",
        ),
    };
    engine.metrics.refused(reason);
    Err(Failure::new(
        FailureCode::PastDeadline,
        format!(
            "engine {} {words}; do the clocks of dispatcher and engine agree to {} s?",
            engine.name,
            timing().clock_allowance.as_secs()
        ),
    ))
}

/// Opens a request, stores the name of its answer, and loads the authorities that it names. Head and body must name
/// the same lease.
async fn open<R: Request>(
    engine: &Engine,
    incoming: &Incoming,
    name: &mut Option<RequestId>,
) -> Result<R, Failure> {
    let refused = |reason, words: String| {
        engine.metrics.refused(reason);
        Failure::new(FailureCode::NotUnderstood, words)
    };
    let (mut request, asked) = engine
        .open_request::<R>(incoming)
        .map_err(|error| refused(error.reason(), format!("engine {}: {error}", engine.name)))?;
    *name = asked;
    engine.find_authorities(request.target_mut()).await?;
    if request.lease().is_some() && request.lease() != incoming.head.lease {
        return Err(refused(
            "not_authentic",
            "the task names two leases".to_owned(),
        ));
    }
    Ok(request)
}

async fn met<R: Meet>(
    engine: &Engine,
    incoming: &Incoming,
    name: &mut Option<RequestId>,
) -> Result<ReplyResult, Failure> {
    let request: R = open(engine, incoming, name).await?;
    request.check(engine)?;
    let limits = engine.servers.limits(request.target());
    let permit = limits.request(PATIENCE).await.map_err(|failure| Failure {
        nothing_made: R::KIND == Kind::Create,
        ..failure
    })?;
    let work = Work {
        engine,
        arrived: incoming.arrived,
        permit,
    };
    request.meet(work).await.map(R::to_reply)
}

/// Does a request according to its kind. [`each_request`] is the list of all kinds; each has an `impl Meet`.
async fn work(
    engine: &Engine,
    incoming: &Incoming,
    name: &mut Option<RequestId>,
) -> Result<ReplyResult, Failure> {
    macro_rules! met_by_kind {
        ($($request:ident),*) => {
            match incoming.head.kind {
                $(Kind::$request => met::<task::$request>(engine, incoming, name).await,)*
                kind => {
                    engine.metrics.refused("unknown_version");
                    Err(Failure::new(
                        FailureCode::NotUnderstood,
                        format!("engine {} takes no {} request", engine.name, kind.as_str()),
                    ))
                }
            }
        };
    }
    each_request!(met_by_kind)
}
