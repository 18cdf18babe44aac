//! The lease protocol of one lease as a model: dispatcher, broker, engines, database and user as
//! one value, and every step any of them can take next, crashes and duplicates among them.
//! [`explore`] walks all that can be reached.
//!
//! What an event makes of a lease, and what becomes of a revocation, is not written again here: the model
//! runs the decisions of the crate `protocol`, as the programs do (`real`). What is written again is what
//! stands around them: the order of an issue (`leases/issue.rs`, `outcomes.rs`, `reconcile.rs`) and of an
//! engine's work (`requests/`, `revocations.rs`, `pg/`).
//!
//! Left out: seals, batches, server identities, admin credentials; several leases, which share
//! nothing in the protocol.

mod bag;
pub mod explore;
mod real;
mod steps;
pub mod world;

pub use steps::{Bounds, Mistake, Protocol};
