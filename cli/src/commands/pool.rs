//! `mayfly pool`: pools of engines, and their engine keys.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Value, json};

use crate::Context;
use crate::commands::pages;
use crate::failure::Failure;
use crate::input;
use crate::manifest;
use crate::options::PageArgs;
use crate::route::Route;
use crate::table::{Column, View};
use crate::ui;

const EXAMPLES: &str = r#"Examples:
  mayfly pool create pool1 --key-file pool1.key
  mayfly pool create pool1 --secret mayfly-pool1 | kubectl create -f -
  mayfly pool list
  mayfly pool delete pool1
  mayfly pool rotate-key pool1 --old-key-file pool1.key --key-file pool1.new.key
  kubectl get secret mayfly-pool1 -o go-template='{{index .data "pool.key" | base64decode}}' |
    mayfly pool rotate-key pool1 --old-key-file - --secret mayfly-pool1 | kubectl replace -f -
  mayfly pool rotate-key pool1 --finish      # when every engine has the new file
  mayfly pool distrust pool1                 # its key is in wrong hands: other pools end its leases

An engine is given the key file with MAYFLY__POOL__KEY_FILE. The key is shown once, when the pool
is created, and cannot be had again."#;

const COLUMNS: &[Column] = &[
    Column("NAME", &["/name"]),
    Column("ENGINES", &["/engines"]),
    Column("CREATED", &["/created"]),
    Column("DISTRUSTED", &["/distrusted"]),
    Column("CREATED BY", &["/createdBy"]),
];

/// Options of `mayfly pool`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PoolArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Create a pool; its engine key is shown only this once
    Create {
        /// 1 to 63 of a-z, 0-9, `_` and `-`
        name: String,
        /// Write the engine key to this new file (mode 0600) and do not show it
        #[arg(long, value_name = "FILE")]
        key_file: Option<PathBuf>,
        /// Print a Kubernetes Secret of this name with the engine key, as `pool.key`
        #[arg(long, value_name = "NAME", conflicts_with = "key_file")]
        secret: Option<String>,
    },
    /// Show one pool by its name
    Read {
        /// Name of the pool
        name: String,
    },
    /// List pools, page by page
    List {
        #[command(flatten)]
        page: PageArgs,
    },
    /// Give a pool a new engine key; both are valid side by side until --finish
    #[command(group(ArgGroup::new("step").required(true).args(["key_file", "secret", "finish", "give_up"])))]
    RotateKey {
        /// Name of the pool
        name: String,
        /// The engines' present key file, or `-` for standard input: the new file holds its key too
        #[arg(long, value_name = "FILE", conflicts_with_all = ["finish", "give_up"])]
        old_key_file: Option<PathBuf>,
        /// Write the new engine key to this new file (mode 0600)
        #[arg(long, value_name = "FILE", requires = "old_key_file")]
        key_file: Option<PathBuf>,
        /// Print a Kubernetes Secret of this name with the new engine key, as `pool.key`
        #[arg(long, value_name = "NAME", requires = "old_key_file")]
        secret: Option<String>,
        /// Use the new key from now on: every engine has it
        #[arg(long)]
        finish: bool,
        /// Forget the new key
        #[arg(long)]
        give_up: bool,
    },
    /// Stop trusting a pool, for good: it gets no tasks, its messages are refused, and other pools end its leases
    Distrust {
        /// Name of the pool
        name: String,
    },
    /// Delete a pool that has no leases left
    Delete {
        /// Name of the pool
        name: String,
    },
}

pub(crate) async fn run(args: PoolArgs, context: &Context) -> Result<(), Failure> {
    match args.verb {
        Verb::Create {
            name,
            key_file,
            secret,
        } => create(&name, key_file.as_deref(), secret.as_deref(), context).await,
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
        Verb::RotateKey {
            name,
            old_key_file,
            key_file,
            secret,
            finish,
            give_up: _,
        } => match old_key_file {
            Some(old) => {
                begin_rotation(&name, &old, key_file.as_deref(), secret.as_deref(), context).await
            }
            None => {
                let route = Route::item("pools", &name)?.then("/rotate-key");
                let step = if finish { "finish" } else { "giveUp" };
                let output = context.output()?;
                let body = json!({ step: true });
                let answer = context.api()?.post(&route, Some(&body)).await?;
                if finish {
                    advise(&answer, "the old key was stolen");
                }
                output.changed(
                    &answer,
                    &format!("the rotation of the key of pool {name} is finished"),
                )
            }
        },
        Verb::Distrust { name } => {
            let route = Route::item("pools", &name)?.then("/distrust");
            let output = context.output()?;
            let answer = context.api()?.post(&route, None).await?;
            advise(&answer, "its key was stolen");
            output.changed(&answer, &format!("pool {name} is distrusted"))
        }
        Verb::Delete { name } => {
            let route = Route::item("pools", &name)?;
            let output = context.output()?;
            let answer = context.api()?.delete(&route).await?;
            output.changed(&answer, &format!("pool {name} is deleted"))
        }
    }
}

