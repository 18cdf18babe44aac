//! Mayfly end to end, on real RabbitMQ and PostgreSQL: what users do, and every fault the design
//! names, by causing it. `make e2e` runs it.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod accounts;
mod api;
mod bad_days;
mod bad_input;
mod cli;
mod delays;
mod failover;
mod grants;
mod main_job;
mod messages;
mod operations;
mod secrecy;
mod sick_database;
