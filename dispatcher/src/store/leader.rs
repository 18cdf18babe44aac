//! Of several dispatchers with one store exactly one reconciles: the leader. It is the holder of a row, as long as
//! it writes the row regularly.

use std::time::Duration;

use jiff::Timestamp;

use super::sql::params;
use super::{Store, StoreError};

/// A leader that writes nothing for this time counts as dead.
const TERM: Duration = Duration::from_secs(5);

impl Store {
    /// Makes `who` the leader for a while. It does nothing while another dispatcher leads. Returns whether `who` leads now.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn lead(&self, who: String, now: Timestamp) -> Result<bool, StoreError> {
        // This is one statement on one row.
        self.run_beside(Vec::new, move |connection| {
            if !connection.is_shared() {
                return Ok(true);
            }
            let written = connection.execute(
                "INSERT INTO leaders (name, holder, until) VALUES ('reconciler', ?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
                 WHERE leaders.holder = excluded.holder OR leaders.until < ?3",
                params![who, (now + TERM).as_millisecond(), now.as_millisecond(),],
            )?;
            Ok(written > 0)
        })
        .await
    }

    /// Gives up the lead, so that another dispatcher can take it at once.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn step_down(&self, who: String) -> Result<(), StoreError> {
        self.run(move |connection| {
            connection.execute("DELETE FROM leaders WHERE holder = ?1", [who])?;
            Ok(())
        })
        .await
    }
}
