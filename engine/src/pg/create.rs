//! Makes the role of a lease in one round trip. It has the transaction that makes the role, and a look after the
//! COMMIT. The membership comes last in the transaction, because it locks the grant role. The database's clock is
//! known from the connection's last answer. A second try, for example of a task that runs twice, looks for the role
//! first and finds it by the comment.
//!
//! No lock keeps a grant role from being renamed or dropped during a create: any account could take an advisory
//! lock. Instead the create looks for the membership after its COMMIT, by the grant role's name, and grants it again
//! if it is missing. [`mod@super::tidy`] has the other side of this.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::arrival::Arrival;
use mayfly_common::fault;
use mayfly_protocol::account::Account;
use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::{Create, Created, Failure, FailureCode};
use mayfly_protocol::timing::timing;
use rand::RngExt;
use tokio_postgres::error::SqlState;
use tracing::{debug, warn};

use super::account;
use super::clear_password;
use super::create_found::{Membership, look, question_again, seen};
use super::create_sql::{Making, joins_now};
use super::grant_role::GrantRoles;
use super::grant_set::{GrantSet, Granted};
use super::notes::Notes;
use super::replicas;
use super::server_wait::ServerWait;
use super::servers::Servers;
use super::session::{LOCK_TIMEOUT, Session};
use super::sql::ident;
use super::sql_error::SqlError;
use super::time_guard::{Clock, TOO_LATE, too_late};

/// A create that waited longer than this for its turn has no time left for a slow server.
const QUEUED_LONG: Duration = Duration::from_secs(2);
/// Makes the role. `arrived` is the time of delivery: the role is committed at most the create budget later, or
/// never.
///
/// # Errors
/// A stable code. If the connection was lost at the commit, the role may exist.
pub(crate) async fn create(
    servers: &Servers,
    grant_roles: &GrantRoles,
    task: &Create,
    arrived: Arrival,
    notes: &mut Notes,
) -> Result<Created, Failure> {
    let limit = tokio::time::Instant::from_std(arrived.instant() + timing().create_budget);
    // The server answers, but many tasks came before this one.
    let queued = arrived.elapsed() > QUEUED_LONG;
    let create = Attempts {
        servers,
        grant_roles,
        task,
        arrived,
    };
    let work = create.until_made(notes);
    match tokio::time::timeout_at(limit, work).await {
        // The task reached this engine in time. The database, or tasks before this one, used up the time.
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
        // More connections would have helped. So another engine may succeed, or this engine later.
        full: queued || servers.limits(&task.target).budget.is_short(),
        ..not_in_time()
    }
}

pub(super) fn not_in_time() -> Failure {
    Failure::new(
        FailureCode::DatabaseUnreachable,
        format!(
            "the database did not finish within {} s",
            timing().create_budget.as_secs()
        ),
    )
}

/// The tries of one create.
struct Attempts<'c> {
    servers: &'c Servers,
    grant_roles: &'c GrantRoles,
    task: &'c Create,
    arrived: Arrival,
}

enum Attempt {
    Made(Created),
    Again { on_a_new_connection: bool },
}

/// The statements that make the account, and the end that they set.
struct Prepared {
    text: String,
    expiration: Timestamp,
}