/// Advises to change passwords. Somebody who has a pool's key can open all earlier messages to the pool, which
/// contain admins' passwords.
fn advise(answer: &Value, when: &str) {
    let bases = answer["baseSecrets"].as_array().into_iter().flatten();
    let acts: Vec<String> = bases
        .filter_map(|path| Some(format!("`mayfly secret rotate {}`", path.as_str()?)))
        .collect();
    if !acts.is_empty() {
        ui::note(&format!(
            "if {when}, change the admins' passwords, which were sealed to that key: {}",
            acts.join(", ")
        ));
    }
}

async fn create(
    name: &str,
    key_file: Option<&Path>,
    secret: Option<&str>,
    context: &Context,
) -> Result<(), Failure> {
    secret.map_or(Ok(()), manifest::check_name)?;
    let output = context.output()?;
    let api = context.api()?;
    // Made before the call: a key that cannot be written would be lost.
    let key_file = key_file.map(KeyFile::create).transpose()?;
    let route = Route::to("pools");
    let body = json!({ "name": name });
    let answer = tokio::select! {
        answer = api.post(&route, Some(&body)) => answer,
        // An interrupt must not leave the key file behind.
        _ = tokio::signal::ctrl_c() => Err(Failure::NoAnswer("interrupted".into())),
    };
    if let Err(Failure::NoAnswer(_)) = answer {
        ui::warning(&format!(
            "pool {name} may have been created. Then its key is lost: run `mayfly pool delete {name}` before another try"
        ));
    }
    let mut answer = answer?;
    let lost = |why: String| {
        Failure::Local(format!(
            "pool {name} is created, but its key is lost ({why}): delete the pool and create it again"
        ))
    };
    let mut take_key = || match answer
        .as_object_mut()
        .and_then(|members| members.remove("engineKey"))
    {
        Some(Value::String(key)) => Ok(zeroize::Zeroizing::new(key)),
        _ => Err(lost("the answer does not have engineKey".into())),
    };
    if let Some(secret) = secret {
        let made = manifest::secret(secret, &[("pool.key", &take_key()?)]);
        return output.text(&format!("{made:#}"));
    }
    if let Some(key_file) = key_file {
        let file = key_file.path.clone();
        let key = take_key()?;
        key_file
            .write(&key)
            .map_err(|error| lost(error.to_string()))?;
        ui::note(&format!("the engine key is in {}", file.display()));
    }
    output.changed(&answer, &format!("pool {name} is created"))
}

/// The present engine key of a pool, from a file or from standard input. It is the private half.
fn present_key(name: &str, file: &Path) -> Result<Value, Failure> {
    let shown = file.display();
    let read = if file == Path::new("-") {
        io::read_to_string(io::stdin())
    } else {
        fs::read_to_string(file)
    };
    let text = zeroize::Zeroizing::new(
        read.map_err(|error| Failure::Usage(format!("cannot read {shown}: {error}")))?,
    );
    let key: Value = serde_json::from_str(input::trimmed(&text))
        .map_err(|_| Failure::Usage(format!("{shown} is not an engine key")))?;
    match key.get("privateKey") {
        Some(private) if key["pool"] == name => Ok(private.clone()),
        _ => Err(Failure::Usage(format!(
            "{shown} is not an engine key of pool {name}"
        ))),
    }
}

/// Requests a new key. Writes it to a new file or as a Secret, together with the present key.
async fn begin_rotation(
    name: &str,
    old: &Path,
    new: Option<&Path>,
    secret: Option<&str>,
    context: &Context,
) -> Result<(), Failure> {
    secret.map_or(Ok(()), manifest::check_name)?;
    let private = present_key(name, old)?;
    let api = context.api()?;
    let output = context.output()?;
    // Made before the call: a key that cannot be written would be lost.
    let file = new.map(KeyFile::create).transpose()?;
    let route = Route::item("pools", name)?.then("/rotate-key");
    let mut answer = api.post(&route, Some(&json!({}))).await?;
    let lost = |why: &str| {
        Failure::Local(format!(
            "the new key is lost ({why}): `mayfly pool rotate-key {name} --give-up`, then try again"
        ))
    };
    let text = match answer
        .as_object_mut()
        .and_then(|members| members.remove("engineKey"))
    {
        Some(Value::String(text)) => zeroize::Zeroizing::new(text),
        _ => return Err(lost("the answer does not have engineKey")),
    };
    let mut key: Value = serde_json::from_str(&text)
        .map_err(|_| lost("the engineKey in the answer is not valid"))?;
    key["previousKeys"] = json!([private]);
    let text = zeroize::Zeroizing::new(format!("{key:#}"));
    let next = format!("then `mayfly pool rotate-key {name} --finish`");
    if let Some(secret) = secret {
        let made = manifest::secret(secret, &[("pool.key", &text)]);
        output
            .text(&format!("{made:#}"))
            .map_err(|error| lost(&error.to_string()))?;
        ui::note(&format!("restart the engines with the new Secret, {next}"));
        return Ok(());
    }
    if let Some(file) = file {
        let shown = file.path.display().to_string();
        file.write(&text)
            .map_err(|error| lost(&error.to_string()))?;
        ui::note(&format!(
            "the new engine key is in {shown}; restart the engines with it, {next}"
        ));
    }
    output.changed(
        &answer,
        &format!("the rotation of the key of pool {name} has begun"),
    )
}

/// A new file for a key. It is removed again unless the key was written to it.
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
                    "{} exists already; a key file is never overwritten",
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
            // If an empty file is left behind, the next try fails with a message that says so.
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
