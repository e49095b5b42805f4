use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Hears how a long run goes: a progress bar, or nothing.
pub trait Observer: Send + Sync {
    /// `len` things called `unit` are to be done.
    fn begin(&self, len: u64, unit: &str);
    /// `count` of them are done.
    fn advance(&self, count: u64);
    /// No more come.
    fn end(&self);
    /// A line for the user.
    fn say(&self, line: &str);
}

/// Hears nothing.
pub struct Silent;

impl Observer for Silent {
    fn begin(&self, _len: u64, _unit: &str) {}
    fn advance(&self, _count: u64) {}
    fn end(&self) {}
    fn say(&self, _line: &str) {}
}

/// Breaks off a run from another thread; clones are the same switch.
#[derive(Clone)]
pub struct Cancel {
    switch: Arc<watch::Sender<bool>>,
}

impl Default for Cancel {
    fn default() -> Self {
        Self { switch: Arc::new(watch::Sender::new(false)) }
    }
}

impl Cancel {
    /// Breaks off, for good.
    pub fn cancel(&self) {
        self.switch.send_replace(true);
    }

    /// Returns once it was broken off.
    pub async fn cancelled(&self) {
        let mut seen = self.switch.subscribe();
        // It cannot fail: the sender lives as long as we do.
        let _ = seen.wait_for(|cancelled| *cancelled).await;
    }
}

/// Runs a tool to its end on a runtime of this thread alone, so that a load takes one core and no more.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime of one thread").block_on(future)
}

/// [`block_on`] for a tool that can be broken off: SIGTERM is taken for that, as Ctrl-C is by the caller. A job that is ended must not
/// leave a server asleep.
pub fn block_on_until<T>(future: impl Future<Output = T>, cancel: &Cancel) -> T {
    let cancel = cancel.clone();
    block_on(async move {
        let listening = tokio::spawn(async move {
            // Where signals cannot be had, the process ends as it always does.
            if let Ok(mut terminate) = signal(SignalKind::terminate()) {
                terminate.recv().await;
                cancel.cancel();
            }
        });
        let result = future.await;
        listening.abort();
        result
    })
}
