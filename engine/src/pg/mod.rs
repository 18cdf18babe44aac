//! Everything said to PostgreSQL; the only room that names tokio-postgres. From here come facts
//! and failures with stable codes, never a driver's type.
//!
//! Only the simple query protocol is used (but for a password that must be in no statement's text), and settings are local to a transaction, so that the
//! engine works through a transaction pooler too. Server messages are never matched by text,
//! only by SQLSTATE.

mod account;
mod breaker;
mod budget;
mod check;
mod check_limits;
mod check_live;
mod check_way;
mod cleanup;
mod clear_password;
mod connect;
mod create;
mod disable_logins;
mod drop_roles;
mod end_sessions;
mod grant_apply;
mod grant_catalog;
mod grant_coverage;
mod grant_fill;
mod grant_kinds;
mod grant_lacks;
mod grant_later;
mod grant_parts;
mod grant_plan;
mod grant_role;
mod grant_sequences;
mod grant_verdict;
mod hosts;
mod jobs;
mod kept;
mod left_behind;
mod limits;
mod moved;
mod new_owner;
mod own_role;
mod protection;
mod renew;
mod replicas;
mod revoke;
mod rotate;
mod row;
mod servers;
mod session;
mod sharing;
mod sql;
mod sql_error;
mod standbys;
mod sweep;
mod tidy;
mod uncommitted;

pub(crate) use budget::Connections;
pub(crate) use check::check;
pub(crate) use create::{Notes, create, prepare};
pub(crate) use grant_role::{GrantRoles, GrantSet};
pub(crate) use hosts::Hosts;
pub(crate) use limits::{Permit, ServerLimits};
pub(crate) use renew::renew;
pub(crate) use replicas::wait_for_replicas;
pub(crate) use revoke::{revoke, revoke_alone};
pub(crate) use rotate::rotate;
pub(crate) use servers::{Servers, target_key};
pub(crate) use sweep::sweep;
pub(crate) use tidy::tidy;
