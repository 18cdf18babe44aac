//! Requests to engines about servers, besides making and ending accounts.

pub(crate) mod check;
pub(crate) mod pool;
pub(crate) mod refresh;
pub(crate) mod rotate;
pub(crate) mod same_server;
pub(crate) mod tidy;
