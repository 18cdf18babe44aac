//! Sends the queries of a look at a grant role in one round trip, before their answers are used. If the role lacks
//! nothing, as is usual, no other query is sent.

use mayfly_protocol::grant::Grant;
use mayfly_protocol::task::Failure;

use super::grant_catalog::{Catalog, LOOKING, Needed, schema_of, schema_question};

/// Maximum number of queries in one round trip.
const MOST: usize = 32;
/// Where the pages of a pattern begin.
pub(super) const FIRST_PAGE: &str = "0";

impl Catalog<'_> {
    /// Asks for the schemas of patterns, and what the role lacks of `named`.
    ///
    /// # Errors
    /// The server did not answer, or another session held a lock.
    pub(super) async fn ask_of_schemas(
        &self,
        named: &[Needed],
        grants: &[Grant],
    ) -> Result<(), Failure> {
        let schemas = grants.iter().filter_map(schema_of).map(schema_question);
        let mut questions: Vec<String> = schemas.collect();
        if questions.is_empty() {
            return Ok(());
        }
        questions.extend(self.questions(named, None));
        self.ask(questions).await
    }

    /// Asks what the role lacks of named objects, and of the first page of each pattern.
    ///
    /// # Errors
    /// As [`Catalog::ask_of_schemas`].
    pub(super) async fn ask_of_lacks(
        &self,
        named: &[Needed],
        patterns: &[Needed],
    ) -> Result<(), Failure> {
        let mut questions: Vec<String> = self.questions(named, None).collect();
        questions.extend(self.questions(patterns, Some(FIRST_PAGE)));
        self.ask(questions).await
    }

    fn questions(&self, needed: &[Needed], page: Option<&str>) -> impl Iterator<Item = String> {
        let wanted = needed
            .iter()
            .flat_map(|one| one.wanted.iter().chain(&one.beside));
        wanted.filter_map(move |wanted| self.question(wanted, page))
    }

    /// Sends these queries. If one of them fails in another way, it is sent again alone when its answer is needed.
    async fn ask(&self, mut questions: Vec<String>) -> Result<(), Failure> {
        questions.retain(|question| !self.answers.has(question));
        questions.sort();
        questions.dedup();
        questions.truncate(MOST);
        if questions.len() < 2 {
            return Ok(());
        }
        match self.db.ask(&questions).await {
            Ok(answers) => {
                self.answers.put(questions.into_iter().zip(answers));
                Ok(())
            }
            Err(error) if error.is_lost() || error.is_transient() => {
                Err(error.into_failure(LOOKING))
            }
            Err(_) => Ok(()),
        }
    }
}
