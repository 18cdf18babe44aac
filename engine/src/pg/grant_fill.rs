//! Grants the privileges of a set to a role. A named object must succeed, or the error names it. The objects of a
//! pattern are granted in portions, each with its own commit. An object that is gone, is locked or cannot be granted
//! is skipped and reported. When time runs out, the rest is left for later.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mayfly_common::fault;
use mayfly_protocol::grant::Grant;
use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::{Failure, FailureCode};
use rand::RngExt;

use super::grant_ahead::FIRST_PAGE;
use super::grant_answers::Answers;
use super::grant_apply::{self, DOING, Failed};
use super::grant_catalog::{Catalog, Needed};
use super::grant_pairs::{Lack, Page, Wanted, names};
use super::grant_plan::{self, Thing};
use super::grant_verdict::{Outcome, Sum, named_failed};
use super::session::Session;
use super::sql_error::{LOCK_NOT_AVAILABLE, Meaning};

/// Maximum number of missing privileges that one transaction grants.
const PORTION: usize = 500;
/// Maximum wait for the lock of a named object, and for the lock of one of many objects.
const NAMED_LOCK: Duration = Duration::from_secs(2);
const PATTERN_LOCK: Duration = Duration::from_millis(100);
/// Maximum number of tries if other sessions grant on the same objects. Each failed try shows that another session
/// made progress.
const TRIES: u32 = 10;
/// Range of the random pause between two tries, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 10..60;
/// Maximum number of waits for locked objects of a pattern. Each takes 10 to 60 ms.
const LOCKED_LOOKS: u32 = 3;

/// A session in the database of the grants, and the role that gets them.
pub(super) struct Filling<'a> {
    catalog: Catalog<'a>,
    role: &'a RoleName,
    /// When the rest of the patterns is left for later.
    until: Instant,
    /// How many more times locked objects are waited for.
    patience: u32,
}

/// Gives the role what it lacks. Patterns are granted until `until`.
///
/// # Errors
/// `no_such_object`, `ambiguous_object`, `grant_refused`, `admin_lacks_rights`, `object_locked`, and
/// those of the connection.
pub(super) async fn fill(
    db: &Session<'_>,
    admin: &str,
    role: &RoleName,
    grants: &[Grant],
    until: Instant,
) -> Result<Sum, Failure> {
    let catalog = Catalog {
        db,
        role: role.as_str(),
        version: db.facts().version,
        dry: false,
        answers: Answers::default(),
    };
    let mut named = vec![Catalog::connect()];
    let mut patterns = Vec::new();
    catalog.ask_of_schemas(&named, grants).await?;
    for grant in grants {
        let needed = catalog.grant(grant).await?;
        match needed.pattern {
            true => patterns.push(needed),
            false => named.push(needed),
        }
    }
    catalog.ask_of_lacks(&named, &patterns).await?;
    let mut filling = Filling {
        catalog,
        role,
        until,
        patience: LOCKED_LOOKS,
    };
    // Named objects come first: patterns may use up the time.
    filling.named(admin, &named).await?;
    let mut sum = Sum::of(named.len() > 1);
    for needed in &patterns {
        let outcome = filling.pattern(needed).await?;
        sum.add(admin, db.facts().version, needed, outcome)?;
    }
    sum.verdict()
}

