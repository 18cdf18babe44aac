//! `mayfly-dispatcher --rekey`: renews a key of a store that exists, also beside dispatchers that
//! run with it. They take it up within a second.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use mayfly_common::fault;

use super::open::{Keeping, OpenError, Place, master_key, meta};
use super::postgres::Postgres;
use super::sql::Connection;
use super::{StoreError, generations};
use crate::keys::Generation;

/// Which key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Rekey {
    /// Passwords of new leases come from a new derivation key.
    Derivation,
}

/// Does it. Returns the key's newest generation.
///
/// # Errors
/// See [`OpenError`].
pub(crate) fn rekey(place: &Place, what: Rekey) -> Result<Generation, OpenError> {
    // PostgreSQL's has a runtime of its own, which cannot be driven from within another.
    let renewed = std::thread::scope(|scope| scope.spawn(|| renew(place, what)).join());
    renewed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn renew(place: &Place, what: Rekey) -> Result<Generation, OpenError> {
    let failed = |error: &dyn std::fmt::Display| OpenError::Database {
        place: place.keeping.to_string(),
        reason: error.to_string(),
    };
    let connection = beside(place)?;
    connection.begin().map_err(|e| failed(&e))?;
    let used = meta(&connection, "installation").map_err(|e| failed(&e))?;
    if used.is_none() {
        return Err(failed(&"there is nothing in this store"));
    }
    let sealer = master_key(&place.key_file, false)?;
    // What cannot be opened was sealed with another master key.
    generations::load(&connection, &sealer).map_err(|error| match error {
        StoreError::Unavailable(_) => OpenError::Key {
            file: place.key_file.clone(),
            reason: "this master key does not open the store; it is of another store",
        },
        other => failed(&other),
    })?;
    step("begun");
    let renewed = match what {
        Rekey::Derivation => generations::add_derivation(&connection, &sealer),
    };
    let generation = renewed.map_err(|e| failed(&e))?;
    step("written");
    connection.commit().map_err(|e| failed(&e))?;
    step("committed");
    Ok(generation)
}

/// The store, where a dispatcher may have it open too.
fn beside(place: &Place) -> Result<Connection, OpenError> {
    let failed = |error: &dyn std::fmt::Display| OpenError::Database {
        place: place.keeping.to_string(),
        reason: error.to_string(),
    };
    match &place.keeping {
        Keeping::Sqlite(file) => {
            let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
            let store =
                rusqlite::Connection::open_with_flags(file, flags).map_err(|e| failed(&e))?;
            store
                .execute_batch("PRAGMA synchronous = FULL; PRAGMA busy_timeout = 10000; PRAGMA secure_delete = ON;")
                .map_err(|e| failed(&e))?;
            let columns = "SELECT count(*) FROM pragma_table_info('leases') WHERE name = 'nonce'";
            let known = store.query_row(columns, [], |row| row.get::<_, i64>(0));
            if known.map_err(|e| failed(&e))? == 0 {
                return Err(failed(
                    &"this store is of an older version; start a dispatcher of this version with it first",
                ));
            }
            Ok(Connection::Sqlite(store))
        }
        Keeping::Postgres(url) => {
            let offset = Arc::new(AtomicI64::new(0));
            let postgres = Postgres::open((**url).clone(), offset).map_err(|e| failed(&e))?;
            Ok(Connection::Postgres(Box::new(postgres)))
        }
    }
}

/// A named step, see [`fault::point`].
fn step(name: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    if let Ok(runtime) = runtime {
        runtime.block_on(fault::point("rekey", name));
    }
}
