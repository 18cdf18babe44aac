//! The queue of this one engine, for pings and verdicts.

use std::sync::Arc;

use mayfly_common::broker::Incoming;
use mayfly_common::panics::caught;
use mayfly_protocol::task::{Kind, ReplyResult, Verdict};
use tokio::sync::mpsc;

use crate::metrics::Ending;
use crate::work::Engine;

/// Maximum number of unacked messages.
pub(crate) const PREFETCH: u16 = 16;

/// Answers pings and takes verdicts, one after another.
pub(crate) async fn run(engine: Arc<Engine>, mut orders: mpsc::Receiver<Incoming>) {
    while let Some(order) = orders.recv().await {
        caught("an order", take_order(&engine, order)).await;
    }
}

async fn take_order(engine: &Engine, order: Incoming) {
    let kind = order.head.kind;
    engine.metrics.begun(kind);
    let arrived = order.arrived;
    let mut name = None;
    let taken = match kind {
        Kind::Verdict => engine
            .open::<Verdict>(&order)
            .map(|verdict| engine.verdicts.deliver(verdict)),
        _ => engine
            .open_request::<()>(&order)
            .map(|((), asked)| name = asked),
    };
    let ending = match taken {
        Ok(()) => Ending::Ok,
        Err(error) => {
            engine.metrics.refused(error.reason());
            Ending::Refused
        }
    };
    if kind == Kind::Ping && taken.is_ok() {
        engine
            .reply(&order, name, ReplyResult::Pong(engine.heartbeat(false)))
            .await;
    }
    order.ack().await;
    engine
        .metrics
        .ended(kind, ending, arrived.elapsed().as_secs_f64());
}
