//! Pings one engine through the broker.

use std::time::Duration;

use mayfly_common::broker::BrokerError;
use mayfly_protocol::names::{EngineName, random_text};
use mayfly_protocol::task::{Head, Heartbeat, Kind, ReplyResult};

use super::outbox::to_engine;
use super::seal::seal_request;
use crate::app::App;
use crate::error::{ApiError, Code};
use crate::store::Pool;

/// Maximum time for an engine's answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pings an engine of this pool and returns its heartbeat.
///
/// # Errors
/// `no_engine` if it has just ended; `broker_unavailable`; `deadline` if it does not answer within 5 s, or
/// another engine answers in its name; and the engine's failures.
pub(crate) async fn ping(
    app: &App,
    engine: &EngineName,
    pool: &Pool,
) -> Result<Heartbeat, ApiError> {
    let name = format!("ping-{}", random_text(20));
    let recipient = pool.recipient()?;
    let mut reply = app
        .replies
        .expect(Kind::Ping, name.clone(), pool.name.clone(), pool.keys());
    let now = app.now();
    let head = Head {
        kind: Kind::Ping,
        pool: pool.name.clone(),
        lease: None,
        issued: now,
        deadline: Some(now + PATIENCE),
        attempt: 0,
        settling: false,
        traceparent: String::new(),
    };
    let body = seal_request(app, &head, &recipient, &(), reply.request())
        .map_err(|error| ApiError::broker(&error))?;
    match to_engine(app, engine, head, body, Some(name), PATIENCE).await {
        Ok(()) => {}
        Err(BrokerError::Unroutable) => {
            return Err(ApiError::new(
                Code::NoEngine,
                format!("engine `{engine}` has just ended"),
            ));
        }
        Err(error) => return Err(ApiError::broker(&error)),
    }
    let silent = || {
        ApiError::new(
            Code::Deadline,
            format!("engine `{engine}` did not answer within 5 s"),
        )
    };
    let answer = tokio::time::timeout(PATIENCE, reply.answer())
        .await
        .map_err(|_| silent())?;
    match answer.ok_or_else(silent)?.result {
        // Another engine of the pool cannot answer for this engine.
        ReplyResult::Pong(beat) if beat.engine == *engine && beat.pool == pool.name => Ok(beat),
        ReplyResult::Failed(failure) => Err(failure.into()),
        _ => Err(silent()),
    }
}
