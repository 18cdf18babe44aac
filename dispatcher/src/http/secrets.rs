//! Secrets. Reading a dynamic secret issues a lease. No other request does, not even HEAD.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mayfly_common::trace::{Span, TraceContext};
use mayfly_protocol::names::SecretPath;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::{info, warn};

use super::auth::{Caller, forbidden};
use super::connection;
use super::credential::credential;
use super::request::{Asked, Body, Named, Nothing, Page, malformed};
use super::{date, leases};
use crate::app::App;
use crate::error::{ApiError, Code, Problems};
use crate::leases::issue;
use crate::leases::order::Order;
use crate::secrets::{self, Content, Kind, Patch};
use crate::servers::check;
use crate::servers::same_server;
use crate::servers::tidy;
use crate::store::{BaseFacts, OfState, Record, Revised, StoreError};
use mayfly_protocol::lease::Event;

const DESCRIPTION: &str = "::description";
const CONNECTION: &str = "::connection";
const KEY_MAX_BYTES: usize = 255;
/// How many times a delete revokes leases again that were issued meanwhile.
const DELETE_ROUNDS: u32 = 10;

fn path(text: &str) -> Result<SecretPath, ApiError> {
    text.parse().map_err(malformed)
}

pub(super) fn view(record: &Record) -> Value {
    json!({
        "id": record.id,
        "path": record.path,
        "attributes": record.attributes,
        "description": record.description,
        // The version is a string, as clients of the compatible product expect.
        "version": record.version.to_string(),
        "created": date(record.created),
        "createdBy": record.created_by,
        "lastModified": date(record.last_modified),
        "lastModifiedBy": record.last_modified_by,
    })
}

fn with_data(record: &Record, data: Value) -> Response {
    let mut shown = view(record);
    shown["data"] = data;
    secret_answer(shown)
}

fn secret_answer(shown: Value) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(shown)).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ListAsked {
    search_term: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// GET /v1/secrets: those the caller may read, without their data.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<ListAsked>,
) -> Result<Json<Value>, ApiError> {
    let page = Page::parse(asked.limit.as_deref(), asked.cursor.as_deref())?;
    let term = asked.search_term.unwrap_or_default().to_lowercase();
    let wanted = move |record: &Record| {
        let mentions = |text: &str| text.to_lowercase().contains(&term);
        caller.may_read(&record.path)
            && (mentions(record.path.as_str())
                || record.description.as_deref().is_some_and(mentions))
    };
    let found = app
        .store
        .secrets(page.after.clone(), page.look_for(), wanted)
        .await?;
    Ok(Json(page.show(
        "secrets",
        found,
        |record| record.path.to_string(),
        view,
    )))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadAsked {
    ttl: Option<String>,
}

/// GET and HEAD /v1/secrets/{path}: reads a secret. With `::description` after the path it returns only the
/// metadata, and with `::connection` only how the server is reached. A base secret is shown without the admin's
/// password and key, which leave the dispatcher only sealed.
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    method: Method,
    headers: HeaderMap,
    Named(name): Named,
    Asked(asked): Asked<ReadAsked>,
) -> Result<Response, ApiError> {
    if let Some(name) = name.strip_suffix(CONNECTION) {
        return connection::read(&app, &caller, path(name)?).await;
    }
    let (name, describe) = match name.strip_suffix(DESCRIPTION) {
        Some(name) => (name, true),
        None => (name.as_str(), method == Method::HEAD),
    };
    let path = path(name)?;
    caller.check_read(&path)?;
    if describe {
        let record = app.store.describe_secret(path).await?;
        return Ok(([(header::CACHE_CONTROL, "no-store")], Json(view(&record))).into_response());
    }
    let read = app.store.read_secret(path).await?;
    if asked.ttl.is_some() && read.record.kind != Kind::Dynamic {
        return Err(malformed("only a dynamic secret is read with a ttl"));
    }
    let base = match (read.record.kind, read.base) {
        (Kind::Static, _) => return Ok(with_data(&read.record, Value::Object(read.data))),
        (Kind::Base, _) => {
            if caller.root_only().is_err() {
                return Err(forbidden("only the root token may read a base secret"));
            }
            return Ok(with_data(
                &read.record,
                Value::Object(secrets::shown_base(read.data)),
            ));
        }
        (Kind::Dynamic, Some(base)) => base,
        (Kind::Dynamic, None) => {
            return Err(StoreError::Unavailable("no base secret".to_owned()).into());
        }
    };
    let traceparent = headers
        .get("traceparent")
        .and_then(|value| value.to_str().ok());
    let span = Span::serve("issue", traceparent);
    let key = idempotency_key(&headers)?;
    let order = Order {
        key,
        ..order(
            &app,
            &caller,
            read.record,
            base,
            asked.ttl.as_deref(),
            span.context().clone(),
        )?
    };
    let trace = order.trace.trace();
    let issued = issue::issue(&app, order, span)
        .await
        .map_err(|error| caller.hears(error, &trace))?;
    let mut shown = view(&issued.record);
    shown["data"] = credential(&issued);
    if !issued.warnings.is_empty() {
        shown["warnings"] = json!(issued.warnings);
    }
    let mut response = secret_answer(shown);
    if issued.again {
        let headers = response.headers_mut();
        headers.insert("idempotency-replayed", HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// The `Idempotency-Key` of a read. A second read with the same key gets the same lease.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let key = value.to_str().ok().map(str::trim).filter(|key| {
        let is_plain = key.bytes().all(|byte| (0x21..=0x7e).contains(&byte));
        (1..=KEY_MAX_BYTES).contains(&key.len()) && is_plain && values.next().is_none()
    });
    let reason =
        || format!("must be one word of 1 to {KEY_MAX_BYTES} visible ASCII characters, given once");
    key.map(|key| Some(key.to_owned())).ok_or_else(|| {
        ApiError::invalid(Problems::from([(
            "Idempotency-Key".to_owned(),
            vec![reason()],
        )]))
    })
}

