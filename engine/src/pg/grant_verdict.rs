//! The result of granting a set to a role: what was skipped, what follows later, and whether anything was granted.
//! This module is pure.

use std::collections::BTreeMap;

use mayfly_protocol::grant::Privilege;
use mayfly_protocol::task::{Failure, FailureCode};

use super::grant_apply::{DOING, Failed};
use super::grant_catalog::Needed;
use super::grant_pairs::{Lack, NAMES_IN_A_MESSAGE, Page, names};
use super::grant_plan::Thing;
use super::sql_error::{LOCK_NOT_AVAILABLE, Meaning, meaning};

/// The result of one pattern, in pairs of object and privilege.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    total: usize,
    given: usize,
    /// Number of pairs that the admin may not grant or that cannot be granted.
    passed_over: usize,
    /// Some of these pairs, as examples.
    examples: Vec<Lack>,
    waiting: Waiting,
}

/// What a grant role lacks now, in pairs of object and privilege.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Pairs whose object another transaction holds.
    pub(super) locked: usize,
    /// Names of some of these objects.
    names: Vec<String>,
    /// Pairs that were not reached before time ran out.
    pub(super) not_reached: usize,
}

impl Waiting {
    pub(super) fn is_none(&self) -> bool {
        self.pairs() == 0
    }

    pub(super) fn pairs(&self) -> usize {
        self.locked + self.not_reached
    }

    /// The locked objects, for the log.
    pub(super) fn names(&self) -> String {
        self.names.join("; ")
    }

    /// A warning for the caller. It names no object.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.not_reached > 0 {
            warnings.push(format!(
                "the account may lack up to {} of its privileges at present: the engine is still granting many objects",
                self.not_reached
            ));
        }
        if self.locked > 0 {
            warnings.push(format!(
                "the account lacks {} of its privileges at present: another transaction holds their objects; they are granted when it has ended",
                self.locked
            ));
        }
        warnings
    }

    fn add(&mut self, other: Self) {
        self.locked += other.locked;
        self.not_reached += other.not_reached;
        let room = NAMES_IN_A_MESSAGE.saturating_sub(self.names.len());
        self.names.extend(other.names.into_iter().take(room));
    }
}

impl Outcome {
    /// Adds pairs that were not reached in time.
    pub(super) fn not_reached(&mut self, pairs: usize) {
        self.total += pairs;
        self.waiting.not_reached += pairs;
    }

    /// Adds what is still missing on a page after all grants. `failed` has the SQLSTATE of each object that failed.
    pub(super) fn page(&mut self, page: &Page, failed: &BTreeMap<Thing, String>, is_late: bool) {
        self.total += page.total;
        self.given += page.total - page.lacks.len().min(page.total);
        for lack in &page.lacks {
            let of = |keyword, object: &str| failed.get(&(keyword, object.to_owned()));
            let state = of(lack.keyword, &lack.object)
                .or_else(|| of("SCHEMA", &lack.schema.as_ref()?.0))
                .map(String::as_str);
            let is_locked = lack.busy
                || state
                    .is_some_and(|it| it == LOCK_NOT_AVAILABLE || meaning(it) == Meaning::Conflict);
            if lack.is_beyond() {
                self.pass_over(lack);
            } else if is_locked {
                self.waiting.locked += 1;
                if self.waiting.names.len() < NAMES_IN_A_MESSAGE {
                    self.waiting.names.push(names(std::slice::from_ref(lack)));
                }
            } else if state.is_none() && is_late {
                self.waiting.not_reached += 1;
            } else {
                self.pass_over(lack);
            }
        }
    }

    fn pass_over(&mut self, lack: &Lack) {
        self.passed_over += 1;
        if self.examples.len() <= NAMES_IN_A_MESSAGE {
            self.examples.push(lack.clone());
        }
    }

    /// Adds the result for objects that a pattern includes in addition. Only the grants that come later count.
    pub(super) fn waits_beside(&mut self, beside: Self) {
        self.waiting.add(beside.waiting);
    }
}

/// The result of all grants of a set.
#[derive(Debug, Default)]
pub(super) struct Sum {
    /// Whether something was granted or will be.
    given: bool,
    /// Number of pairs of object and privilege that patterns skipped.
    pub(super) passed_over: usize,
    /// Names of some of them, and other notes, for the log.
    pub(super) notes: Vec<String>,
    pub(super) waiting: Waiting,
    /// Why a pattern is empty.
    nothing: Option<Failure>,
}

impl Sum {
    /// The result before any pattern. `named`: named objects were granted.
    pub(super) fn of(named: bool) -> Self {
        Self {
            given: named,
            ..Self::default()
        }
    }

