//! The request that changes the admin's own password.

use mayfly_protocol::task::{Failure, Rotate, Rotated};

use super::{Meet, Work};
use crate::pg;

impl Meet for Rotate {
    async fn meet(&self, work: Work<'_>) -> Result<Rotated, Failure> {
        pg::rotate(&work.engine.servers, self, work.arrived).await
    }
}
