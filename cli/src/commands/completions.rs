//! `mayfly completions`: scripts for shells. The script contains options and commands. It asks the dispatcher for
//! the paths of secrets when a word is completed.

use std::time::Duration;

use clap::{Args, Command};
use clap_complete::{Shell, generate};
use serde_json::Value;
use tokio::time::timeout;

use crate::Context;
use crate::failure::Failure;
use crate::route::Route;

const EXAMPLES: &str = "\
Paths of secrets are completed from the dispatcher, in bash, zsh and fish.

Examples:
  mayfly completions bash > ~/.local/share/bash-completion/completions/mayfly
  mayfly completions zsh > ~/.zfunc/_mayfly
  mayfly completions fish > ~/.config/fish/completions/mayfly.fish";

/// Time limit of the call, because a person waits for it.
const PATIENCE: Duration = Duration::from_secs(3);
/// Maximum number of paths that are offered.
const PATHS: u32 = 200;

/// Adds the paths to the words that `_mayfly` offers. bash splits words at colons, so it needs only the part after
/// the last colon.
const BASH: &str = r#"
_mayfly_with_paths() {
    _mayfly "$@"
    local before=${COMP_LINE:0:COMP_POINT} path paths=()
    local word=${before##* }
    case "$word $before " in
        -*) return ;;
        *" -- "*) return ;;
        *" secret "* | *" exec "* | *" psql "* | *" agent "* | *" proxy "* | *" -r "* | *" --path "*) ;;
        *) return ;;
    esac
    while IFS= read -r path; do
        [[ $COMP_WORDBREAKS == *:* ]] && path=${path#"${word%"${word##*:}"}"}
        paths+=("$path")
    done < <(mayfly __paths "$word" 2>/dev/null)
    [ ${#paths[@]} -eq 0 ] || COMPREPLY=("${paths[@]}")
}
complete -F _mayfly_with_paths -o nosort -o bashdefault -o default mayfly
"#;

const ZSH: &str = r#"
_mayfly_paths() {
    local -a paths
    paths=(${(f)"$(mayfly __paths "$PREFIX" 2>/dev/null)"})
    compadd -a paths
}
"#;

const FISH: &str = r#"
complete -c mayfly -n "__fish_seen_subcommand_from secret exec psql agent proxy" -a "(mayfly __paths (commandline -ct) 2>/dev/null)"
"#;

/// Options of `mayfly completions`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// The shell to complete for
    shell: Shell,
}

/// Prints the script for `cli`, the whole command line.
pub(crate) fn run(
    args: &CompletionsArgs,
    mut cli: Command,
    context: &Context,
) -> Result<(), Failure> {
    let mut script = Vec::new();
    generate(args.shell, &mut cli, "mayfly", &mut script);
    let script = with_paths(args.shell, &String::from_utf8_lossy(&script));
    context.output()?.text(&script)
}

fn with_paths(shell: Shell, script: &str) -> String {
    match shell {
        Shell::Bash => format!("{script}{BASH}"),
        Shell::Fish => format!("{script}{FISH}"),
        Shell::Zsh => {
            let takes_path = |line: &str| line.contains("Path of the secret");
            let lines = script.lines().map(|line| match takes_path(line) {
                true => line.replace(":_default'", ":_mayfly_paths'"),
                false => line.to_owned(),
            });
            let script: Vec<String> = lines.collect();
            // The function comes before the line that runs the script.
            let script = script.join("\n");
            match script.rfind("\nif [ \"$funcstack[1]\"") {
                Some(end) => format!("{}\n{ZSH}{}\n", &script[..end], &script[end..]),
                None => script,
            }
        }
        _ => script.to_owned(),
    }
}

/// The beginning of a path, from a shell.
#[derive(Args)]
pub(crate) struct PathsArgs {
    #[arg(default_value = "")]
    begin: String,
}

/// Prints the paths that begin with this text. Without an answer it prints nothing: a shell shows no errors.
pub(crate) async fn paths(args: &PathsArgs, context: &Context) -> Result<(), Failure> {
    let route = Route::to("secrets").with("limit", Some(PATHS));
    let term = args.begin.replace('/', ":");
    let route = route.with("searchTerm", Some(&term).filter(|term| !term.is_empty()));
    let api = context.api()?;
    let answer = timeout(PATIENCE, api.get(&route)).await;
    let answer = answer.map_err(|_| Failure::Local("no answer in time".into()))??;
    context
        .output()?
        .text(&beginning(&answer, &args.begin).join("\n"))
}

/// The paths of an answer that begin with this text, written with the typed separator.
fn beginning(answer: &Value, begin: &str) -> Vec<String> {
    let secrets = answer.get("secrets").and_then(Value::as_array);
    secrets
        .into_iter()
        .flatten()
        .filter_map(|secret| secret.get("path")?.as_str())
        .map(|path| match begin.contains('/') {
            true => path.replace(':', "/"),
            false => path.to_owned(),
        })
        // bash gives other characters a meaning when it completes a word.
        .filter(|path| path.starts_with(begin) && path.chars().all(is_plain))
        .collect()
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_.:/-".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use serde_json::json;

    #[test]
    fn paths_keep_the_separator_that_was_typed() {
        let answer =
            json!({"secrets": [{"path": "db:app:a"}, {"path": "db:b"}, {"path": "x:db:c"}]});
        assert_eq!(beginning(&answer, "db:"), ["db:app:a", "db:b"]);
        assert_eq!(beginning(&answer, "db/a"), ["db/app/a"]);
        assert_eq!(beginning(&answer, "").len(), 3);
        assert!(beginning(&json!({}), "").is_empty());
        for path in ["db:$(id)", "db:a b", "db:\n", "db:`id`", "db:ä"] {
            let answer = json!({"secrets": [{"path": path}]});
            assert!(beginning(&answer, "db:").is_empty(), "{path}");
        }
    }

    #[test]
    fn each_shell_asks_for_paths() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            generate(
                shell,
                &mut crate::args::Cli::command(),
                "mayfly",
                &mut script,
            );
            let script = with_paths(shell, &String::from_utf8_lossy(&script));
            assert!(script.contains("mayfly __paths"), "{shell}");
            if shell == Shell::Zsh {
                assert!(script.contains(":_mayfly_paths'"), "{script}");
            }
        }
    }
}
