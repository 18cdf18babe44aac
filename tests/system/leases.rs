//! Secrets and leases of a system.

use serde_json::{Value, json};

use super::System;
use crate::postgres::{Credential, Site};
use crate::windows::final_within;
use crate::{eventually, word};

impl System {
    /// Stores a base secret for a site and a dynamic secret linked to it, with these attributes
    /// beside pool, ttl 300 and SELECT on everything. Returns the dynamic secret's path.
    pub async fn secret(&self, site: &Site, pool: &str, attributes: Value) -> String {
        let base = format!("db:{}:root", site.name);
        let (status, _) = self
            .api
            .get(&format!("/v1/secrets/{base}::description"))
            .await;
        if status == 404 {
            self.api
                .create(
                    &format!("/v1/secrets/{base}"),
                    json!({"attributes": {"type": "postgresql"}, "data": site.data()}),
                )
                .await;
        }
        let path = format!("db:{}:{}", site.name, word());
        let mut all = json!({
            "grantPermissions": {"what": "SELECT", "where": "*.*"},
            "linkConfig": {"linkType": "dynamic", "linkedSecret": base},
            "pool": pool, "ttl": 300, "userPrefix": prefix(site),
        });
        for (key, value) in attributes.as_object().unwrap() {
            all[key] = value.clone();
        }
        self.api
            .create(
                &format!("/v1/secrets/{path}"),
                json!({"attributes": all, "data": {}}),
            )
            .await;
        path
    }

    /// Reads a dynamic secret; it must work.
    pub async fn issue(&self, path: &str, ttl: Option<u64>) -> Credential {
        let query = ttl.map(|ttl| format!("?ttl={ttl}")).unwrap_or_default();
        Credential::from_answer(&self.api.ok(&format!("/v1/secrets/{path}{query}")).await)
    }

    /// A lease.
    pub async fn lease(&self, id: &str) -> Value {
        self.api.ok(&format!("/v1/leases/{id}")).await
    }

    /// Waits until a lease has this state.
    pub async fn lease_becomes(&self, id: &str, state: &str, within: std::time::Duration) -> Value {
        eventually(&format!("lease {id} becomes {state}"), within, async || {
            let (_, lease) = self.api.get(&format!("/v1/leases/{id}")).await;
            (lease["state"] == state).then_some(lease)
        })
        .await
    }

    /// Waits until every end is final: each lease is shown as ended, and its create can commit no more.
    pub async fn settled(&self) {
        self.leases_left(0).await;
    }

    /// The same, except for this number of leases, which live on.
    pub async fn leases_left(&self, left: u64) {
        let within = final_within(&self.environment);
        eventually("the ends are final", within, async || {
            let status = self.api.ok("/v1/status").await;
            (open_leases(&status) == left).then_some(())
        })
        .await;
    }

    /// Waits until a credential is refused and its role gone.
    pub async fn gone(&self, site: &Site, credential: &Credential, within: std::time::Duration) {
        eventually(
            &format!("role {} is gone", credential.username),
            within,
            async || {
                site.server
                    .roles(&credential.username)
                    .await
                    .is_empty()
                    .then_some(())
            },
        )
        .await;
        assert!(credential.is_refused().await, "the login still works");
    }
}

/// Leases of all pools that are not settled, by the answer of `/v1/status`.
pub fn open_leases(status: &Value) -> u64 {
    // An older dispatcher does not report the leases that settle.
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let pools = status["pools"].as_array().unwrap();
    pools
        .iter()
        .map(|pool| {
            let leases = pool["leases"].as_object().unwrap();
            leases.values().map(number).sum::<u64>() + number(&pool["settling"])
        })
        .sum()
}

/// What the roles of a site's leases begin with.
pub fn prefix(site: &Site) -> String {
    format!("{}_", site.name.trim_start_matches("site_"))
}
