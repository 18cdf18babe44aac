//! The place and the form of an answer: a table for a person at a terminal, JSON for a pipe or a file, one raw value
//! for `--filter`.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::failure::Failure;
use crate::filter::{self, Filter};
use crate::table::View;
use crate::ui;

/// The options that every answer obeys.
#[derive(Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct OutputArgs {
    /// What the answer looks like [default: table on a terminal, else json]
    #[arg(short, long, global = true, value_enum)]
    encoding: Option<Encoding>,
    /// Where the answer goes: stdout, or file:NAME (replaced whole, readable by you alone)
    #[arg(short, long, global = true, value_name = "PLACE", value_parser = place)]
    out: Option<Place>,
    /// Print only this value, such as data.password; exit code 1 if it is absent
    #[arg(short, long, global = true, value_name = "NAME")]
    filter: Option<Filter>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Encoding {
    Json,
    Table,
}

#[derive(Clone)]
enum Place {
    Stdout,
    File(PathBuf),
}

fn place(text: &str) -> Result<Place, String> {
    match text.strip_prefix("file:") {
        _ if text == "stdout" => Ok(Place::Stdout),
        Some(name) if !name.is_empty() => Ok(Place::File(name.into())),
        _ => Err("must be stdout or file:NAME".into()),
    }
}

enum Sink {
    Stdout,
    /// A temporary file next to the file that it will replace.
    File {
        temporary: NamedTempFile,
        file: PathBuf,
    },
}

/// The place for one answer, already opened.
pub(crate) struct Output {
    encoding: Option<Encoding>,
    filter: Option<Filter>,
    sink: Sink,
}

impl Output {
    pub(crate) fn open(args: &OutputArgs) -> Result<Self, Failure> {
        let sink = match &args.out {
            None | Some(Place::Stdout) => Sink::Stdout,
            Some(Place::File(file)) => {
                if file.is_dir() {
                    return Err(unwritable(
                        file,
                        &io::Error::from(io::ErrorKind::IsADirectory),
                    ));
                }
                let directory = file
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty());
                // tempfile makes the file with mode 0600.
                let temporary = NamedTempFile::new_in(directory.unwrap_or(Path::new(".")))
                    .map_err(|error| unwritable(file, &error))?;
                Sink::File {
                    temporary,
                    file: file.clone(),
                }
            }
        };
        Ok(Self {
            encoding: args.encoding,
            filter: args.filter.clone(),
            sink,
        })
    }

    /// Whether the answer is a table on a terminal.
    pub(crate) fn is_for_person(&self) -> bool {
        matches!(self.sink, Sink::Stdout)
            && io::stdout().is_terminal()
            && self.filter.is_none()
            && self.encoding != Some(Encoding::Json)
    }

    pub(crate) fn show(self, answer: &Value, view: &View) -> Result<(), Failure> {
        ui::warnings(answer);
        let on_terminal = matches!(self.sink, Sink::Stdout) && io::stdout().is_terminal();
        let as_table = self
            .encoding
            .map_or(on_terminal, |encoding| encoding == Encoding::Table);
        let text = match &self.filter {
            Some(filter) => match filter.find(answer) {
                Some(value) => filter::raw(value),
                None => return Err(absent(filter, answer)),
            },
            None if as_table => view.text(answer, on_terminal && ui::colours()),
            None => format!("{answer:#}"),
        };
        let remark = as_table && self.filter.is_none();
        self.text(&text)?;
        if remark {
            view.remark(answer);
        }
        Ok(())
    }

    /// Writes the answer to a change. If the answer is empty, a person sees the text `done`.
    pub(crate) fn changed(self, answer: &Value, done: &str) -> Result<(), Failure> {
        if answer.is_null() && self.filter.is_none() {
            ui::note(done);
            return Ok(());
        }
        self.show(answer, &View::Record)
    }

    /// Writes text, with one line end.
    pub(crate) fn text(self, text: &str) -> Result<(), Failure> {
        let text = text.strip_suffix('\n').unwrap_or(text);
        match self.sink {
            Sink::Stdout => {
                let mut stdout = io::stdout().lock();
                let ending = if text.is_empty() { "" } else { "\n" };
                match write!(stdout, "{text}{ending}").and_then(|()| stdout.flush()) {
                    // The reader has closed the pipe: it has read enough.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                    Err(error) => Err(Failure::Local(format!(
                        "cannot write to standard output: {error}"
                    ))),
                    Ok(()) => Ok(()),
                }
            }
            Sink::File {
                mut temporary,
                file,
            } => {
                writeln!(temporary, "{text}")
                    .and_then(|()| temporary.as_file().sync_all())
                    .map_err(|error| unwritable(&file, &error))?;
                temporary
                    .persist(&file)
                    .map_err(|error| unwritable(&file, &error.error))?;
                Ok(())
            }
        }
    }
}

fn unwritable(file: &Path, error: &io::Error) -> Failure {
    Failure::Local(format!("cannot write {}: {error}", file.display()))
}

fn absent(filter: &Filter, answer: &Value) -> Failure {
    let lease = match answer.pointer("/data/leaseId").and_then(Value::as_str) {
        Some(lease) => format!("; lease {lease} was issued"),
        None => String::new(),
    };
    Failure::Local(format!(
        "the answer does not have {}{lease}",
        filter.as_str()
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    fn output(file: &Path, filter: Option<&str>) -> Output {
        Output::open(&OutputArgs {
            encoding: None,
            out: Some(place(&format!("file:{}", file.display())).unwrap()),
            filter: filter.map(|text| text.parse().unwrap()),
        })
        .unwrap()
    }

    #[test]
    fn a_file_is_replaced_whole_and_closed_to_others() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("answer");
        std::fs::write(&file, "old, with mode 0644").unwrap();
        let answer = json!({"data": {"password": "p w"}});
        output(&file, Some("data.password"))
            .show(&answer, &View::Record)
            .unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "p w\n");
        assert_eq!(
            std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        output(&file, None).show(&answer, &View::Record).unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&std::fs::read(&file).unwrap()).unwrap(),
            answer
        );
    }

    #[test]
    fn an_absent_value_leaves_the_file_alone() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("answer");
        std::fs::write(&file, "old").unwrap();
        let failure = output(&file, Some("data.x"))
            .show(&json!({"data": {"leaseId": "l1"}}), &View::Record)
            .unwrap_err();
        assert_eq!(failure.exit_code(), 1);
        assert_eq!(
            failure.to_string(),
            "the answer does not have data.x; lease l1 was issued"
        );
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_is_stdout_or_a_file() {
        assert!(place("stdout").is_ok() && place("file:x").is_ok());
        assert!(place("file:").is_err() && place("x").is_err());
    }
}
