//! The request that moves an account's end.

use std::time::Duration;

use mayfly_protocol::task::{Failure, Renew, Renewed};
use tracing::{debug, info, warn};

use super::refresh::refresh;
use super::{Meet, Work};
use crate::pg;

/// How long the answer to a renewal waits for the look at its grants.
const REFRESH_WITHIN: Duration = Duration::from_secs(3);

impl Meet for Renew {
    async fn meet(&self, work: Work<'_>) -> Result<Renewed, Failure> {
        let engine = work.engine;
        let renewed = pg::renew(&engine.servers, self).await?;
        if let Some(of) = &self.of {
            let looking = refresh(engine, self.installation, &self.target, of);
            // The end is already moved. The periodic refresh grants what this look has no time for.
            match tokio::time::timeout(REFRESH_WITHIN, looking).await {
                Ok(Ok(_)) => {}
                Ok(Err(failure)) => {
                    warn!(role = %self.role, code = failure.code.as_str(), reason = failure.message, "an account was renewed, but its grants were not refreshed");
                }
                Err(_) => {
                    debug!(role = %self.role, "an account was renewed; the refresh of its grants takes longer")
                }
            }
        }
        if let Renewed::Until(until) = renewed {
            info!(role = %self.role, expiration = %until, "renewed an account");
        }
        Ok(renewed)
    }
}
