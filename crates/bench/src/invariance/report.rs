//! Both phases side by side.

use serde::Serialize;

use super::{PhaseReport, Settings};
use crate::error::{Error, Result};
use crate::report::{Bar, Page, bars, timestamp};
use crate::stats::Summary;

/// The law's cost in percent: positive is slower.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Of loading.
    pub init_time_percent: f64,
    /// Of the mean trial.
    pub avg_time_percent: f64,
    /// Of the fastest trial: the least disturbed pair.
    pub min_time_percent: f64,
    /// Of generated tokens a second: negative is fewer.
    pub throughput_percent: f64,
    /// Median over the trials of one trial's time against the same trial's in the other phase.
    pub paired_median_percent: f64,
    /// The same of each trial. What their spread is above the cost, is the machine's.
    pub paired_percent: Summary,
}

/// Pairs of trials that differ by more points than this measure the machine rather than the law.
const UNSTEADY_POINTS: f64 = 15.0;

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was measured.
    pub settings: Settings,
    /// Without the law.
    pub baseline: PhaseReport,
    /// With it.
    pub batch_invariant: PhaseReport,
    /// One against the other.
    pub comparison: Comparison,
    /// The needle was bit-equal in every trial with the law.
    pub invariance_holds: bool,
    /// When it ended, UTC.
    pub timestamp: String,
    /// Of this tool.
    pub bitfast_version: &'static str,
}

impl Report {
    /// Joins both phases; they must have run on the same device.
    pub fn new(settings: Settings, baseline: PhaseReport, batch_invariant: PhaseReport) -> Result<Self> {
        // Behind the device's name stands what computes on it, which the law may decide: cuBLASLt's version is only in one.
        let name = |phase: &PhaseReport| phase.device.split(", ").next().map(str::to_owned);
        if name(&baseline) != name(&batch_invariant) {
            return Err(Error::Cannot(format!(
                "the phases ran on different devices and cannot be compared: {} without the law, {} with it; give --device",
                baseline.device, batch_invariant.device
            )));
        }
        let percent = |with: f64, without: f64| (with / without - 1.0) * 100.0;
        let pairs = batch_invariant.trial_times.iter().zip(&baseline.trial_times);
        let paired = Summary::of(pairs.map(|(with, without)| percent(*with, *without)).collect());
        let paired = paired.ok_or_else(|| Error::Cannot("a phase has no trials".to_string()))?;
        let comparison = Comparison {
            init_time_percent: percent(batch_invariant.init_time, baseline.init_time),
            avg_time_percent: percent(batch_invariant.avg_time, baseline.avg_time),
            min_time_percent: percent(batch_invariant.min_time, baseline.min_time),
            throughput_percent: percent(batch_invariant.throughput, baseline.throughput),
            paired_median_percent: paired.median,
            paired_percent: paired,
        };
        let invariance_holds = batch_invariant.needle.bit_equal;
        let (timestamp, bitfast_version) = (timestamp(), env!("CARGO_PKG_VERSION"));
        Ok(Self {
            settings,
            baseline,
            batch_invariant,
            comparison,
            invariance_holds,
            timestamp,
            bitfast_version,
        })
    }

    fn summary(&self) -> String {
        let c = &self.comparison;
        let cost = match c.avg_time_percent {
            p if p >= 0.0 => format!("costs {p:.1}% of time"),
            p => format!("saves {:.1}% of time", -p),
        };
        let holds = if self.invariance_holds { "and holds" } else { "and DOES NOT HOLD" };
        format!(
            "Batch invariance {cost} ({:.1} against {:.1} tokens/s; {:+.1}% in the median of pairs) {holds}: the needle is {} over {} trials",
            self.batch_invariant.throughput,
            self.baseline.throughput,
            c.paired_median_percent,
            if self.invariance_holds { "bit-equal" } else { "not bit-equal" },
            self.settings.num_trials
        )
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let (a, b, c) = (&self.baseline, &self.batch_invariant, &self.comparison);
        let row = |name: &str, x: f64, y: f64, percent: f64| {
            vec![name.to_string(), format!("{x:.3}"), format!("{y:.3}"), format!("{percent:+.1}%")]
        };
        let percent = |x: f64, y: f64| (y / x - 1.0) * 100.0;
        vec![
            row("Init time (s)", a.init_time, b.init_time, c.init_time_percent),
            row("Average time (s)", a.avg_time, b.avg_time, c.avg_time_percent),
            row("Min time (s)", a.min_time, b.min_time, c.min_time_percent),
            row("Max time (s)", a.max_time, b.max_time, percent(a.max_time, b.max_time)),
            row("Throughput (tokens/s)", a.throughput, b.throughput, c.throughput_percent),
            row(
                "Prompts/s",
                a.prompts_per_sec,
                b.prompts_per_sec,
                percent(a.prompts_per_sec, b.prompts_per_sec),
            ),
        ]
    }

