//! The fast tier, part of `make check`: what users do, on the shared servers, each test within seconds.

mod api;
mod bad_input;
mod cli;
mod database_hosts;
mod delays;
mod draining;
mod first_reads;
mod globs;
mod gone;
mod grants;
mod half_declared;
mod heartbeats;
mod leaves_nothing;
mod local_proxy;
mod main_job;
mod private;
mod reads;
mod shapes;
mod terminal;