pub(super) fn order(
    app: &App,
    caller: &Caller,
    record: Record,
    base: BaseFacts,
    ttl: Option<&str>,
    trace: TraceContext,
) -> Result<Order, ApiError> {
    // The stored secret was checked when it was written. The present limit is applied below.
    let dynamic = record.dynamic()?;
    let most = dynamic.ttl_seconds.min(app.limits.max_ttl_seconds);
    let ttl_seconds = match ttl.map(str::parse) {
        None => most,
        Some(Ok(seconds)) if (1..=most).contains(&seconds) => seconds,
        Some(_) => {
            let reason =
                format!("must be an integer from 1 to {most}, the maximum for this secret");
            return Err(ApiError::invalid(Problems::from([(
                "ttl".to_owned(),
                vec![reason],
            )])));
        }
    };
    Ok(Order {
        max_ttl_seconds: dynamic
            .max_ttl_seconds
            .min(app.limits.max_ttl_seconds)
            .max(ttl_seconds),
        most_of_caller: caller.max_leases(),
        key: None,
        for_trial: false,
        record,
        dynamic,
        base,
        ttl_seconds,
        who: caller.name(),
        trace,
    })
}

/// POST /v1/secrets/{path}: adds a secret.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    caller.root_only()?;
    let path = path(&name)?;
    let content = secrets::Body::parse(body, &path, false)?.into_content();
    let spec = secrets::parse(&content, app.limits.max_ttl_seconds).map_err(ApiError::invalid)?;
    let now = app.now();
    let record = Record {
        id: new_id(),
        path,
        kind: spec.kind(),
        attributes: content.attributes.clone(),
        description: content.description.clone(),
        version: 1,
        created: now,
        created_by: caller.name(),
        last_modified: now,
        last_modified_by: caller.name(),
    };
    let record = app
        .store
        .create_secret(record, Revised { content, spec })
        .await?;
    info!(path = %record.path, kind = record.kind.as_str(), by = record.created_by, "secret created");
    Ok((StatusCode::CREATED, Json(view(&record))).into_response())
}

/// Ids sort by the time they were made, as those of leases do.
fn new_id() -> String {
    mayfly_protocol::names::LeaseId::random().to_string()
}

