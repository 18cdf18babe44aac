//! The owner of the virtual host. Two installations on one virtual host would take each other's answers and
//! outcomes. So the first dispatcher leaves its installation's id there, and dispatchers of another installation are
//! refused.
//!
//! The id is the argument `alternate-exchange` of an exchange that nobody publishes to: the only argument of an
//! exchange that RabbitMQ compares when it is declared again
//! (<https://www.rabbitmq.com/docs/exchanges#property-equivalence>). In all versions the rights of dispatchers'
//! users have covered its name, and the rights of engines' users have not.

use std::fmt;
use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use tracing::warn;

use super::declare::find_queue;
use super::login::Login;
use super::{BrokerError, CONNECT_TIMEOUT};
use mayfly_protocol::names::InstallationId;
use mayfly_protocol::topology;

const PRECONDITION_FAILED: AMQPErrorKind = AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED);

/// How many times dispatchers are looked for before a virtual host is taken over.
const LOOKS: u32 = 8;
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The virtual host belongs to another installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Name of the virtual host.
    pub vhost: String,
    /// The installation that owns it, if the broker reports it.
    pub theirs: Option<InstallationId>,
    /// The installation of this process.
    pub ours: InstallationId,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vhost, ours, .. } = self;
        write!(f, "the virtual host `{vhost}` of RabbitMQ belongs to ")?;
        match self.theirs {
            Some(theirs) => write!(f, "the installation {theirs}")?,
            None => f.write_str("another installation")?,
        }
        write!(
            f,
            ", and this dispatcher's store is of the installation {ours}: two installations on one virtual host would take each other's messages. Give each its own virtual host (amqp.url). If the other installation is gone for good, stop its dispatchers and run `mayfly-dispatcher --take-over-broker` with the settings of this one"
        )
    }
}

/// Leaves the installation's id in the virtual host, or finds it there.
///
/// # Errors
/// [`BrokerError::Taken`]; the channel is closed then, as after each error.
async fn claim(channel: &Channel, vhost: &str, ours: &InstallationId) -> Result<(), BrokerError> {
    let mut arguments = FieldTable::default();
    let name = AMQPValue::LongString(topology::owned_by(ours).into());
    arguments.insert("alternate-exchange".into(), name);
    let options = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let declared = channel
        .exchange_declare(
            topology::OWNER.into(),
            ExchangeKind::Fanout,
            options,
            arguments,
        )
        .await;
    match declared {
        Ok(()) => Ok(()),
        Err(error) => match error.kind() {
            ErrorKind::ProtocolError(refused) if refused.kind() == &PRECONDITION_FAILED => {
                Err(BrokerError::Taken(Taken {
                    vhost: vhost.to_owned(),
                    theirs: None,
                    ours: *ours,
                }))
            }
            _ => Err(error.into()),
        },
    }
}

/// Calls [`claim`] on a channel of its own. The error has the id of the other installation.
pub(super) async fn claim_on(
    connection: &Connection,
    vhost: &str,
    ours: &InstallationId,
) -> Result<(), BrokerError> {
    let channel = connection.create_channel().await?;
    match claim(&channel, vhost, ours).await {
        Err(BrokerError::Taken(taken)) => {
            let theirs = whose(connection).await?;
            Err(BrokerError::Taken(Taken { theirs, ..taken }))
        }
        Ok(()) => {
            let closing = channel.close(200, "done".into());
            Ok(closing.await?)
        }
        Err(error) => Err(error),
    }
}

/// The owner of the virtual host, for messages to people. If an exchange is declared with another argument,
/// RabbitMQ's error names the argument that it has. The error is cut after 255 bytes (AMQP 0-9-1, `shortstr`), so
/// this declares without any argument.
async fn whose(connection: &Connection) -> Result<Option<InstallationId>, BrokerError> {
    let channel = connection.create_channel().await?;
    let options = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let (name, none) = (topology::OWNER.into(), FieldTable::default());
    let declared = channel.exchange_declare(name, ExchangeKind::Fanout, options, none);
    match declared.await {
        Ok(()) => Ok(None),
        Err(error) => match error.kind() {
            ErrorKind::ProtocolError(refused) => {
                Ok(topology::owners_in(refused.get_message().as_str()).next())
            }
            _ => Err(error.into()),
        },
    }
}

/// Calls [`claim`] when a connection begins. A user without the permission continues without a claim: some operators
/// have removed it.
pub(super) async fn claim_first(
    connection: &Connection,
    vhost: &str,
    ours: &InstallationId,
) -> Result<(), BrokerError> {
    match claim_on(connection, vhost, ours).await {
        Err(BrokerError::NotAllowed(_)) => {
            warn!(
                exchange = topology::OWNER,
                "the broker's user may not declare this exchange, so another installation on this virtual host would not be detected; import deploy/rabbitmq/definitions.json again"
            );
            Ok(())
        }
        done => done,
    }
}

/// Gives the virtual host to this installation. Returns whether it belonged to another installation.
///
/// # Errors
/// [`BrokerError::InUse`] while dispatchers of the other one are connected; the broker is unreachable, or the user
/// lacks the permission.
pub async fn take_over(login: &Login, ours: &InstallationId) -> Result<bool, BrokerError> {
    let access = login
        .read()
        .map_err(|error| BrokerError::Unconfirmed(error.to_string()))?;
    let mut failed = BrokerError::Down;
    for url in &access.urls {
        let properties =
            ConnectionProperties::default().with_connection_name("mayfly-dispatcher".into());
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, access.connect(url, properties));
        let connection = match connecting.await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                failed = error;
                continue;
            }
            Err(_) => continue,
        };
        let done = take_over_on(&connection, &url.vhost, ours).await;
        let closing = connection.close(200, "bye".into());
        let _ = tokio::time::timeout(CONNECT_TIMEOUT, closing).await;
        return done;
    }
    Err(failed)
}

async fn take_over_on(
    connection: &Connection,
    vhost: &str,
    ours: &InstallationId,
) -> Result<bool, BrokerError> {
    match claim_on(connection, vhost, ours).await {
        Err(BrokerError::Taken(_)) => {}
        done => return done.map(|()| false),
    }
    // Only dispatchers consume outcomes. Each does, except shortly after its connection was opened.
    for _ in 0..LOOKS {
        let channel = connection.create_channel().await?;
        let outcomes = find_queue(&channel, topology::OUTCOMES.to_owned()).await?;
        let dispatchers = outcomes.map_or(0, |queue| queue.consumer_count());
        if dispatchers > 0 {
            return Err(BrokerError::InUse(dispatchers));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let channel = connection.create_channel().await?;
    channel
        .exchange_delete(topology::OWNER.into(), ExchangeDeleteOptions::default())
        .await?;
    claim(&channel, vhost, ours).await.map(|()| true)
}
