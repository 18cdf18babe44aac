//! Sealing a message to a pool.

use mayfly_common::broker::BrokerError;
use mayfly_protocol::request::RequestId;
use mayfly_protocol::seal::Form;
use mayfly_protocol::task::Head;
use tracing::error;

use crate::app::App;
use crate::store::Recipient;

/// Seals a body to a pool in the form that every engine opens.
///
/// # Errors
/// `Down` if X25519 refuses the key, or if this dispatcher does not have its own key of that generation yet: it
/// reads a renewed key within 1 s.
pub(super) fn seal<T: serde::Serialize>(
    app: &App,
    head: &Head,
    to: &Recipient,
    body: &T,
) -> Result<Vec<u8>, BrokerError> {
    seal_as(app, Form::Alone, head, to, body, None)
}

/// Seals a body to a pool in the form that its present engines open. If an engine of an earlier version gets the
/// revocation later, it parks it again. The reconciler's copy then has the form that it can open.
///
/// # Errors
/// See [`seal`].
pub(super) async fn seal_often<T: serde::Serialize>(
    app: &App,
    head: &Head,
    to: &Recipient,
    body: &T,
    request: Option<RequestId>,
) -> Result<Vec<u8>, BrokerError> {
    let form = match app.registry.form(&head.pool, 0) {
        Form::Alone => Form::Alone,
        // An engine may consume before its first heartbeat.
        Form::Shared => match app.broker.engines_of(&head.pool).await {
            Ok(engines) => app.registry.form(&head.pool, engines),
            Err(_) => Form::Alone,
        },
    };
    seal_as(app, form, head, to, body, request)
}

/// Seals a request in the form that every engine opens. The answer names the request.
///
/// # Errors
/// See [`seal`].
pub(super) fn seal_request<T: serde::Serialize>(
    app: &App,
    head: &Head,
    to: &Recipient,
    body: &T,
    request: RequestId,
) -> Result<Vec<u8>, BrokerError> {
    seal_as(app, Form::Alone, head, to, body, Some(request))
}

fn seal_as<T: serde::Serialize>(
    app: &App,
    form: Form,
    head: &Head,
    to: &Recipient,
    body: &T,
    request: Option<RequestId>,
) -> Result<Vec<u8>, BrokerError> {
    let sealed = app.identity.keys.sender(to.from);
    let sealed = sealed.and_then(|keys| head.seal_request(form, &keys, &to.key, body, request));
    sealed.map_err(|error| {
        error!(%error, pool = %head.pool, "a task cannot be sealed to its pool");
        BrokerError::Down
    })
}
