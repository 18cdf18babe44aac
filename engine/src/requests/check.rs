//! The request that checks a server and its admin.

use mayfly_protocol::task::{Check, CheckWhat, Failure, Finding};

use super::{Meet, Work};
use crate::pg;

impl Meet for Check {
    async fn meet(&self, work: Work<'_>) -> Result<Vec<Finding>, Failure> {
        let engine = work.engine;
        let CheckWhat::Ready { database, grants } = &self.what else {
            return pg::check(&engine.servers, self).await;
        };
        let set = pg::GrantSet {
            installation: &self.installation,
            target: &self.target,
            database,
            grants,
        };
        let arrived = work.arrived.instant();
        pg::prepare(&engine.servers, &engine.grant_roles, &set, arrived).await?;
        Ok(Vec::new())
    }
}
