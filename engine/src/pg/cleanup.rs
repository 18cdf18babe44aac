//! Removes what prevents the drop of a role: objects that it owns and privileges that it has, in any database of the
//! server. Objects are given to a quarantine role or to the role that the operator named, or they are dropped. The
//! quarantine role has no privileges, because triggers and views run with the rights of their owner.

use mayfly_protocol::grant::OwnedObjects;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use tokio_postgres::error::SqlState;
use tracing::{info, warn};

use super::dependencies::{self, Held};
use super::due::Due;
use super::explain::{self, OBJECTS_IN_A_MESSAGE, cell};
use super::give_away::{drop_owned, give_away, without_security_definer};
use super::join::join;
use super::new_owner::{NewOwner, choose_new_owner, quarantine_name};
use super::row::{Row, first_column};
use super::servers::Servers;
use super::session::Session;
use super::sql::{NOT_UTF8, ident, literal};
use super::sql_error::SqlError;

/// Removes everything that prevents the drop of the role, in every database.
///
/// # Errors
/// Something could not be removed; the message names it. Then the role stays, without its login.
pub(super) async fn detach(
    servers: &Servers,
    home: &Session<'_>,
    role: &Due<'_>,
) -> Result<(), Failure> {
    let doing = "cleaning up after the account";
    let prepared = format!(
        "SELECT gid, database FROM pg_prepared_xacts WHERE owner = {} ORDER BY prepared",
        literal(role.task.role.as_str())
    );
    let prepared = home.transact(&prepared).await;
    let prepared = prepared.map_err(|error| error.into_failure(doing))?;
    if let Some(failure) = explain::prepared(&prepared) {
        return Err(failure);
    }
    join(home, role.task.role.as_str())
        .await
        .map_err(|error| error.into_failure("joining the account"))?;
    let new_owner = choose_new_owner(home, role).await?;
    open_own_databases(home, role)
        .await
        .map_err(|error| error.into_failure("allowing connections to the account's databases"))?;
    let databases = dependencies::databases(home, &role.oid.to_string(), Held::Any).await;
    let databases = databases.map_err(|error| error.into_failure(doing))?;
    let mut held = StillHeld::default();
    for row in &databases {
        let Some(database) = row.get(0) else {
            continue;
        };
        match detach_in(servers, &role.task.target, database, role, &new_owner).await {
            Ok(()) => {
                info!(role = %role.task.role, database, new_owner = new_owner.name, "cleaned up after an account");
            }
            // The other databases can still be cleaned up.
            Err(failure) => held.add(row, failure, doing),
        }
    }
    held.result()
}

/// Databases in which the clean-up after an account failed.
#[derive(Default)]
struct StillHeld {
    /// The failure in the first of them.
    first: Option<Failure>,
    databases: Vec<String>,
}

impl StillHeld {
    /// Adds a failure. The row has name and oid of the database.
    fn add(&mut self, row: &Row, failure: Failure, doing: &str) {
        // The database was dropped meanwhile, together with what held the role.
        if failure.code == FailureCode::NoSuchObject {
            return;
        }
        let database = format!("database {:?} (oid {})", cell(row, 0), cell(row, 1));
        let message = format!("{doing} in {database}: {}", failure.message);
        self.first
            .get_or_insert_with(|| Failure::new(failure.code, message));
        if self.databases.len() < OBJECTS_IN_A_MESSAGE {
            self.databases.push(database);
        }
    }

    fn result(self) -> Result<(), Failure> {
        match self.first {
            Some(failure) => Err(Failure {
                objects: self.databases,
                ..failure
            }),
            None => Ok(()),
        }
    }
}

/// Allows connections to the databases that the account made. The account may have forbidden them, and objects in
/// them prevent its drop.
async fn open_own_databases(home: &Session<'_>, role: &Due<'_>) -> Result<(), SqlError> {
    let closed = format!(
        "SELECT datname FROM pg_database WHERE datdba = {} AND (NOT datallowconn OR datconnlimit >= 0)",
        role.oid
    );
    let closed = home.transact(&closed).await?;
    for database in first_column(&closed)
        .into_iter()
        .filter(|name| name != NOT_UTF8)
    {
        let open = format!(
            "ALTER DATABASE {} WITH ALLOW_CONNECTIONS true CONNECTION LIMIT -1",
            ident(&database)
        );
        match home.transact(&open).await {
            Err(error) if error.code() != "3D000" => return Err(error),
            // If it failed, the database may have been dropped meanwhile.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

async fn detach_in(
    servers: &Servers,
    target: &Target,
    database: &str,
    role: &Due<'_>,
    new_owner: &NewOwner,
) -> Result<(), Failure> {
    let db = servers.session_beside(target, database).await?.for_ends();
    let superuser = db.facts().superuser;
    // The role is named by its oid, because a database with another encoding may show another name.
    let owner = role.oid.to_string();
    if role.task.owned_objects == OwnedObjects::Drop {
        // Databases are not dropped. They are given to the new owner.
        let mut text = vec![drop_owned(&owner)];
        text.push(give_away(&owner, new_owner, superuser));
        match db.transact(&text.join("; ")).await {
            Ok(_) => {
                db.release();
                return Ok(());
            }
            // Objects of other roles depend on these objects. They must not be dropped.
            Err(error) if error.is(&[SqlState::DEPENDENT_OBJECTS_STILL_EXIST]) => {
                warn!(role = %role.task.role, database, new_owner = new_owner.name, "other objects depend on objects of the account, which were not dropped");
            }
            Err(error) => return Err(error.into_failure("dropping objects of the account")),
        }
    }
    let mut text = vec![give_away(&owner, new_owner, superuser)];
    if new_owner.name == quarantine_name(&role.task.installation, &target.username) {
        text.push(without_security_definer(&new_owner.name));
    }
    text.push(drop_owned(&owner));
    db.transact(&text.join("; "))
        .await
        .map_err(|e| e.into_failure("giving away objects of the account"))?;
    db.release();
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_reported_with_all_databases() {
        let row = |name: &str| Row::from([Some(name), Some("5")]);
        let failure = |code| Failure::new(code, "no");
        let mut held = StillHeld::default();
        held.add(&row("gone"), failure(FailureCode::NoSuchObject), "clearing");
        assert!(
            held.first.is_none(),
            "with its database the objects are gone"
        );
        held.add(
            &row("a"),
            failure(FailureCode::DatabaseUnreachable),
            "clearing",
        );
        for _ in 0..2 * OBJECTS_IN_A_MESSAGE {
            held.add(&row("b"), failure(FailureCode::StatementFailed), "clearing");
        }
        let failure = held.result().unwrap_err();
        assert_eq!(failure.code, FailureCode::DatabaseUnreachable);
        assert_eq!(failure.message, "clearing in database \"a\" (oid 5): no");
        assert_eq!(failure.objects.len(), OBJECTS_IN_A_MESSAGE);
        assert!(StillHeld::default().result().is_ok());
    }
}