/// PUT /v1/secrets/{path}: merges the body into a secret, or replaces it with `overwrite`. Live leases keep the
/// values that they were made with. The exception is `sameServer`, which states that a base secret names the same
/// server at another place.
pub(super) async fn update(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let path = path(&name)?;
    let patch = Patch::parse(body, &path, true)?;
    let same_server = patch.says_same_server();
    if same_server {
        let kind = app.store.describe_secret(path.clone()).await?.kind;
        if kind != Kind::Base {
            let reason = format!("is for base secrets; this is a {} secret", kind.as_str());
            return Err(ApiError::invalid(Problems::from([(
                "sameServer".to_owned(),
                vec![reason],
            )])));
        }
        if patch.is_empty() {
            return Ok(Json(moved(&app, path).await?));
        }
    }
    let most = app.limits.max_ttl_seconds;
    let revise = move |old: Content| {
        let (content, spec) = secrets::revise(patch, old, most)?;
        Ok(Revised { content, spec })
    };
    let before = app.store.base(path.clone()).await.ok();
    let record = app
        .store
        .update_secret(path.clone(), revise, caller.name(), app.now())
        .await?;
    app.reconcile.notify_one();
    info!(path = %record.path, version = record.version, by = record.last_modified_by, "secret updated");
    let mut shown = match same_server {
        true => moved(&app, path.clone()).await?,
        false => view(&record),
    };
    if let Some(before) = before
        && let Some(warning) = check::another_admin(&app, &path, &before).await
    {
        warn!(%path, warning = warning["message"].as_str(), "the admin of a base secret has changed");
        shown["warnings"] = json!([warning]);
    }
    Ok(Json(shown))
}

/// Binds the leases of a base secret to the server that it names now.
async fn moved(app: &App, path: SecretPath) -> Result<Value, ApiError> {
    let leases = same_server::bind(app, &path).await?;
    let mut shown = view(&app.store.describe_secret(path).await?);
    shown["leasesBound"] = leases.into();
    Ok(shown)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteAsked {
    leases: Option<String>,
}

/// DELETE /v1/secrets/{path}: removes a secret.
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(asked): Asked<DeleteAsked>,
) -> Result<StatusCode, ApiError> {
    caller.root_only()?;
    let path = path(&name)?;
    let ending = match asked.leases.as_deref() {
        None => None,
        Some("revoke") => Some(Event::RevokeAsked),
        Some("detach") => Some(Event::Detached { by: caller.name() }),
        Some(_) => return Err(malformed("leases must be `revoke` or `detach`")),
    };
    // Roles that the deletion may leave behind on the server.
    let facts = match app.store.describe_secret(path.clone()).await?.kind {
        Kind::Static => None,
        Kind::Base => {
            tidy::before_delete(&app, path.clone()).await;
            None
        }
        Kind::Dynamic => app.store.read_secret(path.clone()).await?.base,
    };
    if let Some(detach @ Event::Detached { .. }) = &ending {
        // The detached leases include those that are being revoked. They would not prevent the deletion.
        let detached =
            leases::end_all(&app, &path, &[OfState::Live, OfState::Revoking], detach).await?;
        if detached > 0 {
            warn!(%path, detached, by = caller.name(), "leases detached; their accounts may still exist");
        }
    }
    let mut deleted = app.store.delete_secret(path.clone()).await;
    let mut rounds = 0;
    while let Err(StoreError::InUse(_)) = &deleted
        && let Some(event) = &ending
        && rounds < DELETE_ROUNDS
        && app.store.describe_secret(path.clone()).await?.kind == Kind::Dynamic
    {
        rounds += 1;
        leases::end_all(&app, &path, &[OfState::Live], event).await?;
        deleted = app.store.delete_secret(path.clone()).await;
    }
    deleted.map_err(|error| match error {
        StoreError::InUse(message) => ApiError::new(Code::InUse, message),
        other => other.into(),
    })?;
    if let Some(facts) = facts {
        app.tidying.add(facts);
    }
    info!(%path, by = caller.name(), "secret deleted");
    Ok(StatusCode::NO_CONTENT)
}
