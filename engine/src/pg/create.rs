//! Making the role of a lease: one transaction, one round trip, the membership last (it locks
//! the grant role until commit). Run twice, it finds its own role by the comment.
//!
//! Nothing keeps a grant role from being renamed or dropped beside a create: an advisory lock is one
//! that any account can take. Instead the membership is looked for after the commit, under the grant
//! role's name, and given again where it is missing. See [`mod@super::tidy`] for the other side.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::arrival::Arrival;
use mayfly_common::fault;
use mayfly_protocol::account::Account;
use mayfly_protocol::names::RoleName;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{CREATE_BUDGET, Create, Created, Failure, FailureCode};
use rand::RngExt;
use tokio_postgres::error::SqlState;
use tracing::{debug, warn};

use super::account;
use super::clear_password;
use super::grant_role::{GrantRoles, GrantSet};
use super::replicas;
use super::servers::Servers;
use super::session::{LOCK_TIMEOUT, Session};
use super::sql::{ident, lease_comment, literal, moment};
use super::sql_error::SqlError;
use super::uncommitted::working_on;

/// Longest one statement of a create may run. Also the last part of the budget: in it nothing
/// may begin.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(4);
/// Between two tries while the server is in a condition that passes: 100 ms, doubling, at most 1 s.
const CONDITION_PAUSE_FIRST: Duration = Duration::from_millis(100);
const CONDITION_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long creates wait for a server without a free connection slot. After it they fail at once,
/// so that they hold no place that tasks for other servers need.
const FULL_PATIENCE: Duration = Duration::from_secs(3);
/// A create that waited so long for its turn at a server has no more time for a slow one.
const QUEUED_LONG: Duration = Duration::from_secs(2);
/// SQLSTATE of our own guards (class `MF` is nobody's).
pub(super) const TOO_LATE: &str = "MF001";
const NO_GRANT_ROLE: &str = "MF002";

/// What a create tells beside its result.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// Tries beyond the first, and a replica waited for in vain, by reason.
    pub(crate) retries: Vec<&'static str>,
    /// Object-privilege pairs passed over, where it was looked.
    pub(crate) skipped: Option<usize>,
    /// What the account lacks for now.
    pub(crate) warnings: Vec<String>,
    /// Another transaction held the grant role at the last try.
    locked: bool,
    /// The account may exist: it was found, or its statements were sent.
    pub(crate) begun: bool,
}

/// Does all that comes before an account, and makes none: connects, gives the grant role what it
/// lacks, and asks the server something. Waits for the server as a create does.
///
/// # Errors
/// What a create would fail with.
pub(crate) async fn prepare(
    servers: &Servers,
    grant_roles: &GrantRoles,
    set: &GrantSet<'_>,
    arrived: Instant,
) -> Result<(), Failure> {
    let limit = tokio::time::Instant::from_std(arrived + CREATE_BUDGET);
    let work = async {
        let mut waiting = Waiting::new(set.target, arrived);
        loop {
            match prepare_once(servers, grant_roles, set, arrived).await {
                Ok(()) => return Ok(()),
                Err(failure) => waiting.out(servers, failure).await?,
            }
        }
    };
    match tokio::time::timeout_at(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(not_in_time()),
    }
}

async fn prepare_once(
    servers: &Servers,
    grant_roles: &GrantRoles,
    set: &GrantSet<'_>,
    arrived: Instant,
) -> Result<(), Failure> {
    servers.keep_one(set.target).await?;
    grant_roles.ensure(servers, set, arrived).await?;
    let target = set.target;
    // A connection that was kept says nothing of the server as it is now.
    let home = servers.fresh_session(target, &target.database).await?;
    home.release();
    Ok(())
}

