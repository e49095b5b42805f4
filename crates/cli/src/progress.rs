//! Progress bars on standard error; hidden where that is no terminal.

use std::time::{Duration, Instant};

use bitfast::{Activity, EngineArgs, LLM, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::exit::{Outcome, say};

/// A bar over `len` things that are called `unit`.
pub fn bar(len: u64, unit: &str, quiet: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), target(quiet));
    let template = format!("{{bar:32}} {{pos}}/{{len}} {unit} [{{elapsed}} < {{eta}}] {{msg}}");
    bar.set_style(ProgressStyle::with_template(&template).expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Shows how fetches and loads go.
pub struct StartBar {
    bar: Option<ProgressBar>,
    quiet: bool,
    began: Instant,
    /// What is going on, since when.
    current: Option<(Activity, Instant)>,
    load: Duration,
    prepare: Duration,
}

impl StartBar {
    /// Draws nothing when `quiet`.
    pub fn new(quiet: bool) -> Self {
        let (began, zero) = (Instant::now(), Duration::ZERO);
        Self { bar: None, quiet, began, current: None, load: zero, prepare: zero }
    }

    /// How long the start took so far, and its parts.
    pub fn times(&self) -> String {
        let s = |d: Duration| d.as_secs_f64();
        let (all, load, prepare) = (s(self.began.elapsed()), s(self.load), s(self.prepare));
        format!("started in {all:.1} s (weights {load:.1} s, device {prepare:.1} s)")
    }

    /// Takes in one report.
    pub fn show(&mut self, progress: Progress) {
        match progress {
            Progress::Start { activity, what, total } => {
                self.current = Some((activity, Instant::now()));
                if activity == Activity::Prepare {
                    return;
                }
                // A fetch is worth a line that stays; a load is over soon and happens every time.
                if activity == Activity::Fetch && !self.quiet {
                    say!("fetching {what}");
                }
                let bar = ProgressBar::with_draw_target(total, target(self.quiet));
                let template = "{msg}{bar:32} {bytes}/{total_bytes} {bytes_per_sec} [{elapsed} < {eta}]";
                bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
                if activity == Activity::Load {
                    bar.set_message("loading ");
                }
                self.bar = Some(bar);
            }
            Progress::Note(note) => {
                if !self.quiet {
                    say!("{note}");
                }
            }
            Progress::Bytes(bytes) => {
                if let Some(bar) = &self.bar {
                    bar.set_position(bytes);
                }
            }
            Progress::Done => {
                match self.current.take() {
                    Some((Activity::Load, since)) => self.load += since.elapsed(),
                    Some((Activity::Prepare, since)) => self.prepare += since.elapsed(),
                    Some((Activity::Fetch, _)) | None => {}
                }
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
            }
        }
    }
}

/// Loads the model, fetching it where needed, and prints the start-up line.
pub fn start(args: EngineArgs, quiet: bool) -> Outcome<LLM> {
    let mut bar = StartBar::new(quiet);
    let llm = LLM::with_progress(args, &mut |p| bar.show(p))?;
    if !quiet {
        let info = llm.info();
        let law = if info.batch_invariant { "" } else { " (batch invariance OFF)" };
        let engines = match llm.fleet().size() {
            1 => String::new(),
            n => format!("{n} engines on "),
        };
        say!(
            "{} | class {}{law} | {} | {engines}{} | KV cache {} tokens in blocks of {} | {}",
            llm.model(),
            info.class.name(),
            info.fingerprint,
            info.device,
            llm.fleet().kv_cache_tokens(),
            info.block_size,
            bar.times(),
        );
    }
    Ok(llm)
}

fn target(quiet: bool) -> ProgressDrawTarget {
    if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() }
}
