//! The request that removes Mayfly's own roles that nothing needs.

use mayfly_protocol::task::{Failure, Tidied, Tidy};
use tracing::info;

use super::{Meet, Work};
use crate::pg;

impl Meet for Tidy {
    async fn meet(&self, work: Work<'_>) -> Result<Tidied, Failure> {
        let tidied = pg::tidy(&work.engine.servers, self).await?;
        for role in &tidied.removed {
            info!(role, "removed a role that nothing needs");
        }
        Ok(tidied)
    }
}
