//! The request that brings a grant role up to date.

use mayfly_protocol::names::InstallationId;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, GrantsOf, Refresh, Refreshed};

use super::{Meet, Work};
use crate::pg;
use crate::work::Engine;

impl Meet for Refresh {
    async fn meet(&self, work: Work<'_>) -> Result<Refreshed, Failure> {
        refresh(work.engine, self.installation, &self.target, &self.of).await
    }
}

/// Brings a grant role up to date if it has members.
pub(super) async fn refresh(
    engine: &Engine,
    installation: InstallationId,
    target: &Target,
    of: &GrantsOf,
) -> Result<Refreshed, Failure> {
    let set = pg::GrantSet {
        installation: &installation,
        target,
        database: &of.database,
        grants: &of.grants,
    };
    let granted = engine
        .grant_roles
        .refresh_in_use(&engine.servers, &set)
        .await?;
    if let Some(skipped) = granted.as_ref().and_then(|granted| granted.skipped) {
        engine.metrics.skipped(skipped);
    }
    Ok(Refreshed {
        in_use: granted.is_some(),
    })
}
