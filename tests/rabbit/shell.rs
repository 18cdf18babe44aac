//! Erlang on the nodes. A start of `rabbitmqctl` costs half a second of a core, and every test needs several. So a
//! few processes evaluate the expressions for all nodes (`rabbitmq.sh shell`).

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use base64::prelude::{BASE64_STANDARD, Engine};

use crate::script;

/// Idle shells. Each ends with the process of the tests, at the end of its input.
static IDLE: Mutex<Vec<Shell>> = Mutex::new(Vec::new());

struct Shell {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    _process: Child,
}

/// Evaluates an expression on the node of a directory; returns the result. A value `{text, T}` is returned as the
/// text.
pub(super) fn eval(directory: &Path, expression: &str) -> String {
    let node = std::fs::read_to_string(directory.join("node")).unwrap();
    let idle = IDLE.lock().unwrap().pop();
    let mut shell = idle.unwrap_or_else(|| Shell::start(directory));
    let result = shell.eval(node.trim(), expression);
    IDLE.lock().unwrap().push(shell);
    result.unwrap_or_else(|error| panic!("{expression}: {error}"))
}

impl Shell {
    fn start(directory: &Path) -> Self {
        let mut process = Command::new(script("rabbitmq.sh"))
            .arg("shell")
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: process.stdin.take().unwrap(),
            output: BufReader::new(process.stdout.take().unwrap()),
            _process: process,
        }
    }

    fn eval(&mut self, node: &str, expression: &str) -> Result<String, String> {
        writeln!(self.input, "{node} {expression}").unwrap();
        self.input.flush().unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        // An empty value ends the line at the space.
        let line = line.trim_end_matches('\n');
        let (word, value) = line.split_once(' ').expect("an answer of the shell");
        let value = String::from_utf8(BASE64_STANDARD.decode(value).unwrap()).unwrap();
        match word {
            "ok" => Ok(value),
            _ => Err(value),
        }
    }
}