    /// How far the pairs of trials agree, and whether to believe the cost.
    fn pairs(&self) -> Vec<String> {
        let Summary { median, min, max, .. } = self.comparison.paired_percent;
        let mut lines =
            vec![format!("Trial against trial: {median:+.1}% in the median, from {min:+.1}% to {max:+.1}%")];
        if max - min > UNSTEADY_POINTS {
            lines.push(format!(
                "warning: the same trials differ by {:.1} points from pair to pair: the machine had other work or changed its speed, and \
                 the cost above is not the law's",
                max - min
            ));
        }
        lines
    }

    fn needles(&self) -> Vec<String> {
        let said = |name: &str, phase: &PhaseReport| match &phase.needle.first_difference {
            None => {
                format!("Needle, {name}: bit-equal in all trials (positions {:?})", phase.needle.positions)
            }
            Some(difference) => format!("Needle, {name}: DIFFERS: {difference}"),
        };
        vec![said("without the law", &self.baseline), said("with the law", &self.batch_invariant)]
    }

    /// As text: what follows the phases.
    pub fn table(&self) -> String {
        let mut lines =
            vec![format!("{:<24} {:>12} {:>16} {:>10}", "", "Baseline", "Batch invariant", "Change")];
        for row in self.rows() {
            lines.push(format!("{:<24} {:>12} {:>16} {:>10}", row[0], row[1], row[2], row[3]));
        }
        lines.extend(self.pairs());
        lines.extend(self.needles());
        lines.push(self.summary());
        lines.join("\n")
    }

    /// As a page.
    pub fn html(&self) -> String {
        let subtitle =
            format!("bitfast {} bench batch-invariance, {} UTC", self.bitfast_version, self.timestamp);
        let mut page = Page::new("What does batch invariance cost?", &subtitle);
        page.verdict(self.invariance_holds, &self.summary());
        page.list(&[self.settings.lines(), self.pairs(), self.needles()].concat());
        let bar = |name: &str, p: &PhaseReport, series| Bar {
            name: name.to_string(),
            value: p.avg_time,
            low: p.min_time,
            high: p.max_time,
            series,
        };
        page.heading("Time of a trial");
        let both = [bar("without the law", &self.baseline, 1), bar("with the law", &self.batch_invariant, 0)];
        page.figure(
            &bars("s", &both),
            "Mean over the trials; the line goes from the fastest to the slowest.",
        );
        let rate = |name: &str, p: &PhaseReport, series| {
            let value = p.throughput;
            Bar { name: name.to_string(), value, low: value, high: value, series }
        };
        page.heading("Generated tokens a second");
        let both =
            [rate("without the law", &self.baseline, 1), rate("with the law", &self.batch_invariant, 0)];
        page.figure(&bars("tokens/s", &both), "All trials together.");
        page.heading("Results");
        page.table(&["", "Baseline", "Batch invariant", "Change"], &self.rows());
        page.heading("Trials");
        let trials: Vec<Vec<String>> = (0..self.settings.num_trials)
            .map(|i| {
                let (a, b) = (self.baseline.trial_times[i], self.batch_invariant.trial_times[i]);
                let size = self.baseline.trial_batch_sizes[i];
                let change = format!("{:+.1}%", (b / a - 1.0) * 100.0);
                vec![(i + 1).to_string(), size.to_string(), format!("{a:.3}"), format!("{b:.3}"), change]
            })
            .collect();
        page.table(&["Trial", "Batch", "Baseline (s)", "Batch invariant (s)", "Change"], &trials);
        page.text(&format!(
            "Device: {}. Fingerprints: {} and {}.",
            self.batch_invariant.device, self.baseline.fingerprint, self.batch_invariant.fingerprint
        ));
        page.html()
    }
}
