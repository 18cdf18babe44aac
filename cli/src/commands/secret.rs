//! `mayfly secret`: store, read, describe, change, delete and list secrets.

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value};

use crate::Context;
use crate::commands::pages;
use crate::duration::seconds;
use crate::failure::Failure;
use crate::input::Inputs;
use crate::options::{PageArgs, PathArg};
use crate::route::{Route, same_path};
use crate::table::{Column, View};
use crate::ui;

const EXAMPLES: &str = r#"Examples:
  mayfly secret create --body @root.json
  mayfly secret create app:smtp --data '{user: "mailer", password: "…"}' --desc 'mail relay'
  mayfly secret read db:postgresql:dyn1 --ttl 60
  mayfly secret db:postgresql:dyn1 -f data.password
  mayfly secret update db:postgresql:dyn1 --body - < dyn1.json
  mayfly secret list --search-term postgresql
  mayfly secret check db:postgresql:dyn1
  mayfly secret rotate db:postgresql:root
  mayfly secret delete db:postgresql:dyn1 --leases revoke"#;

const BODY_HELP: &str = r#"--body, --data and --attributes take JSON, @FILE, or - for standard input; comments and trailing
commas are allowed.

Examples:
  mayfly secret create --body @root.json
  mayfly secret create db:postgresql:dyn1 --attributes @dyn1-attributes.json --data '{}'
  jq .smtp all.json | mayfly secret create app:smtp --data -"#;

const COLUMNS: &[Column] = &[
    Column("PATH", &["/path"]),
    Column(
        "TYPE",
        &["/attributes/type", "/attributes/linkConfig/linkType"],
    ),
    Column("POOL", &["/attributes/pool"]),
    Column("TTL", &["/attributes/ttl"]),
    Column("VERSION", &["/version"]),
    Column("MODIFIED", &["/lastModified"]),
    Column("DESCRIPTION", &["/description"]),
];

/// Secrets: `mayfly secret PATH` reads one.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
#[command(override_usage = "mayfly secret <VERB> …\n       mayfly secret [OPTIONS] <PATH>")]
pub(crate) struct SecretArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    read: ReadArgs,
}

