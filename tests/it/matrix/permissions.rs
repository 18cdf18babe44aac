//! What each broker user may do, tried on real brokers: a table of (user, operation) and whether the
//! broker allows it. The users have the rights of `deploy/rabbitmq/definitions.json`, as everywhere in
//! this suite.

use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
    ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::users::Part;

/// An operation, with names without the prefix `mayfly.v1.`.
#[derive(Debug)]
enum Act {
    Look(String),
    Declare(String),
    Delete(String),
    Purge(String),
    Get(String),
    Consume(String),
    /// Queue, exchange, key.
    Bind(String, &'static str, &'static str),
    DeclareExchange(&'static str),
    DeleteExchange(&'static str),
    /// The exchange that receives, and the exchange that it is bound to.
    BindExchange(&'static str, &'static str),
    /// Exchange (empty: the default one) and key.
    Publish(&'static str, String),
}

fn full(name: &str) -> String {
    match name {
        "" | "another" => name.to_owned(),
        name => format!("mayfly.v1.{name}"),
    }
}

async fn try_it(channel: &Channel, act: &Act) -> Result<(), lapin::Error> {
    let none = FieldTable::default;
    match act {
        Act::Look(queue) => {
            let passive = QueueDeclareOptions {
                passive: true,
                ..Default::default()
            };
            let found = channel.queue_declare(full(queue).into(), passive, none());
            found.await.map(drop)
        }
        Act::Declare(queue) => {
            let exclusive = QueueDeclareOptions {
                exclusive: true,
                ..Default::default()
            };
            let declared = channel.queue_declare(full(queue).into(), exclusive, none());
            declared.await.map(drop)
        }
        Act::Delete(queue) => {
            let deleted = channel.queue_delete(full(queue).into(), QueueDeleteOptions::default());
            deleted.await.map(drop)
        }
        Act::Purge(queue) => {
            let purged = channel.queue_purge(full(queue).into(), QueuePurgeOptions::default());
            purged.await.map(drop)
        }
        Act::Get(queue) => {
            let got = channel.basic_get(full(queue).into(), BasicGetOptions::default());
            got.await.map(drop)
        }
        Act::Consume(queue) => {
            let options = BasicConsumeOptions::default();
            let consumed = channel.basic_consume(full(queue).into(), "".into(), options, none());
            consumed.await.map(drop)
        }
        Act::Bind(queue, exchange, key) => {
            channel
                .queue_bind(
                    full(queue).into(),
                    full(exchange).into(),
                    (*key).into(),
                    QueueBindOptions::default(),
                    none(),
                )
                .await
        }
        Act::DeclareExchange(exchange) => {
            let options = ExchangeDeclareOptions::default();
            channel
                .exchange_declare(full(exchange).into(), ExchangeKind::Topic, options, none())
                .await
        }
        Act::DeleteExchange(exchange) => {
            channel
                .exchange_delete(full(exchange).into(), ExchangeDeleteOptions::default())
                .await
        }
        Act::BindExchange(to, from) => {
            channel
                .exchange_bind(
                    full(to).into(),
                    full(from).into(),
                    "#".into(),
                    ExchangeBindOptions::default(),
                    none(),
                )
                .await
        }
        Act::Publish(exchange, key) => {
            channel
                .confirm_select(ConfirmSelectOptions::default())
                .await?;
            channel
                .basic_publish(
                    full(exchange).into(),
                    key.as_str().into(),
                    BasicPublishOptions::default(),
                    b"x",
                    BasicProperties::default(),
                )
                .await?
                .await
                .map(drop)
        }
    }
}

fn key(pool: &str) -> String {
    // The delay of 16 s is long enough for the message to exist until the table is done.
    format!("{}{}{pool}", "0.".repeat(17), "1.0.0.0.0.0.0.")
}

/// What no user of an engine may do, and no user for monitoring, with things of another pool.
fn beyond(other: &str) -> Vec<Act> {
    let queue = |name: &str| format!("pool.{other}.{name}");
    let level = "delay.L05".to_owned();
    let mut acts = vec![
        Act::Declare("another".to_owned()),
        Act::Declare(format!("engine.{other}.e1")),
        Act::Declare(format!("pool.{other}x.create")),
        Act::Declare("dispatcher.x.replies".to_owned()),
        Act::DeclareExchange("new"),
        Act::DeclareExchange("dispatcher.owner"),
        Act::DeleteExchange("dispatcher.owner"),
        Act::DeclareExchange("delay.L05"),
        Act::BindExchange("engines", "answers"),
        Act::BindExchange("deliver", "park"),
    ];
    for name in ["create", "revoke"] {
        acts.extend([
            Act::Get(queue(name)),
            Act::Consume(queue(name)),
            Act::Purge(queue(name)),
            Act::Delete(queue(name)),
            Act::Bind(queue(name), "deliver", "#"),
            Act::Publish("", format!("mayfly.v1.{}", queue(name))),
        ]);
    }
    let authorities = || format!("engine.{other}.=authorities");
    acts.extend([
        Act::Get(authorities()),
        Act::Consume(authorities()),
        Act::Purge(authorities()),
        Act::Delete(authorities()),
        Act::Declare(authorities()),
        Act::Publish("", format!("mayfly.v1.{}", authorities())),
    ]);
    for shared in ["outcomes", "unroutable", "unreadable", level.as_str()] {
        let shared = || shared.to_owned();
        acts.extend([
            Act::Get(shared()),
            Act::Consume(shared()),
            Act::Purge(shared()),
            Act::Delete(shared()),
            Act::Publish("", format!("mayfly.v1.{}", shared())),
        ]);
    }
    for exchange in [
        "answers",
        "deliver",
        "delay.L05",
        "engines",
        "park",
        "unroutable",
    ] {
        acts.push(Act::DeleteExchange(exchange));
        acts.push(Act::BindExchange("answers", exchange));
    }
    for exchange in ["deliver", "delay.L05", "unroutable"] {
        acts.push(Act::Publish(exchange, key(other)));
    }
    acts.extend([
        Act::Publish("park", key(other)),
        Act::Publish("park", format!("{other}.{}", key(other))),
        Act::Publish("park", "#".to_owned()),
    ]);
    acts
}

/// What no user of an engine may do, even with things of its own pool: the engine takes tasks and parks, and cannot
/// change how they arrive.
fn beyond_with_its_own(pool: &str) -> Vec<Act> {
    let own = |name: &str| format!("pool.{pool}.{name}");
    vec![
        Act::Declare(own("create")),
        Act::Delete(own("create")),
        Act::Delete(own("revoke")),
        Act::Bind(own("revoke"), "deliver", "#"),
        Act::Bind(own("revoke"), "park", "#"),
        Act::Bind(own("revoke"), "answers", "outcomes"),
        Act::Bind(own("create"), "engines", ""),
        Act::Bind(format!("engine.{pool}.e1"), "engines", ""),
        Act::Publish("", format!("mayfly.v1.{}", own("create"))),
        Act::Publish("", format!("mayfly.v1.{}", own("revoke"))),
        Act::Publish("", format!("mayfly.v1.engine.{pool}.=authorities")),
        Act::Publish("deliver", key(pool)),
        Act::Publish("delay.L05", key(pool)),
    ]
}

/// What an engine's part needs.
fn of_an_engine(pool: &str) -> Vec<Act> {
    let own = |name: &str| format!("pool.{pool}.{name}");
    vec![
        Act::Look(own("create")),
        Act::Look("outcomes".to_owned()),
        Act::Consume(own("create")),
        Act::Consume(own("revoke")),
        Act::Declare(format!("engine.{pool}.e1")),
        Act::Publish("park", key(pool)),
        Act::Publish("answers", "mayfly.v1.outcomes".to_owned()),
        Act::Publish("answers", "mayfly.v1.unreadable".to_owned()),
        Act::Publish("engines", String::new()),
    ]
}

/// What a dispatcher's part needs that its own connection does not show by itself.
fn of_a_dispatcher(pool: &str) -> Vec<Act> {
    let own = |name: &str| format!("pool.{pool}.{name}");
    vec![
        Act::Look(own("create")),
        Act::Publish("", format!("mayfly.v1.{}", own("revoke"))),
        Act::Publish("delay.L05", key(pool)),
        Act::Get("outcomes".to_owned()),
        Act::Get("unroutable".to_owned()),
        Act::Declare("dispatcher.x.replies".to_owned()),
        Act::Publish("", format!("mayfly.v1.engine.{pool}.=authorities")),
        Act::Delete(format!("engine.{pool}.=authorities")),
        Act::DeleteExchange("dispatcher.owner"),
        Act::Delete(own("create")),
        Act::Delete(own("revoke")),
    ]
}

/// What not even a dispatcher may do: take tasks from engines, act as an engine, read what was set aside, and use
/// names that are not Mayfly's.
fn beyond_a_dispatcher(pool: &str) -> Vec<Act> {
    vec![
        Act::Get(format!("pool.{pool}.create")),
        Act::Consume(format!("pool.{pool}.create")),
        Act::Purge(format!("pool.{pool}.create")),
        Act::Declare(format!("engine.{pool}.e1")),
        Act::Get(format!("engine.{pool}.=authorities")),
        Act::Purge("unreadable".to_owned()),
        Act::Declare("another".to_owned()),
        Act::Publish("engines", String::new()),
        Act::Publish("park", key(pool)),
    ]
}

struct Tried {
    connection: Connection,
    who: String,
    wrong: Vec<String>,
}

impl Tried {
    async fn by(rabbit: &Rabbit, part: Part) -> Self {
        let url = rabbit.url_for(&part);
        Self {
            connection: Connection::connect(&url, ConnectionProperties::default())
                .await
                .unwrap(),
            who: format!("{part:?}"),
            wrong: Vec::new(),
        }
    }

    async fn all(&mut self, acts: Vec<Act>, allowed: bool) {
        for act in acts {
            let channel = self.connection.create_channel().await.unwrap();
            let done = try_it(&channel, &act).await;
            let as_expected = match &done {
                Ok(()) => allowed,
                Err(error) => !allowed && error.to_string().contains("ACCESS_REFUSED"),
            };
            if !as_expected {
                self.wrong.push(format!("{}: {act:?}: {done:?}", self.who));
            }
            if channel.status().connected() {
                let _ = channel.close(200, "done".into()).await;
            }
        }
    }
}

async fn the_table(rabbit: Rabbit) {
    let system = System::start_on(rabbit).await;
    let pools = [
        system.pool().await,
        system.pool().await,
        system.pool().await,
    ];
    let [one, two, gone] = &pools;
    let mut wrong = Vec::new();
    for (own, other) in [(one, two), (two, one)] {
        let mut engine = Tried::by(&system.rabbit, Part::Engine(own.clone())).await;
        engine.all(of_an_engine(own), true).await;
        engine.all(beyond(other), false).await;
        engine.all(beyond_with_its_own(own), false).await;
        wrong.append(&mut engine.wrong);
    }
    let mut monitoring = Tried::by(&system.rabbit, Part::Monitoring).await;
    for pool in [one, two] {
        monitoring.all(beyond(pool), false).await;
        monitoring.all(beyond_with_its_own(pool), false).await;
    }
    let shared = ["answers", "engines"];
    let publish = shared.map(|exchange| Act::Publish(exchange, "x".to_owned()));
    monitoring.all(publish.into(), false).await;
    wrong.append(&mut monitoring.wrong);
    let mut dispatcher = Tried::by(&system.rabbit, Part::Dispatcher).await;
    dispatcher.all(beyond_a_dispatcher(gone), false).await;
    dispatcher.all(of_a_dispatcher(gone), true).await;
    wrong.append(&mut dispatcher.wrong);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn broker_users_may_do_their_part_and_no_more() {
    the_table(Rabbit::shared()).await;
}

#[tokio::test]
async fn broker_users_may_do_their_part_and_no_more_on_release_4() {
    the_table(Rabbit::of_release("4")).await;
}
