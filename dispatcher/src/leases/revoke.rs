//! Ends a lease on request, and sends the messages that follow from an event.

use mayfly_common::broker::BrokerError;
use mayfly_protocol::names::LeaseId;
use tracing::warn;

use super::trace_of;
use crate::app::App;
use crate::engines::outbox;
use crate::error::ApiError;
use crate::store::{Applied, LeaseAccess};
use mayfly_protocol::lease::{Event, Lease, ToSend};

/// Has a lease revoked: marks it, then sends the engines a revocation. If the broker is unreachable, the mark is
/// enough: the reconciler sends the revocation later.
///
/// # Errors
/// `not_found`, `store_unavailable`.
pub(crate) async fn revoke_now(app: &App, id: LeaseId) -> Result<Lease, ApiError> {
    let applied = app.store.apply(id, Event::RevokeAsked, app.now()).await?;
    send_what_follows(app, &applied).await;
    Ok(applied.lease)
}

/// Sends the messages that follow from an event. The reconciler repeats those that fail here.
pub(crate) async fn send_what_follows(app: &App, applied: &Applied) {
    let Some(access) = &applied.access else {
        return;
    };
    let sent = match applied.send {
        ToSend::Nothing => return,
        ToSend::RevokeNow => outbox::now(app, access).await,
        ToSend::OtherCredentials if access.candidates < 2 => return,
        ToSend::OtherCredentials | ToSend::Copy => outbox::copy(app, access).await,
        ToSend::Retry => retry_each_candidate(app, access).await,
    };
    if let Err(error) = sent {
        warn!(lease = %applied.lease.id, trace = trace_of(&applied.lease), %error,
            "a revocation was not published; the reconciler publishes it");
    }
}

/// Sends a copy for each credential candidate: the person who requests a retry may have repaired any of them.
async fn retry_each_candidate(app: &App, first: &LeaseAccess) -> Result<(), BrokerError> {
    let mut sent = outbox::asked_copy(app, first).await;
    for turn in 1..first.candidates {
        if let Ok(Some(access)) = app.store.lease_access(first.lease.id, turn).await {
            sent = sent.and(outbox::asked_copy(app, &access).await);
        }
    }
    sent
}
