//! The request that makes an account.

use mayfly_protocol::task::{Create, Created, Failure, FailureCode};
use tracing::info;

use super::{Meet, Work};
use crate::pg;
use crate::work::Engine;

impl Meet for Create {
    /// Refuses an account that was ended here: its create can only be a recorded one.
    fn check(&self, engine: &Engine) -> Result<(), Failure> {
        if !engine.ended.has(self.lease) {
            return Ok(());
        }
        engine.metrics.refused("ended");
        Err(Failure::new(
            FailureCode::Expired,
            format!("engine {} has ended the account of this lease", engine.name),
        ))
    }

    async fn meet(&self, work: Work<'_>) -> Result<Created, Failure> {
        let Work {
            engine,
            arrived,
            permit,
        } = work;
        let mut notes = pg::Notes::default();
        let making = pg::create(
            &engine.servers,
            &engine.grant_roles,
            self,
            arrived,
            &mut notes,
        );
        let mut created = making.await.map_err(|failure| Failure {
            nothing_made: !notes.begun,
            ..failure
        });
        // Other requests continue while this one waits for replicas.
        drop(permit);
        if created.is_ok() {
            pg::wait_for_replicas(&engine.servers, self, arrived, &mut notes).await;
        }
        for reason in &notes.retries {
            engine.metrics.retried(reason);
        }
        if let Some(skipped) = notes.skipped {
            engine.metrics.skipped(skipped);
        }
        if let Ok(created) = &mut created {
            created.warnings = std::mem::take(&mut notes.warnings);
            info!(role = %self.role, expiration = %created.expiration, "made an account");
        }
        created
    }
}
