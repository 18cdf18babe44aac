//! Answers of the catalogs that were requested before they are needed.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::row::Rows;

/// Answers by their queries. Each answer is used once: a query that is sent again asks about something that has
/// changed.
#[derive(Default)]
pub(super) struct Answers(Mutex<HashMap<String, Rows>>);

impl Answers {
    pub(super) fn take(&self, question: &str) -> Option<Rows> {
        self.0.lock().remove(question)
    }

    /// Drops all answers, because grants begin now and change the catalogs.
    pub(super) fn forget(&self) {
        self.0.lock().clear();
    }

    pub(super) fn put(&self, answers: impl Iterator<Item = (String, Rows)>) {
        self.0.lock().extend(answers);
    }

    pub(super) fn has(&self, question: &str) -> bool {
        self.0.lock().contains_key(question)
    }
}
