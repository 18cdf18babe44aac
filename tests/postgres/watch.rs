//! Looks at a server repeatedly, also after it was unreachable.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::Server;

/// Keeps its connection, and connects again after the server was unreachable.
pub struct Watch {
    server: Server,
    prefix: String,
    client: Option<Client>,
}

/// What one look shows.
pub struct Look {
    /// Roles, each with its `VALID UNTIL`.
    pub roles: BTreeMap<String, jiff::Timestamp>,
    /// Sessions of such roles, and of roles that are no more, by process.
    pub sessions: BTreeMap<i32, Option<String>>,
}

impl Server {
    /// The existing roles whose name begins with this.
    pub fn watch(&self, prefix: &str) -> Watch {
        Watch {
            server: self.clone(),
            prefix: prefix.to_owned(),
            client: None,
        }
    }
}

impl Watch {
    /// A look; `None` while the server cannot be asked.
    pub async fn look(&mut self) -> Option<Look> {
        let looking = async {
            let client = match self.client.take() {
                Some(client) => client,
                None => self.server.try_superuser("postgres").await.ok()?,
            };
            let look = look(&client, &self.prefix).await?;
            self.client = Some(client);
            Some(look)
        };
        tokio::time::timeout(std::time::Duration::from_secs(5), looking)
            .await
            .ok()?
    }
}

async fn look(client: &Client, prefix: &str) -> Option<Look> {
    let roles = client
        .query(
            "SELECT rolname::text, (extract(epoch FROM rolvaliduntil) * 1000)::bigint \
             FROM pg_roles WHERE starts_with(rolname, $1)",
            &[&prefix],
        )
        .await
        .ok()?;
    let sessions = client
        .query(
            "SELECT a.pid, r.rolname::text FROM pg_stat_activity a LEFT JOIN pg_roles r ON r.oid = a.usesysid \
             WHERE a.usesysid IS NOT NULL AND (r.oid IS NULL OR starts_with(r.rolname, $1))",
            &[&prefix],
        )
        .await
        .ok()?;
    let until = |ms| jiff::Timestamp::from_millisecond(ms).unwrap();
    Some(Look {
        roles: roles
            .iter()
            .map(|row| (row.get(0), until(row.get(1))))
            .collect(),
        sessions: sessions
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect(),
    })
}