/// Makes the role. `arrived` is when the task was delivered: its commit comes at most
/// [`CREATE_BUDGET`] later, or never.
///
/// # Errors
/// A stable code. The role may exist all the same where the connection was lost at the commit.
pub(crate) async fn create(
    servers: &Servers,
    grant_roles: &GrantRoles,
    task: &Create,
    arrived: Arrival,
    notes: &mut Notes,
) -> Result<Created, Failure> {
    let limit = tokio::time::Instant::from_std(arrived.instant() + CREATE_BUDGET);
    // A server that hangs is not waited for so long: it answers those before this one, and they are many.
    let queued = arrived.elapsed() > QUEUED_LONG;
    let work = attempts(servers, grant_roles, task, arrived, notes);
    match tokio::time::timeout_at(limit, work).await {
        // It reached this engine in time; what took so long is the database, or those before it.
        Ok(Err(failure)) if failure.code == FailureCode::PastDeadline => {
            Err(too_slow(servers, task, queued, notes))
        }
        Ok(done) => done,
        Err(_) => Err(too_slow(servers, task, queued, notes)),
    }
}

fn too_slow(servers: &Servers, task: &Create, queued: bool, notes: &Notes) -> Failure {
    if notes.locked {
        return Failure::new(
            FailureCode::ObjectLocked,
            "the grant role of this secret is locked by another transaction (SQLSTATE 55P03); try again when that has ended",
        );
    }
    Failure {
        // With more connections it would have been done, as by another engine or in a moment.
        full: queued || servers.limits(&task.target).budget.is_short(),
        ..not_in_time()
    }
}

fn not_in_time() -> Failure {
    Failure::new(
        FailureCode::DatabaseUnreachable,
        format!(
            "the database did not do it within {} s",
            CREATE_BUDGET.as_secs()
        ),
    )
}

async fn attempts(
    servers: &Servers,
    grant_roles: &GrantRoles,
    task: &Create,
    arrived: Arrival,
    notes: &mut Notes,
) -> Result<Created, Failure> {
    let mut waiting = Waiting::new(&task.target, arrived.instant());
    loop {
        let reconnect = waiting.reconnect;
        let failure = match attempt(servers, grant_roles, task, arrived, reconnect, notes).await {
            Ok(Attempt::Made(created)) => return Ok(created),
            Ok(Attempt::Again {
                on_a_new_connection,
            }) => {
                waiting.reconnect |= on_a_new_connection;
                let pause = rand::rng().random_range(5..50);
                tokio::time::sleep(Duration::from_millis(pause)).await;
                continue;
            }
            Err(failure) => failure,
        };
        waiting.out(servers, failure).await?;
        notes.retries.push("connection");
    }
}

/// Waits out a condition of the server that passes: a failover, a restart, too many connections.
struct Waiting<'t> {
    target: &'t Target,
    arrived: Instant,
    pause: Duration,
    /// The next try needs a connection that was not used before.
    reconnect: bool,
    waited_out: Option<Failure>,
}

impl<'t> Waiting<'t> {
    fn new(target: &'t Target, arrived: Instant) -> Self {
        Self {
            target,
            arrived,
            pause: CONDITION_PAUSE_FIRST,
            reconnect: false,
            waited_out: None,
        }
    }

    /// Returns when it may be tried again.
    ///
    /// # Errors
    /// The failure does not pass, or no time is left.
    async fn out(&mut self, servers: &Servers, failure: Failure) -> Result<(), Failure> {
        let is_time_left = self.arrived.elapsed() + self.pause < CREATE_BUDGET - STATEMENT_TIMEOUT;
        let is_full = failure.full && servers.limits(self.target).full_for() > FULL_PATIENCE;
        if !failure.transient || !is_time_left || is_full {
            // That the time ran out says less than what it was spent on.
            return Err(match self.waited_out.take() {
                Some(cause) if failure.code == FailureCode::PastDeadline => cause,
                _ => failure,
            });
        }
        debug!(reason = failure.message, "a create waits for the server");
        self.waited_out = Some(failure);
        self.reconnect = true;
        let jitter = rand::rng().random_range(0.8..1.2);
        tokio::time::sleep(self.pause.mul_f64(jitter)).await;
        self.pause = (self.pause * 2).min(CONDITION_PAUSE_MAX);
        Ok(())
    }
}

enum Attempt {
    Made(Created),
    Again { on_a_new_connection: bool },
}

