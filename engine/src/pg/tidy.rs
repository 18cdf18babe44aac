//! Removes what accounts leave behind on a server: grant roles without members, and quarantine roles that own
//! nothing.
//!
//! A grant role is renamed first. After that a create makes a new role with the old name. No lock is held in
//! between. After its COMMIT a create checks whether its account is a member of the role with that *name*, and if
//! not, makes it one. So either the account was a member before the rename, which the check before the drop sees; or
//! it gets the new role. The privileges of the old role are revoked only when no create that saw the old name can
//! commit any more (engines of the earlier version do not check). A second run continues where the first one ended.

use std::time::Duration;

use mayfly_protocol::names::InstallationId;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode, Kept, Tidied, Tidy};
use mayfly_protocol::timing::timing;
use tokio_postgres::error::SqlState;

use super::dependencies::{self, Held};
use super::join::join;
use super::row::{Row, first_column};
use super::servers::Servers;
use super::session::Session;
use super::sql::{grant_prefix, ident, literal, quarantine_comment, shown};
use super::sql_error::LOCK_NOT_AVAILABLE;
use super::unneeded::{self, MEMBERS, NEEDED, guard, nameless};

const ALLOWANCE: Duration = Duration::from_secs(1);
/// Maximum number of names in a reason.
const NAMES: usize = 10;

/// A grant role or a quarantine role.
struct Found {
    name: String,
    oid: String,
    /// The name in its comment. `None`: it is a quarantine role.
    grant: Option<String>,
}

/// The first step with a role.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// A quarantine role: it is dropped if it owns nothing.
    Drop,
    /// A grant role: it is renamed if nobody needs it.
    TakeName,
    /// A grant role that an interrupted tidying has renamed.
    Strip {
        /// The name that it had originally.
        grant: String,
    },
}

impl Found {
    /// Parses a row of its name, oid and comment.
    fn of(row: &Row, prefix: &str) -> Option<Self> {
        Some(Self {
            name: row.get(0)?.to_owned(),
            oid: row.get(1)?.to_owned(),
            grant: row.get(2)?.strip_prefix(prefix).map(str::to_owned),
        })
    }

    fn step(&self) -> Step {
        match &self.grant {
            None => Step::Drop,
            Some(grant) if *grant == self.name => Step::TakeName,
            Some(grant) => Step::Strip {
                grant: grant.clone(),
            },
        }
    }

    fn renamed(self, name: String) -> Self {
        Self { name, ..self }
    }
}

/// Why a role stays.
#[derive(Debug, PartialEq, Eq)]
struct Retained {
    reason: String,
    in_use: bool,
}

impl Retained {
    fn since(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            in_use: false,
        }
    }
}

impl From<Failure> for Retained {
    fn from(failure: Failure) -> Self {
        Self::since(failure.message)
    }
}

/// Removes grant roles without members and quarantine roles without objects.
///
/// # Errors
/// The server cannot be examined. The failures of single roles are in the result.
pub(crate) async fn tidy(servers: &Servers, task: &Tidy) -> Result<Tidied, Failure> {
    let home = servers.home_or_postgres(&task.target).await?;
    let mut tidied = Tidied {
        removed: vec![],
        kept: vec![],
    };
    let mut nameless = Vec::new();
    let mut renamed = false;
    for role in find(&home, &task.installation).await? {
        let outcome = match role.step() {
            Step::Drop => drop_quarantine(&home, &role)
                .await
                .map(|()| tidied.removed.push(role.name.clone())),
            Step::TakeName => match take_name(servers, &task.target, &home, &role).await {
                Ok(new_name) => {
                    renamed = true;
                    nameless.push((role.name.clone(), role.renamed(new_name)));
                    continue;
                }
                Err(stays) => Err(stays),
            },
            Step::Strip { grant } => {
                nameless.push((grant, role));
                continue;
            }
        };
        if let Err(stays) = outcome {
            tidied.kept.push(kept(role.name, stays));
        }
    }
    if renamed {
        tokio::time::sleep(timing().create_statement.saturating_add(ALLOWANCE)).await;
    }
    for (name, role) in nameless {
        match strip_and_drop(servers, &task.target, &home, &role).await {
            Ok(()) => tidied.removed.push(name),
            Err(stays) => tidied.kept.push(kept(role.name, stays)),
        }
    }
    home.release();
    Ok(tidied)
}

