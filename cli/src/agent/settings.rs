//! The settings of an agent, from flags and from a TOML file. Flags have precedence. Templates of both are used.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;

use super::notify::{self, Notify, PidFile};
use super::sinks::{Format, Owner, Sink, Template, is_service_name};
use crate::duration::seconds;
use crate::failure::Failure;

/// Name of the service in the service file.
const SERVICE: &str = "mayfly";

const EXAMPLES: &str = "\
The files have a credential that is valid. A new lease is read when a third of the secret's maxTtl is left, and the
account of the previous one lives on for 30 s or more, if the secret's maxTtl allows it (at most to its end). So a
program that reads a file for each new connection is never refused. A file is replaced whole and has the mode 0600
(with --group 0640, but a password file always has 0600).

--template SOURCE:FILE fills in a template in the language of Jinja: {{ host }}, {{ port }}, {{ database }},
{{ username }}, {{ password }}, {{ url }}, {{ jdbcUrl }}, with the filters shell, conninfo, urlencode and tojson. In a
FILE that ends with .json or .yaml each value is written as JSON, with its quotes.

SIGTERM, `POST /quit` and the end of the process of --watch-pid end the agent, which revokes its leases then.
`GET /readyz` is 200 from the first write on, while the credential is valid; `GET /healthz` is always 200.

A configuration file has the names of the flags, with `_` for `-`, and `[[template]]` with `source` and `file`.

Examples:
  mayfly agent db:postgresql:dyn1 --env /run/app/db.env --on-change 'systemctl reload app'
  mayfly agent db:postgresql:dyn1 --pg-service /run/app/pg_service.conf --pgpass /run/app/pgpass
  mayfly agent db:postgresql:dyn1 --template app.conf.j2:/run/app/app.conf --signal HUP:/run/app.pid
  mayfly agent --config /etc/mayfly/agent.toml --listen 127.0.0.1:8475
  mayfly agent db:postgresql:dyn1 --once --json /run/app/db.json";

/// Options of `mayfly agent`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AgentArgs {
    /// Path of the secret, such as db:postgresql:dyn1
    #[arg(value_name = "PATH")]
    secret: Option<String>,
    /// A TOML file with these settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Life of a credential, such as 60 or 15m; at most the secret's own ttl
    #[arg(long, value_name = "DURATION")]
    ttl: Option<String>,
    /// A file of NAME=value lines: PGHOST, PGPASSWORD, DATABASE_URL and others
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    env: Option<PathBuf>,
    /// A file with one JSON object
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    json: Option<PathBuf>,
    /// A password file of libpq (PGPASSFILE)
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pgpass: Option<PathBuf>,
    /// A service file of libpq (PGSERVICEFILE); it names the file of --pgpass, or has the password
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pg_service: Option<PathBuf>,
    /// Name of the service in the service file [default: mayfly]
    #[arg(long, value_name = "NAME", help_heading = "Files")]
    service_name: Option<String>,
    /// A file with one JDBC URL
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    jdbc: Option<PathBuf>,
    /// A template and the file that it makes; can be given several times
    #[arg(long, value_name = "SOURCE:FILE", help_heading = "Files", value_parser = template)]
    template: Vec<TemplateFile>,
    /// User who owns the files, by name or number
    #[arg(long, value_name = "USER", help_heading = "Files")]
    owner: Option<String>,
    /// Group that may read the files, by name or number
    #[arg(long, value_name = "GROUP", help_heading = "Files")]
    group: Option<String>,
    /// A command for `sh -c` after each change, also after the first write; at most 60 s
    #[arg(long, value_name = "COMMAND")]
    on_change: Option<OsString>,
    /// A signal after each change, and the file with the id of the process. A file that belongs to neither root nor
    /// this user names only processes of its owner
    #[arg(long, value_name = "SIGNAL:PIDFILE")]
    signal: Option<String>,
    /// Write the files once and exit. The lease is not renewed, and ends with its TTL
    #[arg(long)]
    once: bool,
    /// Answer /healthz, /readyz and POST /quit (from loopback only) on this address
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<SocketAddr>,
    /// End with this process
    #[arg(long, value_name = "PID")]
    watch_pid: Option<i32>,
    /// Do not revoke the leases when the agent ends: they end with their TTL
    #[arg(long)]
    keep: bool,
}