async fn attempt(
    servers: &Servers,
    grant_roles: &GrantRoles,
    task: &Create,
    arrived: Arrival,
    reconnect: bool,
    notes: &mut Notes,
) -> Result<Attempt, Failure> {
    let set = GrantSet {
        installation: &task.installation,
        target: &task.target,
        database: &task.database,
        grants: &task.grants,
    };
    // Before the account: it could take the last slot.
    servers.keep_one(&task.target).await?;
    let granted = grant_roles.ensure(servers, &set, arrived.instant()).await?;
    notes.warnings = granted.warnings;
    notes.skipped = granted.skipped.or(notes.skipped);
    let home = if reconnect {
        servers
            .fresh_session(&task.target, &task.target.database)
            .await?
    } else {
        servers.home(&task.target).await?
    };
    let group = &granted.role;
    match find(&home, task, group).await {
        Ok(Some((created, Membership::Held))) => {
            home.release();
            return Ok(Attempt::Made(created));
        }
        Ok(Some((_, Membership::Missing))) => {
            notes.begun = true;
            return join_again(home, grant_roles, &set, task, group, notes).await;
        }
        Ok(None) => {}
        // It went while nobody used it, which is seen only now.
        Err(failure) if home.is_lost() && !home.is_fresh() => {
            debug!(reason = failure.message, "a kept connection is lost");
            notes.retries.push("connection");
            return Ok(Attempt::Again {
                on_a_new_connection: true,
            });
        }
        Err(failure) => return Err(failure),
    }
    if task.wait_for_replicas.is_some() {
        replicas::may_look(&home).await?;
    }
    let (verifier, special) = task.account()?;
    if let Some(special) = special {
        account::fit(&home, &special.settings).await?;
    }
    let begin = begin(&home, arrived, task.not_after).await?;
    let first = home.begin_with(STATEMENT_TIMEOUT, LOCK_TIMEOUT);
    let text = statements(
        &home,
        task,
        (verifier, special.unwrap_or(&Account::default())),
        granted.role.as_str(),
        &begin,
    );
    notes.begun = true;
    let text = match task.clear_password() {
        None => first + &text,
        Some(password) => {
            warn!(role = %task.role, "the account's password goes to its server in clear, as its secret asks");
            clear_password::begin(&home, &task.target, &first, password).await?;
            text
        }
    };
    fault::point("create", "before_commit").await;
    let error = match home.query(&text).await {
        Ok(_) => {
            fault::point("create", "committed").await;
            // Where the connection is lost by now, the next try finds it.
            let found = find(&home, task, group).await?;
            let (created, membership) = found.ok_or_else(|| {
                Failure::new(
                    FailureCode::StatementFailed,
                    "the role was made and is gone again",
                )
            })?;
            if membership == Membership::Missing {
                return join_again(home, grant_roles, &set, task, group, notes).await;
            }
            home.release();
            return Ok(Attempt::Made(created));
        }
        Err(error) => error,
    };
    let fresh = home.is_fresh();
    home.rollback().await;
    let mut on_a_new_connection = false;
    notes.locked = error.is(&[SqlState::LOCK_NOT_AVAILABLE]);
    match after(&error, fresh) {
        After::Again(reason) => notes.retries.push(reason),
        After::AgainOnANewConnection => {
            notes.retries.push("connection");
            on_a_new_connection = true;
        }
        After::AgainWithANewGrantRole => {
            notes.retries.push("grant_role");
            grant_roles.forget(&set, &granted.role).await;
        }
        After::TooLate => {
            return Err(Failure::new(
                FailureCode::PastDeadline,
                "the create came too late to be done",
            ));
        }
        After::Failed => return Err(error.into_failure("making the role")),
    }
    Ok(Attempt::Again {
        on_a_new_connection,
    })
}