fn kept(role: String, stays: Retained) -> Kept {
    Kept {
        role,
        reason: stays.reason,
        in_use: stays.in_use,
    }
}

async fn find(home: &Session<'_>, installation: &InstallationId) -> Result<Vec<Found>, Failure> {
    let prefix = grant_prefix(installation);
    let query = format!(
        "SELECT r.rolname, r.oid, d.description FROM pg_roles r \
         JOIN pg_shdescription d ON d.objoid = r.oid AND d.classoid = 'pg_authid'::regclass \
         WHERE starts_with(d.description, {}) OR d.description = {} ORDER BY 1",
        literal(&prefix),
        literal(&quarantine_comment(installation)),
    );
    let rows = home
        .transact(&query)
        .await
        .map_err(|error| error.into_failure("listing the roles of this Mayfly"))?;
    Ok(rows
        .iter()
        .filter_map(|row| Found::of(row, &prefix))
        .collect())
}

/// Takes the name of a grant role that nobody needs: renames the role and returns its new name.
async fn take_name(
    servers: &Servers,
    target: &Target,
    home: &Session<'_>,
    role: &Found,
) -> Result<String, Retained> {
    check_free(home, role).await?;
    // All databases in which the role owns something or has a privilege must be reachable. Otherwise the role would
    // stay without its name.
    for database in databases(home, role).await? {
        match servers.session_beside(target, &database).await {
            Ok(session) => session.release(),
            Err(failure) if failure.code == FailureCode::NoSuchObject => {}
            Err(failure) => {
                return Err(Retained::since(format!(
                    "it holds privileges in database {database:?}: {}",
                    failure.message
                )));
            }
        }
    }
    let gone = nameless();
    let text = unneeded::rename(&role.oid, &role.name, &gone);
    match home.transact_retrying(&text).await {
        Ok(_) => Ok(gone),
        Err(error) if error.code() == NEEDED || error.code() == LOCK_NOT_AVAILABLE => {
            Err(Retained {
                reason: "an account was made with it just now".to_owned(),
                in_use: true,
            })
        }
        Err(error) => Err(error.into_failure("renaming it").into()),
    }
}

/// Refuses a role that has members, or owns something.
async fn check_free(home: &Session<'_>, role: &Found) -> Result<(), Retained> {
    let query = format!(
        "SELECT 'member', m.rolname FROM pg_roles r, LATERAL ({MEMBERS} ORDER BY 1 LIMIT {limit}) m WHERE r.oid = {oid} \
         UNION ALL SELECT 'owner', coalesce(d.datname, 'the whole server') FROM pg_roles r \
         JOIN pg_shdepend s ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o' \
         LEFT JOIN pg_database d ON d.oid = s.dbid WHERE r.oid = {oid} GROUP BY 1, 2",
        limit = NAMES + 1,
        oid = role.oid,
    );
    let rows = home
        .transact_retrying(&query)
        .await
        .map_err(|error| error.into_failure("looking for its members and objects"))?;
    match why_needed(&rows, &role.name) {
        Some(retained) => Err(retained),
        None => Ok(()),
    }
}

/// Why a role stays, from rows of its members and of the databases in which it owns something. `None`: it can be
/// removed.
fn why_needed(rows: &[Row], name: &str) -> Option<Retained> {
    let named = |word: &str| -> Vec<&str> {
        let of_word = rows.iter().filter(|row| row.get(0) == Some(word));
        of_word.filter_map(|row| row.get(1).map(shown)).collect()
    };
    let (members, owns) = (named("member"), named("owner"));
    if !members.is_empty() {
        let more = match members.len() > NAMES {
            true => " and more",
            false => "",
        };
        let names = members[..members.len().min(NAMES)].join(", ");
        return Some(Retained {
            reason: format!("its members are {names}{more}"),
            in_use: true,
        });
    }
    (!owns.is_empty()).then(|| {
        Retained::since(format!(
            "it owns objects in {}; give them to another role: REASSIGN OWNED BY {} TO …;",
            owns.join(", "),
            ident(name)
        ))
    })
}

