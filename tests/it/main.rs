//! Mayfly end to end, on real RabbitMQ and PostgreSQL: what users do, and every fault the design
//! names, by causing it. `make e2e` runs it.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod accounts;
mod alarms;
mod amqps;
mod api;
mod bad_days;
mod bad_input;
mod base_changes;
mod brokers;
mod chaos;
mod check;
mod cli;
mod cli_leases;
mod clocks;
mod database_hosts;
mod dates;
mod delays;
mod distrust;
mod draining;
mod failover;
mod full_disk;
mod globs;
mod gone;
mod grants;
mod heartbeats;
mod hostile_database;
mod late_creates;
mod ledger;
mod left;
mod locks;
mod main_job;
mod matrix;
mod messages;
mod operations;
mod permissions;
mod reads;
mod rekey;
mod renewals;
mod rogue_server;
mod rotate;
mod rotate_steps;
mod samples;
mod secrecy;
mod several_dispatchers;
mod shapes;
mod sick_database;
mod sight;
mod skew;
mod slots;
mod slow_clients;
mod steps;
mod tidy;
mod traces;
mod unreadable;