/// The configuration file. Each name in it is that of a flag.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSettings {
    secret: Option<String>,
    ttl: Option<String>,
    env: Option<PathBuf>,
    json: Option<PathBuf>,
    pgpass: Option<PathBuf>,
    pg_service: Option<PathBuf>,
    service_name: Option<String>,
    jdbc: Option<PathBuf>,
    #[serde(default)]
    template: Vec<TemplateFile>,
    owner: Option<String>,
    group: Option<String>,
    on_change: Option<String>,
    signal: Option<String>,
    listen: Option<SocketAddr>,
    watch_pid: Option<i32>,
    #[serde(default)]
    keep: bool,
}

/// A template and its output file.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct TemplateFile {
    source: PathBuf,
    file: PathBuf,
}

/// Reads `SOURCE:FILE`. The first colon separates the two.
fn template(text: &str) -> Result<TemplateFile, String> {
    match text.split_once(':') {
        Some((source, file)) if !source.is_empty() && !file.is_empty() => Ok(TemplateFile {
            source: source.into(),
            file: file.into(),
        }),
        _ => Err("must be SOURCE:FILE, such as app.conf.j2:/run/app/app.conf".into()),
    }
}

/// The settings of one agent, after all checks.
pub(super) struct Settings {
    pub(super) secret: String,
    /// The requested life in seconds. `None`: the secret's TTL.
    pub(super) ttl: Option<u64>,
    /// The files in the order in which they are written. There is at least one.
    pub(super) sinks: Vec<Sink>,
    /// The file for the server's root certificates, if another file names it.
    pub(super) roots: Option<PathBuf>,
    pub(super) notify: Notify,
    pub(super) is_once: bool,
    pub(super) listen: Option<SocketAddr>,
    pub(super) watch_pid: Option<i32>,
    /// Whether leases are not revoked at the end.
    pub(super) is_keeping: bool,
}

impl Settings {
    /// Reads the configuration file and the templates.
    ///
    /// # Errors
    /// A file cannot be read, a value is malformed, or no output file is given. The message names the setting.
    pub(super) fn resolve(args: AgentArgs) -> Result<Self, Failure> {
        let file = match &args.config {
            Some(file) => read(file)?,
            None => FileSettings::default(),
        };
        let secret = args
            .secret
            .or(file.secret)
            .ok_or_else(|| Failure::Usage("a PATH is needed, such as db:postgresql:dyn1".into()))?;
        let ttl = args.ttl.or(file.ttl);
        let ttl = ttl.map(|text| seconds(&text)).transpose();
        let ttl = ttl.map_err(|reason| Failure::Usage(format!("--ttl: {reason}")))?;
        let owner = Owner::read(
            args.owner.or(file.owner).as_deref(),
            args.group.or(file.group).as_deref(),
        )?;
        let name = args
            .service_name
            .or(file.service_name)
            .unwrap_or_else(|| SERVICE.into());
        if !is_service_name(&name) {
            let message = "--service-name: at most 63 visible ASCII characters without `]`";
            return Err(Failure::Usage(message.into()));
        }
        let passfile = args.pgpass.or(file.pgpass);
        let absolute = passfile.as_deref().map(std::path::absolute).transpose();
        let absolute = absolute.map_err(|error| Failure::Usage(format!("--pgpass: {error}")))?;
        let service = Format::Service {
            name,
            passfile: absolute,
        };
        let (env, pg_service) = (args.env.or(file.env), args.pg_service.or(file.pg_service));
        let roots = pg_service
            .as_ref()
            .or(env.as_ref())
            .map(|beside| roots(beside));
        let roots = roots.transpose()?;
        let mut sinks: Vec<Sink> = [
            (Format::Env, env),
            (Format::Roots, roots.clone()),
            (Format::Json, args.json.or(file.json)),
            (Format::Pgpass, passfile),
            (service, pg_service),
            (Format::Jdbc, args.jdbc.or(file.jdbc)),
        ]
        .into_iter()
        .filter_map(|(format, file)| Some(Sink::new(format, file?, owner)))
        .collect();
        for TemplateFile { source, file } in args.template.into_iter().chain(file.template) {
            let template = Template::read(&source, &file)?;
            sinks.push(Sink::new(Format::Template(Box::new(template)), file, owner));
        }
        sinks.sort_by_key(Sink::order);
        different(&sinks)?;
        let signal = args.signal.or(file.signal);
        let signal = signal.map(|text| PidFile::read(&text)).transpose();
        Ok(Self {
            secret,
            ttl,
            sinks,
            roots,
            notify: Notify {
                command: args.on_change.or(file.on_change.map(OsString::from)),
                signal: signal.map_err(|reason| notify::wrong(&reason))?,
            },
            is_once: args.once,
            listen: args.listen.or(file.listen),
            watch_pid: args.watch_pid.or(file.watch_pid),
            is_keeping: args.keep || file.keep,
        })
    }
}

