//! The matrix: versions of PostgreSQL and RabbitMQ, kinds of admin, grants and options of secrets.

mod account_options;
mod accounts;
mod another_admin;
mod check;
mod clear_passwords;
mod cli_leases;
mod dates;
mod few_connections;
mod fresh_grants;
mod grant_faults;
mod grant_kinds;
mod hostile_database;
mod left;
mod locks;
mod looks_beside;
mod managed;
mod odd_names;
mod permissions;
mod planted_isolation;
mod poolers;
mod renewals;
mod sequences;
mod signal_backend;
mod tidy;
mod versions;
mod written_by_people;
