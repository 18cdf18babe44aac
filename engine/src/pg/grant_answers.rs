//! Answers of the catalogs that were asked for before they are needed.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::row::Rows;

/// Answers by their questions. Each is used once: a question that is asked again is about what has changed.
#[derive(Default)]
pub(super) struct Answers(Mutex<HashMap<String, Rows>>);

impl Answers {
    pub(super) fn take(&self, question: &str) -> Option<Rows> {
        self.0.lock().remove(question)
    }

    /// Drops all answers: grants begin now, and the catalogs change.
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