impl Attempts<'_> {
    async fn until_made(&self, notes: &mut Notes) -> Result<Created, Failure> {
        let mut waiting = ServerWait::new(&self.task.target, self.arrived.instant());
        let mut is_first = true;
        loop {
            let attempt = self.attempt(is_first, waiting.reconnect, notes).await;
            is_first = false;
            let failure = match attempt {
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
            waiting.out(self.servers, failure).await?;
            notes.retries.push("connection");
        }
    }

    async fn attempt(
        &self,
        is_first: bool,
        reconnect: bool,
        notes: &mut Notes,
    ) -> Result<Attempt, Failure> {
        let task = self.task;
        let granted = self.grant(notes).await?;
        let servers = self.servers;
        let mut home = match reconnect {
            true => {
                servers
                    .fresh_session(&task.target, &task.target.database)
                    .await?
            }
            false => servers.home(&task.target).await?,
        };
        let group = &granted.role;
        // If the role exists already, the server refuses it, and the next try finds it.
        let known = home.clock().filter(|_| is_first);
        let clock = match known {
            Some(clock) => clock,
            None => match look(&home, task, group).await {
                Ok((Some(found), _)) => return self.found(home, found, &granted, notes).await,
                Ok((None, clock)) => clock,
                // The connection was lost while it was idle.
                Err(failure) if home.is_lost() && !home.is_fresh() => {
                    debug!(reason = failure.message, "a kept connection is lost");
                    notes.retries.push("connection");
                    return Ok(Attempt::Again {
                        on_a_new_connection: true,
                    });
                }
                Err(failure) => {
                    // Another role has this name, so the lease's own role does not exist.
                    notes.begun &= failure.code != FailureCode::ForeignRole;
                    return Err(failure);
                }
            },
        };
        let prepared = self.prepare(&home, &clock, group, notes).await?;
        // The check is a separate transaction, because it must see what others have committed until now.
        let look_again = home.begin() + &question_again(task, group);
        let pause = fault::pause_of_server("create", "before_look");
        let text = format!("{}; {pause}{look_again}; COMMIT", prepared.text);
        fault::point("create", "before_commit").await;
        match home.query(&text).await {
            Ok(rows) => {
                fault::point("create", "committed").await;
                let (membership, clock) = seen(rows.last())?;
                home.put_clock(clock);
                let created = Created {
                    expiration: prepared.expiration,
                    server: home.facts().identity.clone(),
                    warnings: vec![],
                };
                self.found(home, (created, membership), &granted, notes)
                    .await
            }
            // If the role was committed, the next try finds it.
            Err(error) => {
                let fresh = home.is_fresh();
                home.rollback().await;
                // The clock was set after it was read. The next try reads it again. `not_after` limits that try,
                // also after this machine was suspended.
                let is_outdated =
                    error.code() == TOO_LATE && known.is_some() && task.not_after.is_some();
                if is_outdated {
                    notes.retries.push("clock");
                    return Ok(Attempt::Again {
                        on_a_new_connection: false,
                    });
                }
                self.failed(error, fresh, group, notes).await
            }
        }
    }

    fn set(&self) -> GrantSet<'_> {
        GrantSet {
            installation: &self.task.installation,
            target: &self.task.target,
            database: &self.task.database,
            grants: &self.task.grants,
        }
    }

    /// Prepares the account: keeps a connection for its end, and ensures its grant role.
    async fn grant(&self, notes: &mut Notes) -> Result<Granted, Failure> {
        // This connection is opened before the account is made, because the account could take the last slot.
        self.servers.keep_one(&self.task.target).await?;
        let (set, arrived) = (self.set(), self.arrived.instant());
        let granted = self.grant_roles.find(self.servers, &set, arrived);
        let mut granted = granted.await?;
        notes.warnings = std::mem::take(&mut granted.warnings);
        notes.skipped = granted.skipped.or(notes.skipped);
        Ok(granted)
    }

    /// The statements that make the account. If the password is sent in clear, their transaction has already begun.
    async fn prepare(
        &self,
        home: &Session<'_>,
        clock: &Clock,
        group: &RoleName,
        notes: &mut Notes,
    ) -> Result<Prepared, Failure> {
        let task = self.task;
        if task.wait_for_replicas.is_some() {
            replicas::may_look(home).await?;
        }
        let (verifier, special) = task.account()?;
        if let Some(special) = special {
            account::fit(home, &special.settings).await?;
        }
        let guard = clock.guard(self.arrived, task.not_after)?;
        let mut begin = home.begin_with(timing().create_statement, LOCK_TIMEOUT);
        notes.begun = true;
        if let Some(password) = task.clear_password() {
            warn!(role = %task.role, "the account's password is sent to its server in clear, as its secret requires");
            clear_password::begin(home, &task.target, &begin, password).await?;
            begin.clear();
        }
        let plain = Account::default();
        let expiration = clock.after(task.ttl_seconds)?;
        let facts = home.facts();
        let making = Making {
            task,
            verifier,
            special: special.unwrap_or(&plain),
            grant_role: group.as_str(),
            guard: &guard,
            expiration,
            joins: joins_now(facts.version, facts.ends_sessions, &task.target),
        };
        let text = begin + &making.statements(facts.version);
        Ok(Prepared { text, expiration })
    }

    /// Handles an account that exists. A missing membership is granted again. If another role has got the name of
    /// the grant role since the look, that role may still be empty, so the next try looks at it.
    async fn found(
        &self,
        home: Session<'_>,
        (created, membership): (Created, Membership),
        granted: &Granted,
        notes: &mut Notes,
    ) -> Result<Attempt, Failure> {
        let Membership::Of(oid) = membership else {
            notes.begun = true;
            return self.join_again(home, &granted.role, notes).await;
        };
        home.release();
        if Some(oid) == granted.oid {
            return Ok(Attempt::Made(created));
        }
        notes.begun = true;
        notes.retries.push("grant_role");
        self.grant_roles.forget(&self.set(), &granted.role);
        Ok(Attempt::Again {
            on_a_new_connection: false,
        })
    }

    /// Grants the membership again: the earlier grant role was renamed or dropped meanwhile. The next try checks the
    /// result.
    async fn join_again(
        &self,
        home: Session<'_>,
        group: &RoleName,
        notes: &mut Notes,
    ) -> Result<Attempt, Failure> {
        notes.retries.push("grant_role");
        let (name, group_name) = (ident(self.task.role.as_str()), ident(group.as_str()));
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
            // The new grant role does not exist yet, or the account is gone.
            Err(error) if error.is(&[SqlState::UNDEFINED_OBJECT]) => {
                self.grant_roles.forget(&self.set(), group);
                Ok(again(false))
            }
            Err(error) if error.is_transient() => Ok(again(false)),
            Err(error) if error.is_lost() && !home.is_fresh() => Ok(again(true)),
            Err(error) => Err(error.into_failure("giving the account its membership")),
        }
    }

    /// Decides what follows a failed try of a create.
    async fn failed(
        &self,
        error: SqlError,
        fresh: bool,
        group: &RoleName,
        notes: &mut Notes,
    ) -> Result<Attempt, Failure> {
        notes.locked = error.is(&[SqlState::LOCK_NOT_AVAILABLE]);
        let mut on_a_new_connection = false;
        match after(&error, fresh) {
            After::Again(reason) => notes.retries.push(reason),
            After::AgainOnANewConnection => {
                notes.retries.push("connection");
                on_a_new_connection = true;
            }
            After::AgainWithANewGrantRole => {
                notes.retries.push("grant_role");
                self.grant_roles.forget(&self.set(), group);
            }
            After::TooLate => return Err(too_late()),
            After::Failed => return Err(error.into_failure("making the role")),
        }
        Ok(Attempt::Again {
            on_a_new_connection,
        })
    }
}

