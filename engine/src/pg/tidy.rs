//! Removing what accounts leave behind on a server: grant roles nobody is a member of, and
//! quarantine roles that own nothing.
//!
//! A grant role first loses its name: from then on a create makes a new one, however far this one
//! has come. No lock is held meanwhile. A create looks after its commit whether its account is a
//! member of the role of that *name*, and makes it one where it is not. So the account is either a
//! member before the name is lost, which the look before the drop sees, or gets the new role. What
//! the old one holds is taken from it after the time in which a create that saw the old name can
//! still commit (engines of the version before do not look again). Run twice, the second goes on
//! where the first ended.

use std::time::Duration;

use mayfly_protocol::names::{InstallationId, RoleName, random_text};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode, Kept, Tidied, Tidy};
use tokio_postgres::error::SqlState;

use super::cleanup::join;
use super::create;
use super::row::{Row, first_column};
use super::servers::Servers;
use super::session::Session;
use super::sql::{grant_prefix, ident, literal, quarantine_comment, shown};
use super::sql_error::{LOCK_NOT_AVAILABLE, SqlError};

/// A create that saw a name commits within this time.
const CREATES_END_WITHIN: Duration = create::STATEMENT_TIMEOUT.saturating_add(ALLOWANCE);
const ALLOWANCE: Duration = Duration::from_secs(1);
/// Names in a reason, at most.
const NAMES: usize = 10;
/// SQLSTATE of our own guard (class `MF` is nobody's).
const NEEDED: &str = "MF010";
/// Who is a member and needs it: not the admin, nor whoever may only pass it on.
const MEMBERS: &str = "SELECT u.rolname FROM pg_auth_members m JOIN pg_roles u ON u.oid = m.member \
     WHERE m.roleid = r.oid AND NOT m.admin_option AND u.rolname <> current_user";
const OWNS: &str = "SELECT FROM pg_shdepend s WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o'";

/// A role of ours.
struct Found {
    name: String,
    oid: String,
    /// The name its comment has; none for a quarantine role.
    grant: Option<String>,
}

/// Why a role stays.
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