/// Databases in which a role owns something or has a privilege.
async fn databases(home: &Session<'_>, role: &Found) -> Result<Vec<String>, Retained> {
    let rows = dependencies::databases(home, &role.oid, Held::Any).await;
    let rows =
        rows.map_err(|error| error.into_failure("looking for the role's privileges and objects"))?;
    Ok(first_column(&rows))
}

/// Revokes all privileges of a renamed grant role, and drops it.
async fn strip_and_drop(
    servers: &Servers,
    target: &Target,
    home: &Session<'_>,
    role: &Found,
) -> Result<(), Retained> {
    check_free(home, role).await?;
    let name = ident(&role.name);
    let held = databases(home, role).await?;
    if !held.is_empty() {
        match join(home, &role.name).await {
            Ok(()) => {}
            // Another tidying was faster.
            Err(error) if error.is(&[SqlState::UNDEFINED_OBJECT]) => return Ok(()),
            Err(error) => return Err(error.into_failure("joining it").into()),
        }
    }
    for database in held {
        let doing = |failure: Failure| {
            Retained::since(format!(
                "revoking the role's privileges in database {database:?}: {}",
                failure.message
            ))
        };
        let session = match servers.session_beside(target, &database).await {
            Ok(session) => session,
            Err(failure) if failure.code == FailureCode::NoSuchObject => continue,
            Err(failure) => return Err(doing(failure)),
        };
        let text = format!("{}; DROP OWNED BY {name}", guard(&role.oid));
        match session.transact_retrying(&text).await {
            Ok(_) => session.release(),
            Err(error) if error.is(&[SqlState::UNDEFINED_OBJECT]) => return Ok(()),
            Err(error) => return Err(doing(error.into_failure("DROP OWNED"))),
        }
    }
    drop_role(home, role).await
}

async fn drop_quarantine(home: &Session<'_>, role: &Found) -> Result<(), Retained> {
    check_free(home, role).await?;
    drop_role(home, role).await
}

async fn drop_role(home: &Session<'_>, role: &Found) -> Result<(), Retained> {
    let text = unneeded::drop(&role.oid, &role.name);
    match home.transact_retrying(&text).await {
        Ok(_) => Ok(()),
        Err(error) if error.is(&[SqlState::UNDEFINED_OBJECT]) => Ok(()),
        Err(error) if error.is(&[SqlState::DEPENDENT_OBJECTS_STILL_EXIST]) => {
            let held = databases(home, role).await?;
            Err(Retained::since(format!(
                "it still has privileges on objects in {}",
                held.join(", ")
            )))
        }
        Err(error) if error.code() == NEEDED => Err(Retained {
            reason: "an account has begun to use it".to_owned(),
            in_use: true,
        }),
        Err(error) => Err(error.into_failure("dropping it").into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn step(name: &str, comment: &str) -> Step {
        let row = Row::from([Some(name), Some("7"), Some(comment)]);
        Found::of(&row, "mayfly:grant:i:").unwrap().step()
    }

    #[test]
    fn a_role_goes_by_its_name_and_comment() {
        assert_eq!(step("q", "mayfly:quarantine:i"), Step::Drop);
        assert_eq!(step("g", "mayfly:grant:i:g"), Step::TakeName);
        let grant = "g".to_owned();
        assert_eq!(step("gone", "mayfly:grant:i:g"), Step::Strip { grant });
    }

    #[test]
    fn a_role_stays_for_its_members_and_then_for_what_it_owns() {
        let row = |word: &str, name: &str| Row::from([Some(word), Some(name)]);
        assert_eq!(why_needed(&[], "g"), None);
        let member = why_needed(&[row("owner", "app"), row("member", "a")], "g").unwrap();
        assert!(member.in_use && member.reason == "its members are a");
        let owner = why_needed(&[row("owner", "app"), row("owner", "b")], "g").unwrap();
        assert!(!owner.in_use && owner.reason.contains("in app, b;"));
        assert!(owner.reason.contains("REASSIGN OWNED BY \"g\""));
        let many: Vec<Row> = (0..=NAMES).map(|n| row("member", &n.to_string())).collect();
        let many = why_needed(&many, "g").unwrap();
        assert!(many.reason.ends_with("9 and more"), "{}", many.reason);
    }
}