#[derive(Subcommand)]
enum Verb {
    /// Store a new secret
    #[command(after_help = BODY_HELP)]
    Create(WriteArgs),
    /// Read a secret; a dynamic one issues a credential with a lease
    Read(ReadArgs),
    /// Show a secret without its data; never issues
    Describe {
        #[command(flatten)]
        path: PathArg,
    },
    /// Change a secret; live leases keep what they were made with
    #[command(after_help = BODY_HELP)]
    Update {
        #[command(flatten)]
        write: WriteArgs,
        /// Replace the whole secret by what is given
        #[arg(long)]
        overwrite: bool,
        /// State that the server behind this base secret is the same one as before, moved, upgraded or restored: its
        /// leases are ended where it is now
        #[arg(long)]
        same_server: bool,
    },
    /// Delete a secret by its path
    Delete {
        #[command(flatten)]
        path: PathArg,
        /// What happens to live leases; without this, a secret with live leases is not deleted
        #[arg(long, value_enum, value_name = "WHAT")]
        leases: Option<Leases>,
    },
    /// Test everything that a dynamic or base secret needs, and report what is missing
    #[command(
        after_help = "Makes and ends an account for a dynamic secret. Exits with 1 if something is not ok."
    )]
    Check {
        #[command(flatten)]
        path: PathArg,
    },
    /// Change the password of a base secret's admin, in the database and here
    Rotate {
        #[command(flatten)]
        path: PathArg,
    },
    /// Remove the grant and quarantine roles that nothing needs from a base secret's server
    Tidy {
        #[command(flatten)]
        path: PathArg,
    },
    /// List secrets, without their data
    List {
        /// List only secrets whose path or description contains this text
        #[arg(short, long, value_name = "TERM")]
        search_term: Option<String>,
        #[command(flatten)]
        page: PageArgs,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Leases {
    /// End the leases at once
    Revoke,
    /// Forget the leases without ending their accounts: for a server that is gone for good
    Detach,
}

#[derive(Args)]
struct ReadArgs {
    #[command(flatten)]
    path: PathArg,
    /// Life of the credential, such as 60 or 15m; at most the secret's own ttl
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    ttl: Option<u64>,
    /// A name for this read: sent again with the same name, it gets the same lease
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

#[derive(Args)]
struct WriteArgs {
    #[command(flatten)]
    path: PathArg,
    /// The whole secret: path, attributes, description and data
    #[arg(long, value_name = "JSON", conflicts_with_all = ["data", "attributes", "description"])]
    body: Option<String>,
    /// The secret's data
    #[arg(long, value_name = "JSON")]
    data: Option<String>,
    /// The secret's attributes
    #[arg(long, value_name = "JSON")]
    attributes: Option<String>,
    /// A few words on what it is for
    #[arg(long, visible_alias = "desc", value_name = "TEXT")]
    description: Option<String>,
}

/// Runs the subcommand. The exit code is 1 if a check found something that is not ok.
pub(crate) async fn run(args: SecretArgs, context: &Context) -> Result<u8, Failure> {
    let verb = match args.verb {
        None => Verb::Read(args.read),
        Some(verb) => match args.read.path.given()? {
            None if args.read.ttl.is_none() && args.read.idempotency_key.is_none() => verb,
            _ => return Err(Failure::Usage("options and PATH go after the verb".into())),
        },
    };
    let done = match verb {
        Verb::Create(write) => create(write, context).await,
        Verb::Update {
            write,
            overwrite,
            same_server,
        } => update(write, overwrite, same_server, context).await,
        Verb::Read(read_args) => read(read_args, context).await,
        Verb::Describe { path } => {
            let route = Route::secret(path.required()?)?.then("::description");
            let output = context.output()?;
            output.show(&context.api()?.get(&route).await?, &View::Record)
        }
        Verb::Delete { path, leases } => {
            let path = path.required()?;
            let leases = leases.map(|what| match what {
                Leases::Revoke => "revoke",
                Leases::Detach => "detach",
            });
            let route = Route::secret(path)?.with("leases", leases);
            let output = context.output()?;
            let answer = context.api()?.delete(&route).await?;
            output.changed(&answer, &format!("{path} is deleted"))
        }
        Verb::List { search_term, page } => {
            let output = context.output()?;
            let route = || Route::to("secrets").with("searchTerm", search_term.as_deref());
            let answer = pages::list(&context.api()?, route, "secrets", &page).await?;
            output.show(&answer, &View::List("secrets", COLUMNS))
        }
        Verb::Check { path } => {
            let route = Route::secret(path.required()?)?.then("::check");
            let output = context.output()?;
            let answer = context.api()?.post_long(&route, None).await?;
            output.show(&answer, &View::Findings)?;
            return Ok(u8::from(answer.get("ok") != Some(&Value::Bool(true))));
        }
        Verb::Rotate { path } => {
            let path = path.required()?;
            let route = Route::secret(path)?.then("::rotate");
            let output = context.output()?;
            let answer = context.api()?.post_long(&route, None).await?;
            output.changed(&answer, &format!("the password of {path} is rotated"))
        }
        Verb::Tidy { path } => {
            let route = Route::secret(path.required()?)?.then("::tidy");
            let output = context.output()?;
            output.show(
                &context.api()?.post_long(&route, None).await?,
                &View::Tidied,
            )
        }
    };
    done.map(|()| 0)
}

async fn create(write: WriteArgs, context: &Context) -> Result<(), Failure> {
    let (path, body) = write.secret()?;
    let route = Route::secret(&path)?;
    let output = context.output()?;
    let answer = context
        .api()?
        .post(&route, Some(&Value::Object(body)))
        .await?;
    output.changed(&answer, &format!("{path} is stored"))
}

async fn update(
    write: WriteArgs,
    overwrite: bool,
    same_server: bool,
    context: &Context,
) -> Result<(), Failure> {
    let (path, mut body) = match same_server && write.is_empty() {
        true => (write.path.required()?.to_owned(), Map::new()),
        false => write.secret()?,
    };
    if same_server {
        body.insert("sameServer".into(), true.into());
    }
    let route = Route::secret(&path)?;
    if overwrite {
        body.insert("overwrite".into(), true.into());
    }
    let output = context.output()?;
    let answer = context.api()?.put(&route, &Value::Object(body)).await?;
    warn(&answer);
    output.changed(&answer, &format!("{path} is updated"))
}

async fn read(args: ReadArgs, context: &Context) -> Result<(), Failure> {
    let ReadArgs {
        path,
        ttl,
        idempotency_key,
    } = args;
    let route = Route::secret(path.required()?)?.with("ttl", ttl);
    let output = context.output()?;
    let api = context.api()?;
    let answer = match idempotency_key {
        Some(key) => api.get_once(&route, &key).await?,
        None => api.get_long(&route).await?,
    };
    output.show(&answer, &View::Record)
}

/// Shows the warnings of a change, and the statements that help.
fn warn(answer: &Value) {
    let list = |value: &Value, name: &str| {
        let list = value.get(name).and_then(Value::as_array);
        list.cloned().unwrap_or_default()
    };
    for warning in list(answer, "warnings") {
        let message = warning.get("message").and_then(Value::as_str);
        ui::note(&format!("warning: {}", message.unwrap_or_default()));
        for fix in list(&warning, "fix") {
            ui::note(&format!("  {}", fix.as_str().unwrap_or_default()));
        }
    }
}

impl WriteArgs {
    /// Whether only a path is given.
    fn is_empty(&self) -> bool {
        let given = [&self.body, &self.data, &self.attributes, &self.description];
        given.iter().all(|part| part.is_none())
    }

    /// The path, and the body without it.
    fn secret(&self) -> Result<(String, Map<String, Value>), Failure> {
        let mut inputs = Inputs::default();
        let given = self.path.given()?;
        let Some(body) = &self.body else {
            let path = self.path.required()?;
            let mut body = Map::new();
            if let Some(data) = &self.data {
                body.insert("data".into(), inputs.json("--data", data)?);
            }
            if let Some(attributes) = &self.attributes {
                body.insert(
                    "attributes".into(),
                    inputs.json("--attributes", attributes)?,
                );
            }
            if let Some(description) = &self.description {
                body.insert("description".into(), description.as_str().into());
            }
            if body.is_empty() {
                return Err(Failure::Usage(
                    "give --body, or one of --data, --attributes and --description".into(),
                ));
            }
            return Ok((path.to_owned(), body));
        };
        match inputs.json("--body", body)? {
            Value::Object(body) => named(given, body),
            _ => Err(Failure::Usage("--body must be a JSON object".into())),
        }
    }
}

/// Takes the path out of a body. A path that is given as an argument too must be the same.
fn named(
    given: Option<&str>,
    mut body: Map<String, Value>,
) -> Result<(String, Map<String, Value>), Failure> {
    let path = match (given, body.remove("path")) {
        (given, Some(Value::String(within))) => match given {
            Some(given) if !same_path(given, &within) => {
                return Err(Failure::Usage(format!(
                    "two paths are given: {given}, and {within} in --body"
                )));
            }
            _ => within,
        },
        (_, Some(_)) => return Err(Failure::Usage("`path` in --body must be a string".into())),
        (Some(given), None) => given.to_owned(),
        (None, None) => {
            return Err(Failure::Usage(
                "a PATH is needed, in --body or as an argument".into(),
            ));
        }
    };
    Ok((path, body))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_body_and_a_path_beside_it_must_agree() {
        let named =
            |given: Option<&str>, body: Value| named(given, body.as_object().unwrap().clone());
        let (path, body) = named(None, json!({"path": "db:a", "data": {}})).unwrap();
        assert_eq!(
            (path.as_str(), Value::Object(body)),
            ("db:a", json!({"data": {}}))
        );
        assert_eq!(
            named(Some("db/a"), json!({"path": "db:a"})).unwrap().0,
            "db:a"
        );
        assert_eq!(named(Some("db/a"), json!({})).unwrap().0, "db/a");
        for (given, body) in [
            (Some("db:b"), json!({"path": "db:a"})),
            (None, json!({"data": {}})),
            (Some("db:a"), json!({"path": 1})),
        ] {
            assert_eq!(named(given, body).unwrap_err().exit_code(), 2);
        }
    }
}
