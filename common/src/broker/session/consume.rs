//! Consuming on a session: the tasks of an engine, the answers to a dispatcher.

use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::Session;
use crate::broker::declare::{
    declare_heartbeats, declare_own, declare_probes, declare_replies, find_queue, has_exchange,
};
use crate::broker::wire::{incoming, parse_head, specimen};
use crate::broker::{BrokerError, Incoming, Source};
use mayfly_protocol::task::{Head, Kind};
use mayfly_protocol::topology;

/// Whether a source may deliver messages of a kind. A newer version may send a revocation of a kind that is
/// unknown here.
fn may_bring(source: &Source, head: &Head) -> bool {
    !matches!(source, Source::Revokes(_)) || matches!(head.kind, Kind::Revoke | Kind::Unknown)
}

impl Session {
    /// Passes on the answers to a dispatcher's requests.
    pub(super) async fn take_replies(
        &self,
        replies: mpsc::Sender<Incoming>,
    ) -> Result<(), BrokerError> {
        let Some(queue) = &self.routes.reply_to else {
            return Ok(());
        };
        let channel = self.connection.create_channel().await?;
        declare_replies(&channel, queue).await?;
        let options = BasicConsumeOptions {
            no_ack: true,
            ..Default::default()
        };
        let mut consumer = channel
            .basic_consume(
                queue.as_str().into(),
                "".into(),
                options,
                FieldTable::default(),
            )
            .await?;
        let (ended, specimens) = (self.ended.clone(), self.specimens.clone());
        let (broken, unreadable) = (self.broken.clone(), self.unreadable.clone());
        // This task ends with the session. If its queue is deleted, it ends the session.
        tokio::spawn(async move {
            let _open = channel;
            loop {
                let delivery = tokio::select! {
                    () = ended.cancelled() => return,
                    delivery = consumer.next() => delivery,
                };
                let Some(Ok(delivery)) = delivery else {
                    broken.store(true, Ordering::Relaxed);
                    return;
                };
                let Some(head) = parse_head(&delivery.properties) else {
                    let n = unreadable.fetch_add(1, Ordering::Relaxed);
                    let kept =
                        specimen(&delivery.properties, &delivery.data, format!("answer-{n}"));
                    let _ = specimens.try_send(kept);
                    continue;
                };
                if replies.send(incoming(head, delivery, None)).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Finds the queue of a source, or declares it if it belongs to this connection.
    async fn queue_of(&self, channel: &Channel, source: &Source) -> Result<String, BrokerError> {
        let shared = match source {
            Source::Creates(pool) => topology::create_queue(pool),
            Source::Revokes(pool) => topology::revoke_queue(pool),
            Source::Outcomes => topology::OUTCOMES.to_owned(),
            Source::Unroutable => topology::UNROUTABLE.to_owned(),
            Source::Pings(pool, engine) => {
                let queue = if self.routes.entrances {
                    topology::engine_queue(pool, engine)
                } else if has_exchange(channel, topology::DELIVER).await? {
                    topology::earlier_engine_queue(engine)
                } else {
                    return Err(BrokerError::Absent(topology::DELIVER.to_owned()));
                };
                declare_own(channel, &queue).await?;
                return Ok(queue);
            }
            Source::Probes => {
                let queue = topology::dispatcher_queue(&self.name, "probes");
                declare_probes(channel, &queue, &self.routes.probes).await?;
                return Ok(queue);
            }
            Source::Heartbeats => {
                let queue = topology::dispatcher_queue(&self.name, "heartbeats");
                declare_heartbeats(channel, &queue).await?;
                return Ok(queue);
            }
        };
        match find_queue(channel, shared.clone()).await? {
            Some(_) => Ok(shared),
            None => Err(BrokerError::Absent(shared)),
        }
    }

    /// The broker has ended a consumer: its queue was deleted, and maybe others. RabbitMQ before 4.0 does not notify
    /// consumers of a queue that was declared again at once. So the connection is opened again.
    fn reopen(&self, source: &Source) {
        if self.connection.status().connected() && !self.ended.is_cancelled() {
            error!(
                ?source,
                "a queue was deleted; the connection is opened again"
            );
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    pub(in crate::broker) async fn consume(
        &self,
        source: &Source,
        prefetch: u16,
        sink: &mpsc::Sender<Incoming>,
        stop: &CancellationToken,
        attached: &watch::Sender<bool>,
    ) -> Result<(), BrokerError> {
        let channel = self.connection.create_channel().await?;
        let queue = self.queue_of(&channel, source).await?;
        if self.is_outdated().await {
            self.broken.store(true, Ordering::Relaxed);
            return Ok(());
        }
        channel
            .basic_qos(prefetch, BasicQosOptions::default())
            .await?;
        let mut consumer = channel
            .basic_consume(
                queue.into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        attached.send_replace(true);
        let mut is_cancelled = false;
        loop {
            let delivery = tokio::select! {
                () = stop.cancelled(), if !is_cancelled => {
                    channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await?;
                    // Messages that were delivered before still come, and then the end of the stream.
                    is_cancelled = true;
                    attached.send_replace(false);
                    continue;
                }
                () = self.ended.cancelled() => return Ok(()),
                delivery = consumer.next() => delivery,
            };
            let Some(delivery) = delivery else {
                if !is_cancelled && channel.status().connected() {
                    self.reopen(source);
                }
                return Ok(());
            };
            let delivery = delivery?;
            let head = parse_head(&delivery.properties).filter(|head| may_bring(source, head));
            let Some(head) = head else {
                self.keep_specimen(&delivery.properties, &delivery.data);
                delivery.ack(BasicAckOptions::default()).await?;
                continue;
            };
            if sink
                .send(incoming(head, delivery, Some(channel.clone())))
                .await
                .is_err()
            {
                return Ok(());
            }
        }
    }
}
