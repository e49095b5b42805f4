//! Ctrl-C: ends the program, or while something can be broken off only that.

use std::sync::Mutex;

use crate::exit::INTERRUPTED;

type Action = Box<dyn FnOnce() + Send>;

/// What the next Ctrl-C does instead of ending the program.
static ACTION: Mutex<Option<Action>> = Mutex::new(None);

/// Takes over Ctrl-C; called once, first.
pub fn install() {
    let handler = || match take() {
        Some(action) => action(),
        None => std::process::exit(i32::from(INTERRUPTED)),
    };
    // Without the handler Ctrl-C ends the process all the same, only less politely.
    let _ = ctrlc::set_handler(handler);
}

/// Runs `body`; the first Ctrl-C meanwhile calls `action`, a second one ends the program.
pub fn catch<T>(action: impl FnOnce() + Send + 'static, body: impl FnOnce() -> T) -> T {
    *ACTION.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::new(action));
    let result = body();
    take();
    result
}

fn take() -> Option<Action> {
    ACTION.lock().unwrap_or_else(|e| e.into_inner()).take()
}
