//! The request that lists the roles of leases.

use mayfly_protocol::task::{Failure, Ledger, Sweep};

use super::{Meet, Work};
use crate::pg;

impl Meet for Sweep {
    async fn meet(&self, work: Work<'_>) -> Result<Ledger, Failure> {
        pg::sweep(&work.engine.servers, self).await
    }
}
