//! Leases in the store. What an event makes of one is decided by [`mayfly_protocol::lease::next`]; here
//! it is loaded, changed and written in one job.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, PoolName, RoleName, SecretPath};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{FailureCode, Place};

use super::authentic::{self, Entry, LEASES, READS};
use super::sealer::Sealer;
use super::sql::{Cell, Connection, Params, params};
use super::{
    Recipient, Store, StoreError, after_children, exists, generations, moment, pools, rotations,
    secrets, unproven, unreadable,
};
use crate::leases::password::Nonce;
use crate::store::Generation;
use mayfly_protocol::lease::{self, BaseRef, Event, Lease, State, Status, ToSend};

/// What is needed to have an account ended.
#[derive(Debug, Clone)]
pub(crate) struct Revocation {
    /// The lease.
    pub(crate) lease: Lease,
    /// The admin connection to use: one of [`Revocation::ways`].
    pub(crate) target: Target,
    /// The admin connection it was made with.
    pub(crate) own_target: Target,
    /// How many there are: what it was made with, and where the base secret has changed since,
    /// what that says now.
    pub(crate) ways: u32,
    /// Messages of it may be parked that its pool's engines cannot open any more.
    pub(crate) new_key: bool,
    /// Another pool was to end it before.
    pub(crate) taken_over: bool,
    /// The server its account is on, or was about to be.
    pub(crate) server: Option<String>,
    /// Whom to seal it to.
    pub(crate) recipient: Recipient,
}

impl Revocation {
    /// Whether its target is at the address where the lease was made.
    pub(crate) fn place(&self) -> Place {
        match self.target.address() == self.own_target.address() {
            true => Place::Own,
            false => Place::Other,
        }
    }
}

/// What an event made of a lease.
#[derive(Debug)]
pub(crate) struct Applied {
    /// The lease as it is now.
    pub(crate) lease: Lease,
    /// Its state before.
    pub(crate) before: State,
    /// What to send.
    pub(crate) send: ToSend,
    /// With what; there when something is to be sent and still can be.
    pub(crate) revocation: Option<Revocation>,
}

/// On which conditions a lease is recorded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conditions {
    /// The caller's name for the read.
    pub(crate) key: Option<String>,
    /// A lease of the same caller and secret that lives for so long is taken instead.
    pub(crate) share_for: Option<Duration>,
    /// What its password is derived from: the generation of the key, and its nonce.
    pub(crate) nonce: Option<(Generation, Nonce)>,
    /// Most leases of the secret.
    pub(crate) most_of_secret: Option<u64>,
    /// Most leases of the secret and caller.
    pub(crate) most_of_secret_and_caller: Option<u64>,
    /// Most leases of the caller.
    pub(crate) most_of_caller: Option<u64>,
}

/// What became of a lease to be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It is recorded.
    New,
    /// It is not: this one is the answer.
    Known(LeaseId),
}

/// Which leases to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Of this path and those below.
    pub(crate) path: Option<SecretPath>,
    /// Of this path alone.
    pub(crate) exact_path: Option<SecretPath>,
    /// Of this pool.
    pub(crate) pool: Option<PoolName>,
    /// Shown in this state, see [`crate::leases::shown`].
    pub(crate) state: Option<State>,
    /// Only those that are shown as stuck.
    pub(crate) stuck: bool,
    /// Of this account.
    pub(crate) role: Option<RoleName>,
    /// Of this token.
    pub(crate) created_by: Option<String>,
}

/// Which leases are shown in a state, in parts of which each is found by its own index.
fn shown_in(state: Option<State>) -> &'static [&'static str] {
    match state {
        None => &[""],
        Some(State::Pending) => &[" AND state = 'pending'"],
        Some(State::Active) => &[" AND state = 'active'"],
        Some(State::Revoking) => &[" AND state = 'revoking' AND revoked_at IS NULL"],
        Some(State::Revoked) => &[
            " AND state = 'revoked'",
            " AND state = 'revoking' AND revoked_at IS NOT NULL AND expiration IS NOT NULL",
        ],
        Some(State::Failed) => &[
            " AND state = 'failed'",
            " AND state = 'revoking' AND revoked_at IS NOT NULL AND expiration IS NULL",
        ],
    }
}

