//! `--watch` repeats a request every 2 s, until Ctrl-C, and draws each answer over the previous one.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use jiff::Zoned;
use rustix::termios::tcgetwinsize;
use serde_json::Value;
use tokio::time::{Instant, sleep_until};

use crate::Context;
use crate::child::{self, Signals};
use crate::failure::Failure;
use crate::table::View;
use crate::ui;

const PAUSE: Duration = Duration::from_secs(2);
/// Switches a terminal to its alternate screen and hides the cursor, and back (xterm control sequences, DECSET 1049
/// and 25).
const BEGIN: &str = "\x1b[?1049h\x1b[?25l";
const END: &str = "\x1b[?25h\x1b[?1049l";
/// Width of a progress bar, in characters.
const BAR: usize = 30;

/// Draws the answers of `ask`. At the end the last one stays on the terminal.
///
/// # Errors
/// The answer does not go to a terminal, or the first request fails.
pub(super) async fn watch(
    context: &Context,
    view: &View,
    ask: impl AsyncFn() -> Result<Value, Failure>,
) -> Result<u8, Failure> {
    if !context.output()?.is_for_person() {
        let message =
            "--watch draws a table on a terminal: leave out --filter, --out and --encoding json";
        return Err(Failure::Usage(message.into()));
    }
    let mut answer = ask().await?;
    let mut signals = Signals::listen()
        .map_err(|error| Failure::Local(format!("cannot listen for signals: {error}")))?;
    let mut progress = Progress::default();
    let (screen, mut trouble) = (Screen::begin(), None);
    let ended = loop {
        let next = Instant::now() + PAUSE;
        let mut text = view.text(&answer, ui::colours());
        let _ = write!(text, "\n\n{}", progress.next(&answer, Instant::now()));
        screen.draw(&text, trouble.as_ref());
        let asked = async {
            sleep_until(next).await;
            ask().await
        };
        tokio::select! {
            asked = asked => match asked {
                Ok(newer) => (answer, trouble) = (newer, None),
                // The dispatcher may become available again.
                Err(failure) => trouble = Some(failure),
            },
            signal = signals.next() => break signal,
        }
    };
    drop(screen);
    context.output()?.show(&answer, view)?;
    Ok(child::killed_by(ended.as_raw()))
}

/// The alternate screen of a terminal, until this is dropped.
struct Screen;

impl Screen {
    fn begin() -> Self {
        put(BEGIN);
        Self
    }

    /// Draws as many lines as fit on the terminal.
    fn draw(&self, text: &str, trouble: Option<&Failure>) {
        // A terminal without a window has the size 0.
        let size = tcgetwinsize(io::stdout()).ok();
        let size = size.filter(|size| size.ws_row > 0 && size.ws_col > 0);
        let (rows, columns) = size.map_or((24, 80), |size| (size.ws_row, size.ws_col));
        let now = Zoned::now().strftime("%H:%M:%S");
        let mut head = format!("{now}  every {} s, Ctrl-C ends", PAUSE.as_secs());
        if let Some(failure) = trouble {
            let failure = ui::printable(&failure.to_string());
            head = format!("{head}  NO ANSWER: {failure}");
        }
        put(&frame(&head, text, rows.max(2), columns.max(20)));
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        put(END);
    }
}

fn put(text: &str) {
    let mut stdout = io::stdout().lock();
    // If the terminal is closed, SIGHUP ends this process.
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}

/// The text that replaces the content of the terminal. It clears the rest of each line, and the rest of the screen
/// after the last line, so that nothing flickers.
fn frame(head: &str, text: &str, rows: u16, columns: u16) -> String {
    let lines = text.trim_end().lines();
    let room = usize::from(rows) - 2;
    let mut frame = format!("\x1b[H{}\x1b[K\r\n\x1b[K", cut(head, columns));
    for line in lines.take(room) {
        let _ = write!(frame, "\r\n{}\x1b[0m\x1b[K", cut(line, columns));
    }
    frame.push_str("\x1b[J");
    frame
}

