//! An attacker who has got a pool's key, and the rights of its engines at the broker.

use std::path::Path;

use jiff::Timestamp;
use mayfly_common::broker::{Address, Broker, Incoming, Login, Message, Options, Source};
use mayfly_protocol::names::{LeaseId, PoolName};
use mayfly_protocol::seal::{EngineKey, KeyPair, PublicKey};
use mayfly_protocol::task::{Head, Heartbeat, Kind, Outcome, OutcomeResult};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::system::System;
use crate::users::Part;
use crate::{eventually, seconds};

/// Speaks as an engine of the pool, and takes the pool's tasks.
pub struct Thief {
    pub pool: PoolName,
    keys: KeyPair,
    dispatcher: PublicKey,
    broker: Broker,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// A task that was taken.
pub struct Taken {
    pub kind: Kind,
    pub lease: Option<String>,
    /// The message's content, if the stolen key opens it.
    pub opened: Option<Value>,
}

impl Thief {
    /// A thief with this key file, at the broker of this system.
    pub async fn with(system: &System, key_file: &Path) -> Self {
        let text = std::fs::read_to_string(key_file).unwrap();
        let key: EngineKey = serde_json::from_str(&text).unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let options = Options {
            login: Login::with_url(&system.rabbit.url_for(&Part::Engine(key.pool.to_string())))
                .unwrap(),
            name: "a thief".to_owned(),
            part: mayfly_common::broker::Part::Engine,
        };
        let broker = Broker::start(options, &tasks, stop.clone());
        assert!(broker.up().await);
        Self {
            pool: key.pool.clone(),
            keys: KeyPair::from_base64(&key.private_key).unwrap(),
            dispatcher: PublicKey::from_base64(&key.dispatcher_key).unwrap(),
            broker,
            tasks,
            stop,
        }
    }

    async fn say<T: serde::Serialize>(
        &self,
        to: Address,
        kind: Kind,
        lease: Option<LeaseId>,
        body: &T,
    ) {
        let head = Head {
            kind,
            pool: self.pool.clone(),
            lease,
            issued: Timestamp::now(),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        };
        let message = Message {
            to,
            body: head.seal(&self.keys, &self.dispatcher, body).unwrap(),
            head,
            reply_as: None,
            answers: None,
            expires: None,
        };
        self.broker.publish(message).await.unwrap();
    }

    /// Reports that an engine of this name lives.
    pub async fn lives(&self, name: &str) {
        let beat = Heartbeat {
            engine: name.parse().unwrap(),
            pool: self.pool.clone(),
            version: "0".to_owned(),
            started: Timestamp::now(),
            in_flight: 0,
            leaving: false,
            authorities: None,
            opens_shared: true,
            ends_batches: true,
        };
        self.say(Address::Engines, Kind::Heartbeat, None, &beat)
            .await;
    }

    /// Reports that the account of a lease is gone from this server, for good.
    pub async fn settles(&self, lease: &str, server: &str) {
        let lease: LeaseId = lease.parse().unwrap();
        let outcome = Outcome {
            lease,
            engine: "thief".parse().unwrap(),
            attempts: 1,
            role: None,
            result: OutcomeResult::Dropped {
                at: Timestamp::now() + seconds(3600),
                server: server.to_owned(),
                conclusive: true,
            },
            found_at: None,
            ticket: None,
            again_ms: None,
            others: vec![],
        };
        let to = Address::Outcomes;
        self.say(to, Kind::Outcome, Some(lease), &outcome).await;
    }

    /// Takes the pool's tasks, so that nobody else gets them.
    pub fn takes(&self) -> mpsc::UnboundedReceiver<Taken> {
        let (sink, taken) = mpsc::unbounded_channel();
        for source in [
            Source::Creates(self.pool.clone()),
            Source::Revokes(self.pool.clone()),
        ] {
            let (sender, mut incoming) = mpsc::channel::<Incoming>(64);
            let (broker, stop) = (self.broker.clone(), self.stop.clone());
            self.tasks.spawn(async move {
                broker
                    .consume(source, 64, sender, stop, watch::channel(false).0)
                    .await;
            });
            let (sink, keys) = (sink.clone(), self.keys.clone());
            let dispatcher = self.dispatcher.clone();
            self.tasks.spawn(async move {
                while let Some(task) = incoming.recv().await {
                    let opened = task.head.open(&keys, &dispatcher, &task.body);
                    let _ = sink.send(Taken {
                        kind: task.head.kind,
                        lease: task.head.lease.map(|lease| lease.to_string()),
                        opened: opened.ok(),
                    });
                    task.ack().await;
                }
            });
        }
        taken
    }

    /// Goes away.
    pub async fn leaves(self) {
        self.stop.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(seconds(5), self.tasks.wait()).await;
    }
}

/// Waits until the dispatcher has refused this number of messages for this reason.
pub async fn refused(system: &System, reason: &str, most: u64) {
    let line = format!("mayfly_dispatcher_messages_refused_total{{reason=\"{reason}\"}} ");
    let what = format!("{most} messages are refused as {reason}");
    eventually(&what, seconds(10), async || {
        let metrics = system.admin_text("/metrics").await;
        let count = metrics.lines().find_map(|text| text.strip_prefix(&line));
        let count: u64 = count.unwrap_or("0").parse().unwrap();
        (count >= most).then_some(())
    })
    .await;
}
