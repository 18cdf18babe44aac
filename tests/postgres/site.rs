//! A database of one test and its admin, and what there is in a server.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::Client;

use super::Server;
use crate::system::prefix;
use crate::{eventually, word};

/// What the admin of a base secret is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admin {
    Superuser,
    /// `CREATEROLE`, owner of its database, nothing else.
    CreateRole,
}

/// A database of one test and its admin, both of the same name.
#[derive(Clone)]
pub struct Site {
    pub server: Server,
    pub name: String,
    pub password: String,
}

impl Site {
    /// A connection as the admin.
    pub async fn admin(&self) -> Client {
        self.server
            .login(&self.name, &self.password, &self.name)
            .await
            .unwrap()
    }

    /// The data of a base secret.
    pub fn data(&self) -> Value {
        json!({"host": "127.0.0.1", "port": self.server.port(), "username": self.name,
               "password": self.password, "database": self.name})
    }

    /// The accounts of leases of this site that there are.
    pub async fn accounts(&self) -> Vec<String> {
        self.server.roles(&prefix(self)).await
    }

    /// The largest number of sessions that the admin has at a time while `during` runs, and what `during` gives. A
    /// session counts if 10 looks in a row, 5 ms apart, have shown it. The server shows a session for some milliseconds
    /// after its client has closed it, when the client may have opened the next one.
    pub async fn most_sessions<T>(&self, during: impl Future<Output = T>) -> (u64, T) {
        let root = self.server.superuser("postgres").await;
        let query = "SELECT pid FROM pg_stat_activity WHERE usename = $1";
        let mut looks: BTreeMap<i32, u32> = BTreeMap::new();
        let mut most = 0;
        tokio::pin!(during);
        loop {
            tokio::select! {
                done = &mut during => return (most, done),
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
            let rows = root.query(query, &[&self.name]).await.unwrap();
            let seen = rows.iter().map(|row| {
                let pid: i32 = row.get(0);
                (pid, looks.get(&pid).map_or(1, |before| before + 1))
            });
            looks = seen.collect();
            most = most.max(looks.values().filter(|count| **count >= 10).count() as u64);
        }
    }

    /// Waits until none of its accounts is left.
    pub async fn no_accounts(&self, within: Duration) {
        eventually("no account is left", within, async || {
            self.accounts().await.is_empty().then_some(())
        })
        .await;
    }
}

/// The roles whose name begins with the parameter.
const ROLES: &str = "SELECT rolname FROM pg_roles WHERE starts_with(rolname, $1) ORDER BY 1";

impl Server {
    /// Roles whose name begins with `prefix`.
    pub async fn roles(&self, prefix: &str) -> Vec<String> {
        let rows = self.look(ROLES, prefix).await;
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Until when a role is valid, to the millisecond: the API answers in whole seconds.
    pub async fn valid_until(&self, role: &str) -> jiff::Timestamp {
        let client = self.superuser("postgres").await;
        let row = client
            .query_one(
                "SELECT (extract(epoch FROM rolvaliduntil) * 1000)::bigint FROM pg_roles WHERE rolname = $1",
                &[&role],
            )
            .await
            .unwrap();
        jiff::Timestamp::from_millisecond(row.get(0)).unwrap()
    }

    /// A database for a lease store, and its URL.
    pub async fn store(&self) -> String {
        let (name, password) = (format!("store_{}", word()), word());
        let root = self.superuser("postgres").await;
        root.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
            .await
            .unwrap();
        root.batch_execute(&format!("CREATE DATABASE {name} OWNER {name}"))
            .await
            .unwrap();
        format!(
            "postgres://{name}:{password}@127.0.0.1:{}/{name}?sslmode=require",
            self.port()
        )
    }

    /// A database with two tables of two rows, and an admin for it.
    pub async fn site(&self, admin: Admin) -> Site {
        let name = format!("site_{}", word());
        let password = format!("P@ss';$${{{{word!\"\\ é{}", word());
        let root = self.superuser("postgres").await;
        let rights = match admin {
            Admin::Superuser => "SUPERUSER",
            Admin::CreateRole => "CREATEROLE",
        };
        let literal = password.replace('\\', "\\\\").replace('\'', "\\'");
        root.batch_execute(&format!(
            "CREATE ROLE {name} LOGIN {rights} PASSWORD E'{literal}'"
        ))
        .await
        .unwrap();
        root.batch_execute(&format!("CREATE DATABASE {name} OWNER {name}"))
            .await
            .unwrap();
        let site = Site {
            server: self.clone(),
            name,
            password,
        };
        site.admin()
            .await
            .batch_execute(
                "CREATE TABLE items (id serial PRIMARY KEY, note text); INSERT INTO items (note) VALUES ('one'), ('two'); \
                 CREATE SCHEMA app; CREATE TABLE app.orders (id int); INSERT INTO app.orders VALUES (1), (2)",
            )
            .await
            .unwrap();
        site
    }
}
