//! The lease protocol of one lease as a model: dispatcher, broker, engines, database and user as
//! one value, and every step any of them can take next, crashes and duplicates among them.
//! [`explore`] walks all that can be reached.
//!
//! What the dispatcher makes of an event and what an engine makes of a revocation is not written
//! again here: the model runs the binaries' own files (`real`). What is written again is what
//! stands around them: the order of an issue (`leases/issue.rs`, `outcomes.rs`, `reconcile.rs`) and of an
//! engine's work (`requests/`, `revocations.rs`, `pg/`).
//!
//! Left out: seals, batches, server identities, admin credentials; several leases, which share
//! nothing in the protocol.

// The binaries' modules are wider than what is used of them here.
#[allow(dead_code)]
#[path = "../../../engine/src/decide.rs"]
mod decide;
#[allow(dead_code)]
#[path = "../../../dispatcher/src/leases/lease.rs"]
mod lease;

mod bag;
pub mod explore;
mod real;
mod steps;
pub mod world;

pub use steps::{Bounds, Mistake, Protocol};