impl Filling<'_> {
    /// Grants the privileges on named objects.
    async fn named(&self, admin: &str, needed: &[Needed]) -> Result<(), Failure> {
        let version = self.catalog.version;
        let mut conflict = None;
        for tried in 0..TRIES {
            if tried > 0 {
                pause().await;
            }
            let (mut must, mut may) = (Vec::new(), Vec::new());
            for one in needed {
                for wanted in &one.wanted {
                    must.extend(self.catalog.lacks(wanted).await?.1);
                }
                for wanted in &one.beside {
                    may.extend(self.catalog.lacks(wanted).await?.1);
                }
            }
            if tried == 0 && must.is_empty() && may.is_empty() {
                return Ok(());
            }
            let required: Vec<Thing> = grant_plan::one_by_one(&must, self.role, version)
                .into_iter()
                .map(|step| step.thing)
                .collect();
            let steps = grant_plan::one_by_one(must.iter().chain(&may), self.role, version);
            conflict = None;
            if steps.is_empty() {
                break;
            }
            self.catalog.answers.forget();
            let failed = grant_apply::one_by_one(self.catalog.db, steps, NAMED_LOCK).await?;
            for failed in failed {
                if !required.contains(&failed.thing) {
                    continue;
                }
                if failed.is_locked() || failed.meaning() != Meaning::Conflict {
                    return Err(named_failed(&failed));
                }
                conflict = Some(failed);
            }
            if conflict.is_none() {
                break;
            }
        }
        if let Some(failed) = conflict {
            return Err(named_failed(&failed));
        }
        // If the admin may not grant, PostgreSQL only warns. So the result is read.
        for one in needed {
            let mut lacks = Vec::new();
            for wanted in &one.wanted {
                lacks.extend(self.catalog.lacks(wanted).await?.1);
            }
            if !lacks.is_empty() {
                return Err(Failure::new(
                    FailureCode::AdminLacksRights,
                    format!(
                        "{admin} may not grant this: {} ({}); it must own the object or hold the privilege WITH GRANT OPTION",
                        one.text,
                        names(&lacks)
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Grants the privileges on the objects that a pattern finds.
    async fn pattern(&mut self, needed: &Needed) -> Result<Outcome, Failure> {
        let mut outcome = Outcome::default();
        for wanted in &needed.wanted {
            self.walk(wanted, &mut outcome).await?;
        }
        let mut beside = Outcome::default();
        for wanted in &needed.beside {
            self.walk(wanted, &mut beside).await?;
        }
        outcome.waits_beside(beside);
        Ok(outcome)
    }

    /// Goes through the objects that a filter finds, page by page.
    async fn walk(&mut self, wanted: &Wanted, outcome: &mut Outcome) -> Result<(), Failure> {
        let mut from = FIRST_PAGE.to_owned();
        loop {
            fault::point("grant", "page").await;
            if self.is_late() {
                let left = self.catalog.count(wanted, &from).await?;
                outcome.not_reached(left * wanted.privileges.len());
                return Ok(());
            }
            let page = self.settle(wanted, &from, outcome).await?;
            let Some(next) = page.next else {
                return Ok(());
            };
            from = next;
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Grants what is missing on a page, and adds the result to the outcome.
    async fn settle(
        &mut self,
        wanted: &Wanted,
        from: &str,
        outcome: &mut Outcome,
    ) -> Result<Page, Failure> {
        let mut failed: BTreeMap<Thing, String> = BTreeMap::new();
        let mut page = self.catalog.page(wanted, from).await?;
        for _ in 0..TRIES {
            let todo = grant_plan::still_open(&page.lacks, |thing| {
                failed.get(thing).is_none_or(|state| is_conflict(state))
            });
            let is_waiting = page.lacks.iter().any(|lack| lack.busy) && self.patience > 0;
            if self.is_late() || (todo.is_empty() && !is_waiting) {
                break;
            }
            let mut conflicts = false;
            for portion in todo.chunks(PORTION) {
                if self.is_late() {
                    break;
                }
                for one in self.apply(portion).await? {
                    conflicts |= is_conflict(&one.state);
                    failed.insert(one.thing, one.state);
                }
            }
            if todo.is_empty() {
                self.patience -= 1;
            }
            if todo.is_empty() || conflicts {
                pause().await;
            }
            // If the admin may not grant, PostgreSQL only warns, and other sessions may change objects meanwhile.
            page = self.catalog.page(wanted, from).await?;
        }
        outcome.page(&page, &failed, self.is_late());
        Ok(page)
    }

    /// Grants a portion and commits it. If it fails, each object is granted alone.
    async fn apply(&self, portion: &[&Lack]) -> Result<Vec<Failed>, Failure> {
        self.catalog.answers.forget();
        let (db, version) = (self.catalog.db, self.catalog.version);
        let lacks = || portion.iter().copied();
        let statements = grant_plan::together(lacks(), self.role, version);
        let error = match grant_apply::at_once(db, &statements, PATTERN_LOCK).await {
            Ok(()) => return Ok(vec![]),
            Err(error) => error,
        };
        if error.is_lost() {
            return Err(error.into_failure(DOING));
        }
        let steps = grant_plan::one_by_one(lacks(), self.role, version);
        let several = steps.len();
        let failed = grant_apply::one_by_one(db, steps, PATTERN_LOCK).await?;
        // If all statements fail because something is absent, the grant role itself is absent.
        let role_is_gone = failed.len() == several && failed.iter().all(|one| one.state == "42704");
        if role_is_gone {
            return Err(Failure::new(
                FailureCode::NoSuchObject,
                format!("{DOING}: it is gone"),
            ));
        }
        Ok(failed)
    }
}

/// Whether the failure is a short conflict with another session. A lock is not one, because it was waited for.
fn is_conflict(state: &str) -> bool {
    state != LOCK_NOT_AVAILABLE && super::sql_error::meaning(state) == Meaning::Conflict
}

async fn pause() {
    let pause = rand::rng().random_range(PAUSE_MS);
    tokio::time::sleep(Duration::from_millis(pause)).await;
}