impl Filter {
    /// Conditions but for the state, and their values.
    fn sql(&self) -> (String, Vec<Cell>) {
        let (mut sql, mut values) = (String::from("WHERE 1 = 1"), Vec::new());
        let mut add = |condition: &str, value: String| {
            sql.push_str(" AND ");
            sql.push_str(condition);
            values.push(Cell::Text(value));
        };
        if let Some(pool) = &self.pool {
            add("pool = ?", pool.to_string());
        }
        if let Some(role) = &self.role {
            add("role = ?", role.to_string());
        }
        if let Some(who) = &self.created_by {
            add("created_by = ?", who.clone());
        }
        if let Some(path) = &self.exact_path {
            add("path = ?", path.to_string());
        }
        if let Some(path) = &self.path {
            // The path itself or `path:…`; nothing sorts between the two but `path` with a
            // character below `:`, which the second condition takes out.
            add("path >= ?", path.to_string());
            add("path < ?", after_children(path.as_str()));
            add("(path = ?", path.to_string());
            sql.push_str(" OR path >= ?)");
            values.push(Cell::Text(format!("{path}:")));
        }
        if self.stuck {
            sql.push_str(" AND stuck = 1 AND revoked_at IS NULL");
        }
        (sql, values)
    }
}

/// What changes in the status of a lease.
const COURSE: [&str; 17] = [
    "state",
    "expiration",
    "server",
    "engine",
    "revoked_at",
    "revoked_by",
    "attempts",
    "last_error",
    "stuck",
    "renewable_until",
    "objects",
    "next_try",
    "skew_ms",
    "next_reconcile",
    "reconcile_attempts",
    "ends_here",
    "nonce",
];
/// One that is not authentic is looked at so often, in case that it is mended.
const REFUSED_AGAIN: Duration = Duration::from_mins(5);

fn from_entry(row: &Entry) -> Result<Lease, StoreError> {
    fn name<T: std::str::FromStr>(row: &Entry, column: &'static str) -> Result<T, StoreError> {
        row.get::<String>(column)?
            .parse()
            .map_err(|_| unreadable(column))
    }
    let maybe = |column| row.get::<Option<i64>>(column)?.map(moment).transpose();
    let engine = |column| {
        let name = row.get::<Option<String>>(column)?;
        name.map(|name| name.parse().map_err(|_| unreadable(column)))
            .transpose()
    };
    let owned: String = row.get("owned_objects")?;
    let objects: Option<String> = row.get("objects")?;
    Ok(Lease {
        id: name(row, "id")?,
        path: name(row, "path")?,
        pool: name(row, "pool")?,
        role: name(row, "role")?,
        base: BaseRef {
            id: row.get("base_secret_id")?,
            version: row.get("base_version")?,
        },
        database: row.get("database")?,
        owned_objects: serde_json::from_str(&owned)
            .map_err(|_| unreadable("leases.owned_objects"))?,
        traceparent: row.get("traceparent")?,
        created: moment(row.get("created")?)?,
        created_by: row.get("created_by")?,
        secret_version: row.get("secret_version")?,
        ttl_seconds: row.get("ttl_seconds")?,
        max_ttl_seconds: row.get("max_ttl_seconds")?,
        create_deadline: moment(row.get("create_deadline")?)?,
        status: Status {
            state: State::parse(&row.get::<String>("state")?)
                .ok_or_else(|| unreadable("leases.state"))?,
            expiration: maybe("expiration")?,
            renewable_until: maybe("renewable_until")?,
            server: row.get("server")?,
            engine: engine("engine")?,
            revoked_at: maybe("revoked_at")?,
            revoked_by: engine("revoked_by")?,
            attempts: row.get("attempts")?,
            last_error: row.get("last_error")?,
            objects: objects
                .map(|text| serde_json::from_str(&text).map_err(|_| unreadable("leases.objects")))
                .transpose()?
                .unwrap_or_default(),
            next_try: maybe("next_try")?,
            skew_ms: row.get("skew_ms")?,
            stuck: row.get("stuck")?,
            next_reconcile: maybe("next_reconcile")?,
            reconcile_attempts: row.get("reconcile_attempts")?,
        },
    })
}

