//! What a check found, as values, text, and a page.

use std::time::Duration;

use serde::Serialize;

use super::outcome::{Counts, Outcome};
use super::probe::Probe;
use crate::report::{Page, timestamp};

/// What a property is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum About {
    /// The server while nothing else runs.
    Itself,
    /// The server under load.
    Load,
    /// Another server, or this one at another time.
    Others,
}

/// A property and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Property {
    /// Short name.
    pub name: &'static str,
    /// What it says.
    pub what: &'static str,
    /// What it is about.
    pub about: About,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
}

/// What a check says of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing failed, and something was tested under load.
    Invariant,
    /// A bit depends on what else the server does.
    NotInvariant,
    /// Nothing of it failed, but the server differs from what it was compared with.
    Differs,
    /// Nothing failed, but nothing was tested under load either.
    NotTested,
}

/// All of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The server.
    pub endpoint: String,
    /// Its `system_fingerprint`, where told.
    pub fingerprint: Option<String>,
    /// What the check says.
    pub verdict: Verdict,
    /// Whether that is good news.
    pub passed: bool,
    /// One by one.
    pub properties: Vec<Property>,
    /// How much was compared in all.
    pub compared: Counts,
    /// Of the server's answers.
    pub sha256: String,
    /// What else to know.
    pub notes: Vec<String>,
    /// When it ended, UTC.
    pub timestamp: String,
    /// How long it took.
    pub seconds: f64,
    /// Of this tool.
    pub bitfast_version: &'static str,
}

impl Report {
    pub(super) fn new(
        probe: &Probe,
        properties: Vec<Property>,
        sha256: String,
        notes: Vec<String>,
        took: Duration,
    ) -> Self {
        let mut compared = Counts::default();
        properties.iter().for_each(|p| compared += p.outcome.ran().compared);
        let verdict = verdict(&properties);
        Self {
            endpoint: probe.client.endpoint().to_string(),
            fingerprint: probe.fingerprint.clone(),
            verdict,
            passed: verdict == Verdict::Invariant,
            properties,
            compared,
            sha256,
            notes,
            timestamp: timestamp(),
            seconds: took.as_secs_f64(),
            bitfast_version: env!("CARGO_PKG_VERSION"),
        }
    }

    fn summary(&self) -> String {
        let count = |f: fn(&Outcome) -> bool| self.properties.iter().filter(|p| f(&p.outcome)).count();
        let passed = count(|o| matches!(o, Outcome::Pass { .. }));
        let failed = count(|o| matches!(o, Outcome::Fail { .. }));
        let verdict = match self.verdict {
            Verdict::Invariant => "batch-invariant, as far as was checked",
            Verdict::NotInvariant => "NOT batch-invariant",
            Verdict::Differs => "answers DIFFER from those it was compared with",
            Verdict::NotTested => "NOT TESTED under load, so nothing is said about batches",
        };
        format!(
            "{}: {verdict}: {passed} passed, {failed} failed, {} not tested, in {:.1} s",
            self.endpoint,
            self.properties.len() - passed - failed,
            self.seconds
        )
    }

    /// As text.
    pub fn table(&self) -> String {
        let mut lines = Vec::new();
        for p in &self.properties {
            let (word, words) = p.outcome.words();
            lines.push(format!("{word:<10} {:<9} {:>5.1} s  {}", p.name, p.seconds, p.what));
            lines.push(format!("{:<10} {words}", ""));
            if let Outcome::Fail { difference, .. } = &p.outcome {
                lines.push(format!("{:<10} first difference: {difference}", ""));
            }
        }
        lines.extend(self.notes.iter().map(|n| format!("note: {n}")));
        lines.push(format!("compared bit for bit: {}", self.compared));
        lines.push(format!("answers have SHA-256 {}", self.sha256));
        lines.push(self.summary());
        lines.join("\n")
    }

    /// As a page.
    pub fn html(&self) -> String {
        let subtitle = format!("bitfast {} check, {} UTC", self.bitfast_version, self.timestamp);
        let mut page = Page::new("Is this server batch-invariant?", &subtitle);
        page.verdict(self.passed, &self.summary());
        let mut facts = vec![
            format!("Compared bit for bit: {}", self.compared),
            format!("SHA-256 of its answers: {}", self.sha256),
        ];
        facts.extend(self.fingerprint.iter().map(|f| format!("system_fingerprint: {f}")));
        facts.extend(self.notes.iter().cloned());
        page.list(&facts);
        let rows: Vec<Vec<String>> = self.properties.iter().map(row).collect();
        page.table(&["Property", "Verdict", "Seconds", "What was compared"], &rows);
        page.text("Answers are compared bit for bit: tokens, log probabilities, texts, reasons for the end.");
        page.html()
    }
}

fn row(p: &Property) -> Vec<String> {
    let (word, words) = p.outcome.words();
    let told = match &p.outcome {
        Outcome::Fail { difference, .. } => format!("{words}; first difference: {difference}"),
        _ => words,
    };
    vec![p.name.to_string(), word.to_string(), format!("{:.1}", p.seconds), format!("{}: {told}", p.what)]
}

fn verdict(properties: &[Property]) -> Verdict {
    let failed = |about: &[About]| {
        properties.iter().any(|p| about.contains(&p.about) && matches!(p.outcome, Outcome::Fail { .. }))
    };
    let loaded = |p: &Property| p.about == About::Load && matches!(p.outcome, Outcome::Pass(_));
    match () {
        () if failed(&[About::Itself, About::Load]) => Verdict::NotInvariant,
        () if failed(&[About::Others]) => Verdict::Differs,
        () if properties.iter().any(loaded) => Verdict::Invariant,
        () => Verdict::NotTested,
    }
}