/// The file for root certificates, in the directory of a file that names it.
fn roots(beside: &Path) -> Result<PathBuf, Failure> {
    let mut name = beside.as_os_str().to_owned();
    name.push(".crt");
    std::path::absolute(name).map_err(|error| Failure::Usage(error.to_string()))
}

/// Refuses settings without an output file, and two settings that write the same file.
fn different(sinks: &[Sink]) -> Result<(), Failure> {
    if sinks.is_empty() {
        let message =
            "nothing to write: give --env, --json, --pgpass, --pg-service, --jdbc or --template";
        return Err(Failure::Usage(message.into()));
    }
    let mut files: Vec<&Path> = sinks.iter().map(Sink::file).collect();
    files.sort_unstable();
    match files.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Failure::Usage(format!(
            "two settings write {}",
            pair[0].display()
        ))),
        None => Ok(()),
    }
}

fn read(file: &Path) -> Result<FileSettings, Failure> {
    let wrong = |reason: &dyn std::fmt::Display| {
        Failure::Usage(format!("the configuration {}: {reason}", file.display()))
    };
    let text = std::fs::read_to_string(file).map_err(|error| wrong(&error))?;
    toml::from_str(&text).map_err(|error| wrong(&error))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: AgentArgs,
    }

    fn resolved(arguments: &[&str]) -> Result<Settings, Failure> {
        let line = Line::try_parse_from([&["agent"], arguments].concat());
        Settings::resolve(line.unwrap_or_else(|error| panic!("{error}")).args)
    }

    fn refused(arguments: &[&str]) -> String {
        let refused = resolved(arguments).err().unwrap();
        assert_eq!(refused.exit_code(), 2, "{refused}");
        refused.to_string()
    }

    #[test]
    fn a_flag_has_precedence_over_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("agent.toml");
        let source = directory.path().join("app.j2");
        std::fs::write(&source, "{{ password }}").unwrap();
        let text = format!(
            "secret = \"db:a\"\nttl = \"15m\"\nenv = \"/x/env\"\npgpass = \"/x/pgpass\"\npg_service = \"/x/service\"\n\
             listen = \"127.0.0.1:1\"\nkeep = true\n[[template]]\nsource = {source:?}\nfile = \"/x/app.conf\"\n"
        );
        std::fs::write(&config, text).unwrap();
        let config = config.to_str().unwrap();
        let settings = resolved(&["--config", config, "db:b", "--env", "/y/env"]).unwrap();
        assert_eq!(
            (settings.secret.as_str(), settings.ttl),
            ("db:b", Some(900))
        );
        assert!(settings.is_keeping && settings.listen.is_some());
        let files: Vec<&str> = settings
            .sinks
            .iter()
            .map(|sink| sink.file().to_str().unwrap())
            .collect();
        // The file with the password comes before the file with the user's name.
        assert_eq!(
            files,
            [
                "/x/service.crt",
                "/x/pgpass",
                "/y/env",
                "/x/app.conf",
                "/x/service"
            ]
        );
    }

    #[test]
    fn a_mistake_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("agent.toml");
        std::fs::write(&config, "secret = \"db:a\"\nenvv = \"/x\"\n").unwrap();
        assert!(refused(&["--config", config.to_str().unwrap()]).contains("envv"));
        assert!(refused(&["db:a"]).contains("nothing to write"));
        assert!(refused(&["--env", "/x"]).contains("PATH"));
        assert!(refused(&["db:a", "--env", "/x", "--json", "/x"]).contains("/x"));
        assert!(refused(&["db:a", "--env", "/x", "--ttl", "0"]).contains("--ttl"));
        assert!(refused(&["db:a", "--env", "/x", "--signal", "HUP"]).contains("--signal"));
        assert!(refused(&["db:a", "--env", "/x", "--group", "no-such"]).contains("--group"));
        let absent = refused(&["db:a", "--template", "/no/such:/x"]);
        assert!(absent.contains("/no/such"), "{absent}");
        assert!(template("only").is_err() && template(":x").is_err());
    }
}