enum After {
    Again(&'static str),
    AgainOnANewConnection,
    AgainWithANewGrantRole,
    TooLate,
    Failed,
}

/// What a failed try means. Again is bounded by the budget.
fn after(error: &SqlError, fresh: bool) -> After {
    match error.code() {
        TOO_LATE => After::TooLate,
        NO_GRANT_ROLE => After::AgainWithANewGrantRole,
        // It went between the look and the membership; nothing else is named there.
        _ if error.is(&[SqlState::UNDEFINED_OBJECT]) => After::AgainWithANewGrantRole,
        _ if error.is_lost() && !fresh => After::AgainOnANewConnection,
        // The same task is being done elsewhere: the next try finds its role.
        _ if error.is(&[SqlState::DUPLICATE_OBJECT, SqlState::UNIQUE_VIOLATION]) => {
            After::Again("duplicate")
        }
        _ if error.is_transient() => After::Again("conflict"),
        _ => After::Failed,
    }
}

/// Whether an account is a member of the role that has its grant role's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Membership {
    Held,
    Missing,
}

/// Makes the account a member of its grant role: the one it was made a member of was renamed or
/// dropped beside it. The next try finds out what came of it.
async fn join_again(
    home: Session<'_>,
    grant_roles: &GrantRoles,
    set: &GrantSet<'_>,
    task: &Create,
    group: &RoleName,
    notes: &mut Notes,
) -> Result<Attempt, Failure> {
    notes.retries.push("grant_role");
    let (name, group_name) = (ident(task.role.as_str()), ident(group.as_str()));
    let options = if home.facts().version >= 16 {
        " WITH INHERIT TRUE, SET FALSE"
    } else {
        ""
    };
    let joined = home
        .transact(&format!("GRANT {group_name} TO {name}{options}"))
        .await;
    let again = |on_a_new_connection| Attempt::Again {
        on_a_new_connection,
    };
    match joined {
        Ok(_) => {
            home.release();
            Ok(again(false))
        }
        // The grant role is not made anew yet, or the account is gone again.
        Err(error) if error.is(&[SqlState::UNDEFINED_OBJECT]) => {
            grant_roles.forget(set, group).await;
            Ok(again(false))
        }
        Err(error) if error.is_transient() => Ok(again(false)),
        Err(error) if error.is_lost() && !home.is_fresh() => Ok(again(true)),
        Err(error) => Err(error.into_failure("giving the account its membership")),
    }
}

/// The lease's role, where it exists already, and whether it is a member of its grant role.
async fn find(
    home: &Session<'_>,
    task: &Create,
    group: &RoleName,
) -> Result<Option<(Created, Membership)>, Failure> {
    let query = format!(
        "SELECT shobj_description(r.oid, 'pg_authid'), {}, \
           EXISTS (SELECT 1 FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
                   WHERE m.member = r.oid AND g.rolname = {}) \
         FROM pg_roles r WHERE r.rolname = {}",
        moment("r.rolvaliduntil"),
        literal(group.as_str()),
        literal(task.role.as_str()),
    );
    let rows = home
        .transact(&query)
        .await
        .map_err(|error| error.into_failure("looking for the role"))?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    if row.text(0) != lease_comment(&task.installation, &task.lease) {
        return Err(Failure::new(
            FailureCode::ForeignRole,
            format!("role {} exists and belongs to somebody else", task.role),
        ));
    }
    let expiration = row.timestamp(1).ok_or_else(|| {
        Failure::new(
            FailureCode::StatementFailed,
            format!("role {} has no VALID UNTIL", task.role),
        )
    })?;
    let created = Created {
        expiration,
        server: home.facts().identity.clone(),
        warnings: vec![],
    };
    let membership = match row.flag(2) {
        true => Membership::Held,
        false => Membership::Missing,
    };
    Ok(Some((created, membership)))
}

/// The guard's moment: after it the database itself refuses to begin. Taken from the database's
/// clock first and this process's own after it, so that a process stopped in between gets a guard
/// that has passed. This process's clock stands still while its machine is suspended: `not_after`, of
/// the database's clock, was fixed before this process had the task.
pub(super) async fn begin(
    home: &Session<'_>,
    arrived: Arrival,
    not_after: Option<Timestamp>,
) -> Result<String, Failure> {
    let doing = "reading the database's clock";
    let rows = match home
        .transact("SELECT extract(epoch FROM clock_timestamp())")
        .await
    {
        Ok(rows) => rows,
        // Found out by the statement to come, which then goes to a new connection.
        Err(error) if error.is_lost() && !home.is_fresh() => return Ok("0".to_owned()),
        Err(error) => return Err(error.into_failure(doing)),
    };
    let now: f64 = rows
        .first()
        .and_then(|row| row.parse(0))
        .ok_or_else(|| Failure::new(FailureCode::StatementFailed, doing))?;
    let left = (CREATE_BUDGET - STATEMENT_TIMEOUT).checked_sub(arrived.elapsed());
    let left = left.ok_or_else(|| {
        Failure::new(
            FailureCode::PastDeadline,
            "the create came too late to be done",
        )
    })?;
    let own = now + left.as_secs_f64();
    let guard = not_after.map_or(own, |at| own.min(at.as_microsecond() as f64 / 1e6));
    Ok(format!("{guard:.6}"))
}