    /// Adds the result of a pattern.
    ///
    /// # Errors
    /// `grant_refused` if the pattern matches objects and the admin may grant nothing on any of them.
    pub(super) fn add(
        &mut self,
        admin: &str,
        version: u32,
        needed: &Needed,
        outcome: Outcome,
    ) -> Result<(), Failure> {
        let Outcome {
            total,
            given,
            passed_over,
            examples,
            waiting,
        } = outcome;
        if total > 0 && passed_over == total {
            return Err(Failure::new(
                FailureCode::GrantRefused,
                format!(
                    "{admin} can grant nothing of this: {} ({}); it must own the objects or hold the privileges WITH GRANT OPTION",
                    needed.text,
                    some_of(&examples, passed_over)
                ),
            ));
        }
        self.given |= given > 0 || waiting.not_reached > 0;
        self.passed_over += passed_over + needed.unknown.len();
        if passed_over > 0 {
            self.notes.push(some_of(&examples, passed_over));
        }
        if let Some(text) = unknown(&needed.unknown, version) {
            self.notes.push(format!("{}: {text}", needed.text));
        }
        if total == 0 {
            let why = nothing(needed, version);
            self.notes.push(why.message.clone());
            self.nothing.get_or_insert(why);
        } else if given == 0 && waiting.locked > 0 {
            self.nothing.get_or_insert_with(|| {
                Failure::new(
                    FailureCode::ObjectLocked,
                    format!(
                        "other transactions lock all objects of {}: {} (SQLSTATE {LOCK_NOT_AVAILABLE}); try again when they have ended",
                        needed.text,
                        waiting.names()
                    ),
                )
            });
        }
        self.waiting.add(waiting);
        Ok(())
    }

    /// Returns itself if any privilege was granted.
    ///
    /// # Errors
    /// Why no privilege was given.
    pub(super) fn verdict(self) -> Result<Self, Failure> {
        match (self.given, self.nothing) {
            (false, Some(failure)) => Err(failure),
            (given, nothing) => Ok(Self {
                given,
                nothing,
                ..self
            }),
        }
    }
}

fn some_of(examples: &[Lack], count: usize) -> String {
    let text = names(&examples[..examples.len().min(NAMES_IN_A_MESSAGE)]);
    match count.saturating_sub(NAMES_IN_A_MESSAGE) {
        0 => text,
        more => format!("{text}; and {more} more"),
    }
}

/// A note about privileges that this version does not have.
pub(super) fn unknown(privileges: &[Privilege], version: u32) -> Option<String> {
    let words: Vec<&str> = privileges.iter().map(|p| p.as_sql()).collect();
    let verb = if words.len() == 1 { "does" } else { "do" };
    (!words.is_empty()).then(|| {
        format!(
            "{} {verb} not exist in PostgreSQL {version}",
            words.join(", ")
        )
    })
}

/// Why a pattern grants nothing.
pub(super) fn nothing(needed: &Needed, version: u32) -> Failure {
    if let Some(absent) = &needed.absent {
        return Failure::new(absent.code, format!("{} ({})", absent.message, needed.text));
    }
    let is_wanted = needed.wanted.iter().any(|it| !it.privileges.is_empty());
    let message = match unknown(&needed.unknown, version) {
        Some(text) if !is_wanted => format!("{} grants nothing: {text}", needed.text),
        _ => format!("nothing in the database matches: {}", needed.text),
    };
    Failure::new(FailureCode::GrantRefused, message)
}

