//! Checks a server before it is used: what its admin can do, what the admin lacks (with statements that give
//! it), and whether the server asks for passwords at all. All trials are rolled back.

use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Accounts, Check, CheckWhat, Failure, Finding, Topic};

use super::account;
use super::check_connection;
use super::check_grants;
use super::check_limits::connections;
use super::check_live::live_accounts;
use super::check_login::login_finding;
use super::check_roles;
use super::limits::server_name;
use super::probe_login::{probe_login, wrong_password};
use super::protection;
use super::servers::Servers;

/// A larger difference between the clocks is reported, because it makes dates in logs and answers misleading.
const CLOCK_LIMIT_SECONDS: f64 = 30.0;
/// Checks what the task requests.
///
/// # Errors
/// The connection is lost. Every other problem is a finding.
pub(crate) async fn check(servers: &Servers, task: &Check) -> Result<Vec<Finding>, Failure> {
    match &task.what {
        CheckWhat::Admin { accounts } => admin(servers, task, accounts.as_ref()).await,
        CheckWhat::WrongPassword { role, database } => {
            // Accounts do not log in with the admin's certificate.
            let target = Target {
                username: role.to_string(),
                sslcert: None,
                sslkey: None,
                ..wrong_password(&task.target)
            };
            let answer = probe_login(servers.hosts(), &target, database).await;
            Ok(vec![login_finding(
                Topic::AccountPassword,
                role.as_str(),
                answer,
            )])
        }
        // [`super::prepare`] answers this request.
        CheckWhat::Ready { .. } => Ok(Vec::new()),
    }
}

async fn admin(
    servers: &Servers,
    task: &Check,
    accounts: Option<&Accounts>,
) -> Result<Vec<Finding>, Failure> {
    let target = &task.target;
    let name = &target.username;
    let home = match servers.fresh_session(target, &target.database).await {
        Ok(home) => home,
        Err(failure) => return Ok(vec![Finding::bad(Topic::Connect, failure.message)]),
    };
    let facts = home.facts();
    let mut findings = vec![Finding::good(
        Topic::Connect,
        format!(
            "PostgreSQL {} at {}, as {name}{}",
            facts.version,
            server_name(target),
            if facts.superuser {
                ", a superuser; CREATEROLE would be enough"
            } else {
                ""
            }
        ),
    )];
    findings.push(login_finding(
        Topic::AdminPassword,
        name,
        probe_login(servers.hosts(), &wrong_password(target), &target.database).await,
    ));
    findings.push(protection::login(target, facts.login));
    findings.push(protection::tls(&home, target).await?);
    findings.push(Finding::new(
        Topic::Clock,
        facts.clock_skew.abs() <= CLOCK_LIMIT_SECONDS,
        format!(
            "the engine's clock minus the server's: {:.1} s; accounts end by the server's clock",
            facts.clock_skew
        ),
    ));
    findings.extend(check_roles::roles(&home, name).await?);
    findings.extend(live_accounts(&home, &task.installation, name).await?);
    findings.extend(check_roles::quarantine(&home, task).await?);
    let asked = accounts.and_then(|accounts| accounts.connections);
    findings.push(connections(&home, name, asked).await?);
    findings.extend(check_connection::limit(&home, name).await?);
    findings.extend(check_connection::pooler(servers, &home, target).await?);
    if let Some(accounts) = accounts {
        findings.extend(check_grants::grants(servers, &home, task, accounts).await?);
        findings.extend(check_roles::new_owner(&home, name, &accounts.owned_objects).await?);
        findings.extend(account::look(&home, target, accounts).await?);
    }
    home.release();
    Ok(findings)
}