/// A new lease as it is written.
fn entry(lease: &Lease, nonce: Option<&(Generation, Nonce)>) -> Result<Entry, StoreError> {
    let owned =
        serde_json::to_string(&lease.owned_objects).map_err(|_| unreadable("owned_objects"))?;
    let mut row = LEASES.blank();
    for (column, value) in [
        ("id", Cell::from(lease.id.to_string())),
        ("path", lease.path.as_str().into()),
        ("pool", lease.pool.as_str().into()),
        ("role", lease.role.as_str().into()),
        ("base_secret_id", (&lease.base.id).into()),
        ("base_version", lease.base.version.into()),
        ("database", (&lease.database).into()),
        ("owned_objects", owned.into()),
        ("traceparent", (&lease.traceparent).into()),
        ("created", lease.created.as_millisecond().into()),
        ("created_by", (&lease.created_by).into()),
        ("ttl_seconds", lease.ttl_seconds.into()),
        ("max_ttl_seconds", lease.max_ttl_seconds.into()),
        (
            "create_deadline",
            lease.create_deadline.as_millisecond().into(),
        ),
        ("secret_version", lease.secret_version.into()),
        ("nonce", nonce.map(|(_, nonce)| nonce.expose()).into()),
        (
            "derivation",
            nonce.map(|(generation, _)| *generation).into(),
        ),
    ]
    .into_iter()
    .chain(status(lease)?)
    {
        row.set(column, value);
    }
    Ok(row)
}