/// Tidies up.
///
/// # Errors
/// The server cannot be looked at. What a single role fails with is said in the result.
pub(crate) async fn tidy(servers: &Servers, task: &Tidy) -> Result<Tidied, Failure> {
    let home = servers.home_or_postgres(&task.target).await?;
    let mut tidied = Tidied {
        removed: vec![],
        kept: vec![],
    };
    let mut nameless = Vec::new();
    let mut renamed = false;
    for role in find(&home, &task.installation).await? {
        let outcome = match &role.grant {
            None => {
                let gone = drop_quarantine(&home, &role).await;
                gone.map(|()| tidied.removed.push(role.name.clone()))
            }
            Some(name) if *name == role.name => {
                match take_name(servers, &task.target, &home, &role).await {
                    Ok(new_name) => {
                        renamed = true;
                        let name = new_name;
                        nameless.push((role.name.clone(), Found { name, ..role }));
                        continue;
                    }
                    Err(stays) => Err(stays),
                }
            }
            // Left by a tidying that was interrupted.
            Some(name) => {
                nameless.push((name.clone(), role));
                continue;
            }
        };
        if let Err(stays) = outcome {
            tidied.kept.push(kept(role.name, stays));
        }
    }
    if renamed {
        tokio::time::sleep(CREATES_END_WITHIN).await;
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
    let found = |row: &Row| {
        Some(Found {
            name: row.get(0)?.to_owned(),
            oid: row.get(1)?.to_owned(),
            grant: row.get(2)?.strip_prefix(&prefix).map(str::to_owned),
        })
    };
    Ok(rows.iter().filter_map(found).collect())
}

/// A guard that fails where somebody needs the role, or where it owns something.
fn guard(role: &Found) -> String {
    let body = format!(
        "BEGIN IF EXISTS (SELECT 1 FROM pg_roles r WHERE r.oid = {} AND (EXISTS ({MEMBERS}) OR EXISTS ({OWNS}))) THEN \
         RAISE EXCEPTION 'needed' USING ERRCODE = '{NEEDED}'; END IF; END",
        role.oid
    );
    format!("DO {}", literal(&body))
}

/// Takes the name from a grant role nobody needs. Gives the new one.
async fn take_name(
    servers: &Servers,
    target: &Target,
    home: &Session<'_>,
    role: &Found,
) -> Result<String, Retained> {
    check_free(home, role).await?;
    // What it holds must be within reach, or it would be left without its name.
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
    let text = format!(
        "{}; ALTER ROLE {} RENAME TO {}",
        guard(role),
        ident(&role.name),
        ident(&gone)
    );
    match home.transact_retrying(&text).await {
        Ok(_) => Ok(gone),
        Err(error) if error.code() == NEEDED || error.code() == LOCK_NOT_AVAILABLE => {
            Err(Retained {
                reason: "an account was made with it just now".to_owned(),
                in_use: true,
            })
        }
        Err(error) => Err(error.into_failure("taking its name").into()),
    }
}

/// What a grant role is called that creates are not to find any more.
fn nameless() -> String {
    format!("mayfly_gone_{}", random_text(16))
}

/// Removes a grant role that was just made and could not be filled. As above it loses its name
/// first; where somebody needs it all the same, or this ends in between, it is left to a tidying.
///
/// # Errors
/// As any statement.
pub(super) async fn drop_unfilled(home: &Session<'_>, role: &RoleName) -> Result<(), SqlError> {
    let find = format!(
        "SELECT oid FROM pg_roles WHERE rolname = {}",
        literal(role.as_str())
    );
    let rows = home.transact_retrying(&find).await?;
    let Some(oid) = first_column(&rows).into_iter().next() else {
        return Ok(());
    };
    let gone = nameless();
    let role = Found {
        name: role.to_string(),
        oid,
        grant: None,
    };
    let rename = format!(
        "{}; ALTER ROLE {} RENAME TO {}",
        guard(&role),
        ident(&role.name),
        ident(&gone)
    );
    let drop = format!("{}; DROP ROLE {}", guard(&role), ident(&gone));
    for text in [rename, drop] {
        match home.transact_retrying(&text).await {
            Ok(_) => {}
            // Another engine filled it and uses it, or was quicker to remove it.
            Err(error) if error.code() == NEEDED || error.is(&[SqlState::UNDEFINED_OBJECT]) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Says who needs a role, or what it owns.
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
        .map_err(|error| error.into_failure("looking who needs it"))?;
    let named = |word: &str| -> Vec<&str> {
        let of_word = rows.iter().filter(|row| row.get(0) == Some(word));
        of_word.filter_map(|row| row.get(1).map(shown)).collect()
    };
    let (members, owns) = (named("member"), named("owner"));
    if !members.is_empty() {
        let more = if members.len() > NAMES {
            " and more"
        } else {
            ""
        };
        let names = members[..members.len().min(NAMES)].join(", ");
        return Err(Retained {
            reason: format!("its members are {names}{more}"),
            in_use: true,
        });
    }
    if !owns.is_empty() {
        return Err(Retained::since(format!(
            "it owns objects in {}; give them to somebody: REASSIGN OWNED BY {} TO …;",
            owns.join(", "),
            ident(&role.name)
        )));
    }
    Ok(())
}

/// Databases in which a role holds something.
async fn databases(home: &Session<'_>, role: &Found) -> Result<Vec<String>, Retained> {
    let query = format!(
        "SELECT DISTINCT d.datname FROM pg_shdepend s \
         JOIN pg_database d ON d.oid = s.dbid OR (s.dbid = 0 AND d.datname = current_database()) \
         WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = {} ORDER BY 1",
        role.oid
    );
    let rows = home
        .transact_retrying(&query)
        .await
        .map_err(|error| error.into_failure("looking what it holds"))?;
    Ok(first_column(&rows))
}

/// Takes everything from a grant role without a name, and drops it.
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
            // Another tidying was quicker.
            Err(error) if error.is(&[SqlState::UNDEFINED_OBJECT]) => return Ok(()),
            Err(error) => return Err(error.into_failure("joining it").into()),
        }
    }
    for database in held {
        let doing = |failure: Failure| {
            Retained::since(format!(
                "taking away what it holds in database {database:?}: {}",
                failure.message
            ))
        };
        let session = match servers.session_beside(target, &database).await {
            Ok(session) => session,
            Err(failure) if failure.code == FailureCode::NoSuchObject => continue,
            Err(failure) => return Err(doing(failure)),
        };
        let text = format!("{}; DROP OWNED BY {name}", guard(role));
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
    let text = format!("{}; DROP ROLE {}", guard(role), ident(&role.name));
    match home.transact_retrying(&text).await {
        Ok(_) => Ok(()),
        Err(error) if error.is(&[SqlState::UNDEFINED_OBJECT]) => Ok(()),
        Err(error) if error.is(&[SqlState::DEPENDENT_OBJECTS_STILL_EXIST]) => {
            let held = databases(home, role).await?;
            Err(Retained::since(format!(
                "it is still named in the privileges of objects in {}",
                held.join(", ")
            )))
        }
        Err(error) if error.code() == NEEDED => Err(Retained {
            reason: "it came into use just now".to_owned(),
            in_use: true,
        }),
        Err(error) => Err(error.into_failure("dropping it").into()),
    }
}