#[derive(Debug, PartialEq, Eq)]
enum After {
    Again(&'static str),
    AgainOnANewConnection,
    AgainWithANewGrantRole,
    TooLate,
    Failed,
}

/// Decides what follows a failed try, from its error. The budget limits the number of tries.
fn after(error: &SqlError, fresh: bool) -> After {
    match error.code() {
        TOO_LATE => After::TooLate,
        // The grant role disappeared between the look and the membership: the statements name no other object.
        _ if error.is(&[SqlState::UNDEFINED_OBJECT]) => After::AgainWithANewGrantRole,
        _ if error.is_lost() && !fresh => After::AgainOnANewConnection,
        // Another engine is doing the same task. The next try finds its role.
        _ if error.is(&[SqlState::DUPLICATE_OBJECT, SqlState::UNIQUE_VIOLATION]) => {
            After::Again("duplicate")
        }
        _ if error.is_transient() => After::Again("conflict"),
        _ => After::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_try_says_what_follows_it() {
        for (state, lost, fresh, follows) in [
            (Some(TOO_LATE), false, true, After::TooLate),
            (Some("42704"), false, true, After::AgainWithANewGrantRole),
            (Some("42710"), false, true, After::Again("duplicate")),
            (Some("23505"), false, true, After::Again("duplicate")),
            (Some("40001"), false, true, After::Again("conflict")),
            (Some("42501"), false, true, After::Failed),
            (None, true, false, After::AgainOnANewConnection),
            (None, true, true, After::Failed),
        ] {
            let error = SqlError::for_tests(state, lost);
            assert_eq!(after(&error, fresh), follows, "{state:?} {lost} {fresh}");
        }
    }
}