/// The columns of a lease's status.
fn status(lease: &Lease) -> Result<[(&'static str, Cell); 16], StoreError> {
    let status = &lease.status;
    let objects = match status.objects.as_slice() {
        [] => None,
        list => Some(serde_json::to_string(list).map_err(|_| unreadable("objects"))?),
    };
    Ok([
        ("state", status.state.as_str().into()),
        ("expiration", ms(status.expiration).into()),
        ("server", status.server.as_deref().into()),
        (
            "engine",
            status.engine.as_ref().map(|engine| engine.as_str()).into(),
        ),
        ("revoked_at", ms(status.revoked_at).into()),
        (
            "revoked_by",
            status
                .revoked_by
                .as_ref()
                .map(|engine| engine.as_str())
                .into(),
        ),
        ("attempts", status.attempts.into()),
        ("last_error", status.last_error.as_deref().into()),
        ("stuck", status.stuck.into()),
        ("renewable_until", ms(status.renewable_until).into()),
        ("objects", objects.into()),
        ("next_try", ms(status.next_try).into()),
        ("skew_ms", status.skew_ms.into()),
        ("next_reconcile", ms(status.next_reconcile).into()),
        ("reconcile_attempts", status.reconcile_attempts.into()),
        (
            "ends_here",
            ms(status.expiration.map(|end| status.to_store_clock(end))).into(),
        ),
    ])
}

/// Those that are authentic.
pub(super) fn select(
    connection: &Connection,
    rest: &str,
    values: impl Params,
) -> Result<Vec<Lease>, StoreError> {
    let rows = authentic::sound_rows(connection, &LEASES, rest, values)?;
    rows.iter().map(from_entry).collect()
}

/// The same; the others are put off.
pub(super) fn select_due(
    connection: &Connection,
    rest: &str,
    values: impl Params,
    now: Timestamp,
) -> Result<Vec<Lease>, StoreError> {
    let mut found = Vec::new();
    for row in authentic::looked_at(connection, &LEASES, rest, values)? {
        match row {
            Ok(row) => found.push(from_entry(&row)?),
            Err(refused) => {
                let mut values = refused.key().to_vec();
                values.push((now + REFUSED_AGAIN).as_millisecond().into());
                connection.execute(
                    "UPDATE leases SET next_reconcile = ?2 WHERE id = ?1",
                    values,
                )?;
            }
        }
    }
    Ok(found)
}

pub(super) fn load(connection: &Connection, id: LeaseId) -> Result<Lease, StoreError> {
    let found = authentic::row(connection, &LEASES, "WHERE id = ?1", [id.to_string()])?;
    from_entry(&found.ok_or_else(|| StoreError::NotFound(format!("lease {id}")))?)
}

fn ms(at: Option<Timestamp>) -> Option<i64> {
    at.map(Timestamp::as_millisecond)
}

/// A caller's key as the store has it. A dispatcher of the version before derives passwords from
/// lease ids and would give a wrong one: it does not find the leases of this version.
fn read_key(key: &str) -> String {
    format!("nonce|{key}")
}

/// The lease that answers the read instead of a new one, if there is one.
fn known(
    connection: &Connection,
    lease: &Lease,
    conditions: &Conditions,
    now: Timestamp,
) -> Result<Option<LeaseId>, StoreError> {
    if let Some(key) = &conditions.key {
        let found = authentic::row(
            connection,
            &READS,
            "WHERE created_by = ?1 AND path = ?2 AND key IN (?3, ?4) ORDER BY key = ?3 DESC LIMIT 1",
            params![lease.created_by, lease.path.as_str(), read_key(key), key],
        )?;
        let found = match found {
            Some(read) => {
                let id = [read.get::<String>("lease")?];
                let found = authentic::row(connection, &LEASES, "WHERE id = ?1", id)?;
                found.map(|row| from_entry(&row)).transpose()?
            }
            None => None,
        };
        // Where nobody ever got a credential, the read begins anew.
        if let Some(found) = found
            && (found.status.state == State::Pending || found.status.expiration.is_some())
        {
            return Ok(Some(found.id));
        }
    }
    let Some(life) = conditions.share_for else {
        return Ok(None);
    };
    let found = select(
        connection,
        "WHERE path = ?1 AND created_by = ?2 AND next_reconcile IS NOT NULL AND revoked_at IS NULL
         AND secret_version = ?3 AND base_secret_id = ?4 AND base_version = ?5
         AND (state = 'pending' AND create_deadline > ?6 AND 1000 * ttl_seconds >= ?8
              OR state = 'active' AND engine IS NOT NULL AND ends_here >= ?7)
         ORDER BY id DESC LIMIT 1",
        params![
            lease.path.as_str(),
            lease.created_by,
            lease.secret_version,
            lease.base.id,
            lease.base.version,
            now.as_millisecond(),
            (now + life).as_millisecond(),
            i64::try_from(life.as_millis()).unwrap_or(i64::MAX),
        ],
    )?;
    Ok(found.first().map(|found| found.id))
}

/// Refuses one lease too many. Counted where it is inserted, so that it is exact.
fn check_quotas(
    connection: &Connection,
    lease: &Lease,
    conditions: &Conditions,
    now: Timestamp,
) -> Result<(), StoreError> {
    let held = "next_reconcile IS NOT NULL AND revoked_at IS NULL";
    let (path, who) = (lease.path.as_str(), lease.created_by.as_str());
    let limits = [
        (
            conditions.most_of_secret,
            format!("path = ?1 AND {held}"),
            vec![path],
            format!("maxLeases of `{path}`"),
        ),
        (
            conditions.most_of_secret_and_caller,
            format!("path = ?1 AND created_by = ?2 AND {held}"),
            vec![path, who],
            format!("maxLeasesPerCaller of `{path}`"),
        ),
        (
            conditions.most_of_caller,
            format!("created_by = ?1 AND {held}"),
            vec![who],
            "maxLeases of this token".to_owned(),
        ),
    ];
    for (most, condition, values, name) in limits {
        let Some(most) = most else { continue };
        let values: Vec<Cell> = values.into_iter().map(Cell::from).collect();
        // Counted no further than needed.
        let count = format!(
            "SELECT count(*) FROM (SELECT 1 FROM leases WHERE {condition} LIMIT ?{}) AS held",
            values.len() + 1
        );
        let mut limited = values.clone();
        limited.push(Cell::Int(i64::try_from(most).unwrap_or(i64::MAX)));
        let count: u64 = connection
            .prepare(&count)?
            .query_row(limited, |row| row.get(0))?;
        if count >= most {
            // One whose create is under way ends at its own date, which is not known yet.
            let first = format!(
                "SELECT min(coalesce(ends_here, created + 1000 * ttl_seconds)) FROM leases WHERE {condition}"
            );
            let first: Option<i64> = connection
                .prepare(&first)?
                .query_row(values, |row| row.get(0))?;
            let until = first.map(moment).transpose()?;
            let when = match until {
                Some(at) if at > now => format!("; a place frees up by {at:.0}"),
                Some(_) => "; a place frees up when an account that is overdue is gone".to_owned(),
                None => String::new(),
            };
            return Err(StoreError::Quota {
                message: format!(
                    "{name}: {count} of {most} leases are out{when}, or when one is revoked"
                ),
                until,
            });
        }
    }
    Ok(())
}

pub(super) fn write_course(connection: &Connection, lease: &Lease) -> Result<(), StoreError> {
    let which = "WHERE id = ?1";
    let mut row = authentic::row(connection, &LEASES, which, [lease.id.to_string()])?
        .ok_or_else(|| StoreError::NotFound(format!("lease {}", lease.id)))?;
    for (column, value) in status(lease)? {
        row.set(column, value);
    }
    // Nobody is given the password again.
    if !matches!(lease.status.state, State::Pending | State::Active) {
        row.set("nonce", None::<Vec<u8>>);
    }
    authentic::update(connection, &row, &COURSE)
}

/// What a revocation of the lease needs; none once that is no longer kept, and where its pool is
/// distrusted. `turn` chooses among the ways to reach the server: the n-th try takes the n-th way,
/// round and round. What the base secret says now is only for a pool that may have it, see
/// [`rotations::may_have`]: any other gets no credentials newer than its lease.
pub(super) fn revocation(
    connection: &Connection,
    sealer: &Sealer,
    lease: &Lease,
    turn: u32,
) -> Result<Option<Revocation>, StoreError> {
    let Some((own, seen)) = secrets::load_target(connection, sealer, &lease.base)? else {
        return Ok(None);
    };
    let server = lease.status.server.clone().or(seen);
    let newest = secrets::newest_version(connection, &lease.base.id)?
        .filter(|version| *version != lease.base.version)
        .map(|version| BaseRef {
            id: lease.base.id.clone(),
            version,
        });
    let (mut present, mut between) = (None, Vec::new());
    if let Some(newest) = newest
        && rotations::may_have(connection, &newest, &lease.pool)?
    {
        present = secrets::load_target(connection, sealer, &newest)?.map(|(target, _)| target);
        between = secrets::targets_between(connection, sealer, &lease.base, newest.version)?;
    }
    let mut ways = ways(&own, present, server.is_some());
    also_as_its_maker(&mut ways, &own, between);
    let pool = match pools::load(connection, &lease.pool) {
        Ok(pool) => pool,
        Err(StoreError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Ok(recipient) = pool.recipient() else {
        return Ok(None);
    };
    let count = u32::try_from(ways.len()).unwrap_or(u32::MAX);
    let way = usize::try_from(turn % count.max(1)).unwrap_or(0);
    Ok(Some(Revocation {
        lease: lease.clone(),
        target: ways.into_iter().nth(way).unwrap_or_else(|| own.clone()),
        own_target: own,
        ways: count,
        new_key: pool.has_new_keys(),
        taken_over: false,
        server,
        recipient,
    }))
}

/// The ways to end an account, likeliest first: where it was made, with what works there now.
/// Elsewhere only where the server is known by its identity, so that it is never taken for
/// another. Credentials never go to an address under less protection than they were given with
/// for it.
fn ways(own: &Target, present: Option<Target>, is_known: bool) -> Vec<Target> {
    let Some(present) = present.filter(|present| present != own) else {
        return vec![own.clone()];
    };
    // These credentials, in the way in which that address is reached.
    let by = |way: &Target, credentials: &Target| Target {
        database: credentials.database.clone(),
        username: credentials.username.clone(),
        password: credentials.password.clone(),
        sslcert: credentials.sslcert.clone(),
        sslkey: credentials.sslkey.clone(),
        ..way.clone()
    };
    if (&present.host, present.port) == (&own.host, own.port) {
        let before = by(&present, own);
        return match before == present {
            true => vec![present],
            false => vec![present, before],
        };
    }
    let mut ways = vec![own.clone()];
    if is_known {
        ways.push(present.clone());
    }
    ways.push(Target {
        auth: own.auth.min(present.auth),
        ..by(own, &present)
    });
    ways
}

/// From PostgreSQL 16 on only who made an account may end it, so the passwords that its maker had
/// since are tried as well: those of `between`, at the address where it was made.
fn also_as_its_maker(ways: &mut Vec<Target>, own: &Target, between: Vec<Target>) {
    for target in between {
        let is_maker =
            target.username == own.username && (&target.host, target.port) == (&own.host, own.port);
        let is_new = |way: &Target| {
            (&way.host, way.port, &way.username, &way.password)
                != (
                    &target.host,
                    target.port,
                    &target.username,
                    &target.password,
                )
        };
        if is_maker && ways.iter().all(is_new) {
            // In the way in which the address is reached now.
            let first = ways
                .iter()
                .find(|way| (&way.host, way.port) == (&own.host, own.port));
            let first = first.unwrap_or(own);
            ways.push(Target {
                database: target.database,
                username: target.username,
                password: target.password,
                sslcert: target.sslcert,
                sslkey: target.sslkey,
                ..first.clone()
            });
        }
    }
}

pub(super) fn apply(
    connection: &Connection,
    sealer: &Sealer,
    mut lease: Lease,
    event: Event,
    now: Timestamp,
) -> Result<Applied, StoreError> {
    let seen = match &event {
        Event::Created(created, _) => Some(created.server.clone()),
        _ => None,
    };
    match &event {
        Event::Created(..) => unproven::proven(connection, &lease.base, lease.created)?,
        Event::Failing { failure, .. } if failure.code == FailureCode::DatabaseRefusedLogin => {
            unproven::doubt(connection, &lease.base, now)?;
        }
        _ => {}
    }
    let before = lease.status.state;
    let change = lease::next(&lease, event, now);
    if change.status != lease.status {
        lease.status = change.status;
        write_course(connection, &lease)?;
    }
    if let Some(server) = seen {
        secrets::saw_server(connection, &lease.base, &server)?;
    }
    let revocation = match change.send {
        ToSend::Nothing => None,
        // The likeliest way, whatever came of those before.
        ToSend::RevokeNow | ToSend::Copy | ToSend::Retry => {
            revocation(connection, sealer, &lease, 0)?
        }
        // The first way failed just now.
        ToSend::OtherCredentials => revocation(connection, sealer, &lease, lease.status.attempts)?,
    };
    Ok(Applied {
        lease,
        before,
        send: change.send,
        revocation,
    })
}

impl Store {
    /// Records a lease before its account is made; or finds the one that is the answer already.
    ///
    /// # Errors
    /// `NotFound` where the secret went away meanwhile; `Quota`.
    pub(crate) async fn admit(
        &self,
        lease: Lease,
        conditions: Conditions,
        now: Timestamp,
    ) -> Result<Admission, StoreError> {
        self.run(move |connection| {
            if !exists(
                connection,
                "SELECT 1 FROM secrets WHERE path = ?1",
                lease.path.as_str(),
            )? {
                return Err(StoreError::NotFound(format!("secret `{}`", lease.path)));
            }
            pools::load(connection, &lease.pool)?.recipient()?;
            let known = known(connection, &lease, &conditions, now)?;
            if known.is_none() {
                check_quotas(connection, &lease, &conditions, now)?;
                if let Some((generation, _)) = &conditions.nonce {
                    generations::check(connection, *generation)?;
                }
                authentic::insert(connection, &entry(&lease, conditions.nonce.as_ref())?)?;
            }
            if let Some(key) = &conditions.key {
                let entry = READS.entry(params![
                    lease.created_by,
                    lease.path.as_str(),
                    read_key(key),
                    known.unwrap_or(lease.id).to_string(),
                ]);
                authentic::put(connection, &entry, &["lease"])?;
            }
            Ok(known.map_or(Admission::New, Admission::Known))
        })
        .await
    }

    /// What a revocation of a lease needs, the `turn`-th way; none once that is no longer kept.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn revocation(
        &self,
        id: LeaseId,
        turn: u32,
    ) -> Result<Option<Revocation>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let lease = load(connection, id)?;
            revocation(connection, &sealer, &lease, turn)
        })
        .await
    }

    /// Those of the leases that this store has.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn leases_of(&self, ids: Vec<LeaseId>) -> Result<Vec<Lease>, StoreError> {
        self.run(move |connection| {
            let mut found = Vec::new();
            for id in ids {
                found.extend(select(connection, "WHERE id = ?1", [id.to_string()])?);
            }
            Ok(found)
        })
        .await
    }

    /// Leases of a base secret and pool that somebody holds, after `cursor` (an id, or empty).
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn active_of_base(
        &self,
        base: String,
        pool: PoolName,
        cursor: String,
        limit: u32,
    ) -> Result<Vec<Lease>, StoreError> {
        self.run(move |connection| {
            select(
                connection,
                "WHERE base_secret_id = ?1 AND pool = ?2 AND state = 'active' AND next_reconcile IS NOT NULL AND id > ?3
                 ORDER BY id LIMIT ?4",
                params![base, pool.as_str(), cursor, limit],
            )
        })
        .await
    }

    /// Lets an event happen to a lease.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn apply(
        &self,
        id: LeaseId,
        event: Event,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| apply(connection, &sealer, load(connection, id)?, event, now))
            .await
    }

    /// A lease.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn lease(&self, id: LeaseId) -> Result<Lease, StoreError> {
        self.run(move |connection| load(connection, id)).await
    }

    /// Leases, the newest first, those after `cursor` (an id, or empty), at most `limit`.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn leases(
        &self,
        filter: Filter,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Lease>, StoreError> {
        self.run(move |connection| {
            let (mut sql, mut values) = filter.sql();
            if !cursor.is_empty() {
                sql.push_str(" AND id < ?");
                values.push(Cell::Text(cursor));
            }
            values.push(Cell::Int(i64::try_from(limit).unwrap_or(i64::MAX)));
            let mut found = Vec::new();
            for part in shown_in(filter.state) {
                let rest = format!("{sql}{part} ORDER BY id DESC LIMIT ?");
                found.extend(select(connection, &rest, values.clone())?);
            }
            found.sort_by_key(|lease| std::cmp::Reverse(lease.id));
            found.truncate(limit);
            Ok(found)
        })
        .await
    }

    /// Lets an event happen to up to `limit` leases of those in a state it is for: to be revoked,
    /// for the reconciler to do at once, or detached. Returns how many.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn end_matching(
        &self,
        filter: Filter,
        event: Event,
        limit: u32,
        now: Timestamp,
    ) -> Result<usize, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let (sql, values) = filter.sql();
            let rest = match event {
                // Few of all the leases below a path live, or few of all that live are below it.
                Event::RevokeAsked => format!(
                    "INDEXED BY leases_live_path {sql} AND state IN ('pending', 'active') LIMIT {limit}"
                ),
                _ => format!("{sql} AND state IN ('pending', 'active', 'revoking') LIMIT {limit}"),
            };
            let leases = select(connection, &rest, values)?;
            let count = leases.len();
            for lease in leases {
                let mut applied = apply(connection, &sealer, lease, event.clone(), now)?;
                if !applied.lease.status.state.is_settled() {
                    applied.lease.status.next_reconcile = Some(now);
                    write_course(connection, &applied.lease)?;
                }
            }
            Ok(count)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::pg_login::Auth;
    use mayfly_protocol::secret::Secret;
    use mayfly_protocol::target::SslMode;

    fn target(host: &str, user: &str) -> Target {
        Target {
            host: host.to_owned(),
            port: 5432,
            database: "postgres".to_owned(),
            username: user.to_owned(),
            password: Secret::new("p"),
            sslmode: SslMode::Disable,
            auth: Default::default(),
            channel_binding: None,
            sslrootcert: None,
            sslcert: None,
            sslkey: None,
        }
    }

    #[test]
    fn accounts_are_ended_where_they_were_made_with_what_works_there() {
        let own = target("old", "a");
        assert_eq!(ways(&own, None, true), std::slice::from_ref(&own));
        let same = ways(&own, Some(own.clone()), true);
        assert_eq!(same, std::slice::from_ref(&own));
        let user = target("old", "b");
        assert_eq!(ways(&own, Some(user.clone()), true), [user, own.clone()]);
        let safer = Target {
            sslmode: SslMode::VerifyFull,
            ..own.clone()
        };
        assert_eq!(
            ways(&own, Some(safer.clone()), true),
            std::slice::from_ref(&safer),
            "a protection that was raised is not got round"
        );
        let weak = Target {
            auth: Auth::Password,
            ..target("new", "b")
        };
        let there = ways(&safer, Some(weak), false);
        assert_eq!(there.len(), 2);
        assert_eq!(
            (there[1].sslmode, there[1].auth, there[1].username.as_str()),
            (SslMode::VerifyFull, Auth::Scram, "b")
        );
        let later = Target {
            password: Secret::new("p2"),
            ..own.clone()
        };
        let mut by_maker = ways(&own, Some(target("old", "b")), true);
        let between = vec![
            later.clone(),
            own.clone(),
            target("old", "c"),
            target("new", "a"),
        ];
        also_as_its_maker(&mut by_maker, &own, between);
        assert_eq!(by_maker, [target("old", "b"), own.clone(), later]);
        let moved = target("new", "b");
        let mixed = target("old", "b");
        assert_eq!(
            ways(&own, Some(moved.clone()), true),
            [own.clone(), moved.clone(), mixed.clone()]
        );
        assert_eq!(
            ways(&own, Some(moved), false),
            [own, mixed],
            "an unknown server is not looked for elsewhere"
        );
    }
}