/// The part of the line that fits into the columns. Control sequences take no column.
fn cut(line: &str, columns: u16) -> String {
    let (mut kept, mut used, mut is_control) = (String::new(), 0, false);
    for c in line.chars() {
        match c {
            '\x1b' => is_control = true,
            _ if is_control => is_control = !c.is_ascii_alphabetic(),
            _ => used += 1,
        }
        if used > columns {
            break;
        }
        kept.push(c);
    }
    kept
}

/// The progress of each pool's revocations. A bar begins at the largest number of open revocations that was seen.
#[derive(Default)]
struct Progress {
    /// For each pool, the largest number of accounts to end and when it was seen.
    most: Vec<(String, u64, Instant)>,
}

impl Progress {
    /// One line for each pool that is ending accounts.
    fn next(&mut self, status: &Value, now: Instant) -> String {
        let pools = status.get("pools").and_then(Value::as_array);
        let mut text = String::new();
        for pool in pools.into_iter().flatten() {
            let name = pool["name"].as_str().unwrap_or_default().to_owned();
            let left = pool.pointer("/leases/revoking").and_then(Value::as_u64);
            let left = left.unwrap_or(0);
            let known = self.most.iter().position(|(known, ..)| *known == name);
            match known {
                Some(at) if left == 0 => drop(self.most.remove(at)),
                Some(at) if left > self.most[at].1 => self.most[at] = (name.clone(), left, now),
                None if left > 0 => self.most.push((name.clone(), left, now)),
                Some(_) | None => {}
            }
            let Some((_, most, since)) = self.most.iter().find(|(known, ..)| *known == name) else {
                continue;
            };
            let bar = bar(*most - left, *most, now.duration_since(*since));
            let _ = writeln!(text, "{}  revoking {bar}", ui::printable(&name));
        }
        text
    }
}

fn bar(done: u64, most: u64, elapsed: Duration) -> String {
    let full = usize::try_from(u128::from(done) * BAR as u128 / u128::from(most.max(1)));
    let full = full.unwrap_or(BAR).min(BAR);
    let drawn = format!("{}{}", "#".repeat(full), "-".repeat(BAR - full));
    let mut text = format!("[{drawn}] {done} of {most} ended");
    let seconds = elapsed.as_secs();
    if let Some(rate) = done.checked_div(seconds).filter(|rate| *rate > 0) {
        let _ = write!(
            text,
            ", {rate}/s, about {} s left",
            most.saturating_sub(done).div_ceil(rate)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_frame_fits_the_terminal() {
        let drawn = frame("0", "a\nb\nc\nd", 5, 20);
        assert_eq!(drawn.matches("\r\n").count(), 4, "{drawn:?}");
        assert!(drawn.contains('c') && !drawn.contains('d'));
        assert!(drawn.starts_with("\x1b[H") && drawn.ends_with("\x1b[J"));
        assert_eq!(cut("abcdef", 3), "abc");
        assert_eq!(cut("\x1b[1mabcdef\x1b[0m", 3), "\x1b[1mabc");
    }

    #[test]
    fn a_bar_begins_with_the_most_that_was_seen() {
        let status = |left: u64| json!({"pools": [{"name": "p", "leases": {"revoking": left}}]});
        let (mut progress, begun) = (Progress::default(), Instant::now());
        assert_eq!(progress.next(&status(0), begun), "");
        assert!(
            progress
                .next(&status(100), begun)
                .contains("] 0 of 100 ended")
        );
        let later = begun + Duration::from_secs(5);
        let line = progress.next(&status(50), later);
        assert_eq!(
            line,
            format!(
                "p  revoking [{}{}] 50 of 100 ended, 10/s, about 5 s left\n",
                "#".repeat(15),
                "-".repeat(15)
            )
        );
        assert!(
            progress
                .next(&status(200), later)
                .contains("] 0 of 200 ended")
        );
        assert_eq!(progress.next(&status(0), later), "");
        assert_eq!(progress.next(&json!({}), later), "");
        let huge = bar(u64::MAX, u64::MAX, PAUSE);
        assert!(
            huge.starts_with(&format!("[{}]", "#".repeat(BAR))),
            "{huge}"
        );
        assert!(bar(2, 1, PAUSE).contains(&"#".repeat(BAR)));
    }
}
