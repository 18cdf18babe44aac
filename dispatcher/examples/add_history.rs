//! Fills a store with ended leases, for `make bench ROW=rows`: `add_history DATA_DIR NUMBER`, with the URL of a store
//! in PostgreSQL in the environment variable `STORE_URL`.

use std::path::PathBuf;

#[tokio::main]
async fn main() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let (Some(data_dir), Some(number)) = (arguments.next(), arguments.next()) else {
        return Err("usage: add_history DATA_DIR NUMBER".to_owned());
    };
    let number = number
        .parse()
        .map_err(|_| "NUMBER is not a number".to_owned())?;
    let url = std::env::var("STORE_URL").ok();
    mayfly_dispatcher::add_history(url.as_deref(), &PathBuf::from(data_dir), number).await
}
