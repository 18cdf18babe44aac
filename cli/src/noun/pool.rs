//! `mayfly pool`: pools of engines, and the key that makes an engine one of a pool.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::Context;
use crate::args::PageArgs;
use crate::failure::Failure;
use crate::noun::pages;
use crate::route::Route;
use crate::say;
use crate::table::{Column, View};

const EXAMPLES: &str = "\
Examples:
  mayfly pool create pool1 --key-file pool1.key
  mayfly pool list
  mayfly pool delete pool1

An engine is given the key file with MAYFLY__POOL__KEY_FILE. The key is shown once, when the pool
is created, and cannot be had again.";

const COLUMNS: &[Column] = &[
    Column("NAME", &["/name"]),
    Column("ENGINES", &["/engines"]),
    Column("CREATED", &["/created"]),
    Column("CREATED BY", &["/createdBy"]),
];

/// Pools.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PoolArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Create a pool; its engine key is told this once
    Create {
        /// 1 to 63 of a-z, 0-9, `_` and `-`
        name: String,
        /// Write the engine key to this new file (mode 0600) and do not show it
        #[arg(long, value_name = "FILE")]
        key_file: Option<PathBuf>,
    },
    /// Show one pool
    Read {
        /// Name of the pool
        name: String,
    },
    /// List pools
    List {
        #[command(flatten)]
        page: PageArgs,
    },
    /// Delete a pool none of whose leases is left
    Delete {
        /// Name of the pool
        name: String,
    },
}

pub(crate) async fn run(args: PoolArgs, context: &Context) -> Result<(), Failure> {
    match args.verb {
        Verb::Create { name, key_file } => create(&name, key_file.as_deref(), context).await,
        Verb::Read { name } => {
            let route = Route::item("pools", &name)?;
            let output = context.output()?;
            output.show(&context.api()?.get(&route).await?, &View::Record)
        }
        Verb::List { page } => {
            let output = context.output()?;
            let answer =
                pages::list(&context.api()?, || Route::to("pools"), "pools", &page).await?;
            output.show(&answer, &View::List("pools", COLUMNS))
        }
        Verb::Delete { name } => {
            let route = Route::item("pools", &name)?;
            let output = context.output()?;
            let answer = context.api()?.delete(&route).await?;
            output.changed(&answer, &format!("pool {name} is deleted"))
        }
    }
}

async fn create(name: &str, key_file: Option<&Path>, context: &Context) -> Result<(), Failure> {
    let output = context.output()?;
    let api = context.api()?;
    // Before the call: a key that cannot be written down would be lost.
    let key_file = key_file.map(KeyFile::create).transpose()?;
    let route = Route::to("pools");
    let body = json!({ "name": name });
    let answer = tokio::select! {
        answer = api.post(&route, Some(&body)) => answer,
        // The key file must not stay behind.
        _ = tokio::signal::ctrl_c() => Err(Failure::NoAnswer("interrupted".into())),
    };
    if let Err(Failure::NoAnswer(_)) = answer {
        say::warning(&format!(
            "if pool {name} is there now, its key is lost: \
             `mayfly pool delete {name}` before another try"
        ));
    }
    let mut answer = answer?;
    if let Some(key_file) = key_file {
        let file = key_file.path.clone();
        let lost = |why: String| {
            Failure::Local(format!(
                "pool {name} is created, but its key is not in {} ({why}): delete the pool and create it again",
                file.display()
            ))
        };
        let key = match answer
            .as_object_mut()
            .and_then(|members| members.remove("engineKey"))
        {
            Some(Value::String(key)) => key,
            _ => return Err(lost("the answer has no engineKey".into())),
        };
        key_file
            .write(&key)
            .map_err(|error| lost(error.to_string()))?;
        say::note(&format!("the engine key is in {}", file.display()));
    }
    output.changed(&answer, &format!("pool {name} is created"))
}

/// A new file for a key; gone again unless the key was written to it.
struct KeyFile {
    path: PathBuf,
    file: File,
    written: bool,
}

impl KeyFile {
    fn create(path: &Path) -> Result<Self, Failure> {
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
        {
            Ok(file) => Ok(Self {
                path: path.to_owned(),
                file,
                written: false,
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Failure::Usage(format!(
                    "{} is there already; a key file is never overwritten",
                    path.display()
                )))
            }
            Err(error) => Err(Failure::Usage(format!(
                "cannot create {}: {error}",
                path.display()
            ))),
        }
    }

    fn write(mut self, key: &str) -> io::Result<()> {
        self.file.write_all(key.as_bytes())?;
        self.file.sync_all()?;
        self.written = true;
        Ok(())
    }
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        if !self.written {
            // An empty file left behind only refuses the next try, which says so.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_file_is_new_closed_and_whole_or_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool1.key");
        drop(KeyFile::create(&path).unwrap());
        assert!(!path.exists());
        KeyFile::create(&path)
            .unwrap()
            .write("{\"key\":1}")
            .unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"key\":1}");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(KeyFile::create(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"key\":1}");
    }
}
