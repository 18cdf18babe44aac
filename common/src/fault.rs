//! Named steps at which a fault suite can have a process killed, stopped or delayed. Without the
//! feature `fault-points`, as in every released build, a step does not exist.

/// A named step. The file that MAYFLY_FAULT_FILE names arms one fault with one line: `what.step kill`, `what.step
/// stop`, `what.step panic` or `what.step delay MILLISECONDS`. If the line names this step, the fault happens here,
/// once.
#[cfg(feature = "fault-points")]
pub async fn point(what: &str, step: &str) {
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    let Some(file) = std::env::var_os("MAYFLY_FAULT_FILE") else {
        return;
    };
    let Ok(armed) = std::fs::read_to_string(&file) else {
        return;
    };
    let mut words = armed.split_whitespace();
    // If two tasks are at the same step, the task that removes the file gets the fault.
    if words.next() != Some(&format!("{what}.{step}")) || std::fs::remove_file(&file).is_err() {
        return;
    }
    tracing::warn!(what, step, "a fault that was armed");
    match (words.next(), words.next().and_then(|ms| ms.parse().ok())) {
        (Some("kill"), _) => drop(kill_process(getpid(), Signal::KILL)),
        #[allow(clippy::panic, reason = "what was asked for")]
        (Some("panic"), _) => panic!("a panic that was armed"),
        (Some("stop"), _) => {
            let _ = kill_process(getpid(), Signal::STOP);
            // Another thread may take the signal, and must be scheduled first. Meanwhile this thread must not go past
            // the step. The time runs while the process is stopped.
            std::thread::sleep(Duration::from_secs(2));
        }
        (Some("delay"), Some(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
        _ => {}
    }
}

/// A named step, at which nothing happens.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub async fn point(_what: &str, _step: &str) {}

/// A statement by which the server waits at a named step between two transactions of one message, if
/// `what.step sleep MILLISECONDS` is armed. Ends with `; ` unless it is empty.
#[cfg(feature = "fault-points")]
pub fn pause_of_server(what: &str, step: &str) -> String {
    let armed = std::env::var_os("MAYFLY_FAULT_FILE").and_then(|file| {
        let armed = std::fs::read_to_string(&file).ok()?;
        let pause = armed.strip_prefix(&format!("{what}.{step} sleep "))?;
        let pause: u32 = pause.trim().parse().ok()?;
        std::fs::remove_file(&file).ok()?;
        Some(pause)
    });
    armed.map_or_else(String::new, |ms| {
        format!("DO 'BEGIN PERFORM pg_catalog.pg_sleep({ms} / 1000.0); END'; ")
    })
}

/// An empty text: a released build has no steps.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn pause_of_server(_what: &str, _step: &str) -> String {
    String::new()
}

/// Sets the windows that the variable MAYFLY_TEST_WINDOWS names for this process: `short`, or the standard ones.
#[cfg(feature = "fault-points")]
pub fn set_windows() {
    if std::env::var_os("MAYFLY_TEST_WINDOWS").is_some_and(|windows| windows == "short") {
        mayfly_protocol::timing::set_for_tests(mayfly_protocol::timing::Timing::SHORT);
    }
}

/// Leaves the windows as they are.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn set_windows() {}