fn statements(
    home: &Session<'_>,
    task: &Create,
    (verifier, special): (&str, &Account),
    grant_role: &str,
    not_after: &str,
) -> String {
    let facts = home.facts();
    let name = ident(task.role.as_str());
    let group = ident(grant_role);
    let limit = task.connection_limit.map_or(-1, i64::from);
    // On 14 and 15 a membership made with the role allows nothing more than one made later; on 16
    // it would allow SET ROLE.
    let in_role = if facts.version < 16 {
        format!(" IN ROLE {group}")
    } else {
        String::new()
    };
    let create = format!(
        "EXECUTE {} || {} || {} || quote_literal((clock_timestamp() + interval '{} seconds')::text) || {};",
        literal(&format!(
            "CREATE ROLE {name} LOGIN{} PASSWORD ",
            account::attributes(special)
        )),
        match task.clear_password() {
            None => literal(&literal(verifier)),
            Some(_) => format!("quote_literal({})", clear_password::PASSWORD),
        },
        literal(&format!(" CONNECTION LIMIT {limit} VALID UNTIL ")),
        task.ttl_seconds,
        literal(&in_role),
    );
    let make = match task.clear_password() {
        None => create,
        // An error's context would have the statement, with the password, in the server's log.
        Some(_) => format!(
            "BEGIN {create} EXCEPTION WHEN OTHERS THEN \
               RAISE EXCEPTION 'the server refuses the account or its password' USING ERRCODE = SQLSTATE; END;"
        ),
    };
    let body = format!(
        "BEGIN \
         IF extract(epoch FROM clock_timestamp()) > {not_after} THEN \
           RAISE EXCEPTION 'too late' USING ERRCODE = '{TOO_LATE}'; END IF; \
         IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = {group_text}) THEN \
           RAISE EXCEPTION 'no grant role' USING ERRCODE = '{NO_GRANT_ROLE}'; END IF; \
         {make} \
         END",
        group_text = literal(grant_role),
    );
    let mut text = format!(
        "SET LOCAL application_name = {}; ",
        literal(&working_on(&task.lease))
    );
    if facts.version >= 16 && !facts.superuser {
        // So that the admin may end the role's sessions.
        text.push_str("SET LOCAL createrole_self_grant = 'inherit'; ");
    }
    text.push_str(&format!("DO {}; ", literal(&body)));
    text.push_str(&format!(
        "COMMENT ON ROLE {name} IS {}; ",
        literal(&lease_comment(&task.installation, &task.lease))
    ));
    if facts.version < 16 && !facts.superuser {
        text.push_str(&format!("GRANT {name} TO CURRENT_USER; "));
    }
    let more = account::settings(&special.settings, &name)
        .into_iter()
        .chain(account::memberships(&task.grants, &name, facts.version));
    for statement in more {
        text.push_str(&statement);
        text.push_str("; ");
    }
    if facts.version >= 16 {
        text.push_str(&format!(
            "GRANT {group} TO {name} WITH INHERIT TRUE, SET FALSE; "
        ));
    }
    // Each statement has its own time-out; all together end with the budget.
    let late = format!(
        "BEGIN IF extract(epoch FROM clock_timestamp()) > {not_after} + {} THEN \
           RAISE EXCEPTION 'too late' USING ERRCODE = '{TOO_LATE}'; END IF; END",
        STATEMENT_TIMEOUT.as_secs()
    );
    text.push_str(&format!("DO {}; COMMIT", literal(&late)));
    text
}