/// The failure of a named object that could not be granted.
pub(super) fn named_failed(failed: &Failed) -> Failure {
    let Failed {
        thing: (keyword, object),
        state,
        message,
    } = failed;
    let what = format!("{} {object}", keyword.to_lowercase());
    let code = match failed.meaning() {
        Meaning::Conflict => {
            let words = if failed.is_locked() {
                "is locked by another transaction"
            } else {
                "is being changed by another transaction"
            };
            return Failure::new(
                FailureCode::ObjectLocked,
                format!("{what} {words} (SQLSTATE {state}); try again when that has ended"),
            );
        }
        Meaning::Server | Meaning::Cancelled => FailureCode::DatabaseUnreachable,
        Meaning::Rights => FailureCode::AdminLacksRights,
        Meaning::Absent => FailureCode::NoSuchObject,
        Meaning::Statement => FailureCode::StatementFailed,
    };
    Failure::new(
        code,
        format!("{DOING}: {what}: {message} (SQLSTATE {state})"),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lack(object: &str) -> Lack {
        Lack {
            keyword: "TABLE",
            object: object.to_owned(),
            privilege: "SELECT".to_owned(),
            held: false,
            grantable: true,
            schema: None,
            busy: false,
            unsayable: false,
        }
    }

    fn needed(text: &str, unknown: Vec<Privilege>) -> Needed {
        Needed {
            text: text.to_owned(),
            pattern: true,
            wanted: vec![],
            beside: vec![],
            unknown,
            absent: None,
        }
    }

    fn outcome(total: usize, lacks: Vec<Lack>, failed: &[(&str, &str)], is_late: bool) -> Outcome {
        let failed = failed
            .iter()
            .map(|(object, state)| (("TABLE", (*object).to_owned()), (*state).to_owned()))
            .collect();
        let page = Page {
            total,
            lacks,
            next: None,
        };
        let mut outcome = Outcome::default();
        outcome.page(&page, &failed, is_late);
        outcome
    }

    /// Why a lack is there decides whether it comes later.
    #[test]
    fn what_is_lacking_is_passed_over_or_comes_later() {
        let is = |lack: Lack, failed: &[(&str, &str)], late: bool| {
            let came = outcome(2, vec![lack], failed, late);
            (
                came.passed_over,
                came.waiting.locked,
                came.waiting.not_reached,
            )
        };
        let busy = Lack {
            busy: true,
            ..lack("a")
        };
        let unsayable = Lack {
            unsayable: true,
            ..lack("a")
        };
        let beyond = Lack {
            grantable: false,
            busy: true,
            ..lack("a")
        };
        assert_eq!(is(busy, &[], false), (0, 1, 0));
        assert_eq!(is(lack("a"), &[("a", "55P03")], false), (0, 1, 0));
        assert_eq!(is(lack("a"), &[("a", "XX000")], true), (0, 1, 0));
        assert_eq!(is(lack("a"), &[], true), (0, 0, 1));
        assert_eq!(is(unsayable, &[], true), (1, 0, 0));
        assert_eq!(is(beyond, &[], true), (1, 0, 0));
        // PostgreSQL reported no error and granted nothing: the object's list of privileges is full.
        assert_eq!(is(lack("a"), &[], false), (1, 0, 0));
        assert_eq!(is(lack("a"), &[("a", "54000")], true), (1, 0, 0));
    }

    #[test]
    fn a_list_is_refused_where_nothing_at_all_is_given() {
        let sum = |named, patterns: Vec<(Needed, Outcome)>| {
            let mut sum = Sum::of(named);
            for (needed, outcome) in patterns {
                sum.add("me", 15, &needed, outcome)?;
            }
            sum.verdict()
        };
        let none = || {
            (
                needed("ALL on app.*", vec![]),
                outcome(0, vec![], &[], false),
            )
        };
        let some = || {
            (
                needed("SELECT on b.*", vec![]),
                outcome(1, vec![], &[], false),
            )
        };
        let maintain = vec![Privilege::Maintain];
        let unknown = || {
            (
                needed("MAINTAIN on *.*", maintain.clone()),
                outcome(0, vec![], &[], false),
            )
        };
        let locked = || {
            let lacks = vec![Lack {
                busy: true,
                ..lack("a.t")
            }];
            (
                needed("SELECT on a.*", vec![]),
                outcome(1, lacks, &[], false),
            )
        };
        let beyond = || {
            let lacks = vec![Lack {
                grantable: false,
                ..lack("c.t")
            }];
            (
                needed("SELECT on c.*", vec![]),
                outcome(1, lacks, &[], false),
            )
        };
        assert_eq!(
            sum(false, vec![none()]).unwrap_err().code,
            FailureCode::GrantRefused
        );
        assert!(sum(true, vec![none()]).is_ok());
        assert!(!sum(false, vec![some(), none()]).unwrap().notes.is_empty());
        let refused = sum(false, vec![unknown()]).unwrap_err();
        assert!(refused.message.contains("PostgreSQL 15"), "{refused}");
        assert_eq!(sum(false, vec![some(), unknown()]).unwrap().passed_over, 1);
        assert_eq!(
            sum(false, vec![locked()]).unwrap_err().code,
            FailureCode::ObjectLocked
        );
        assert_eq!(
            sum(false, vec![some(), locked()]).unwrap().waiting.locked,
            1
        );
        // If the admin may grant none of a pattern's objects, the set is at fault.
        assert!(sum(true, vec![some(), beyond()]).is_err());
        let late = (
            needed("SELECT on *.*", vec![]),
            outcome(1, vec![lack("a")], &[], true),
        );
        let warnings = sum(false, vec![late]).unwrap().waiting.warnings();
        assert!(warnings[0].contains("up to 1 of"), "{warnings:?}");
    }
}
