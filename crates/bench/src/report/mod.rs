//! Self-contained HTML pages: text, tables and SVG plots; light and dark, wide and narrow.

mod svg;

use std::fmt::Write;
use std::path::Path;

use crate::error::{Error, Result};

pub use svg::{Bar, Point, Series, bars, histogram, lines};

/// In a table: the server does not say it.
pub const NOT_TOLD: &str = "not told";

/// A page that is being written.
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// A page with this title, and under it when and by what it was made.
    pub fn new(title: &str, subtitle: &str) -> Self {
        let body = format!("<h1>{}</h1>\n<p class=\"sub\">{}</p>\n", escape(title), escape(subtitle));
        Self { title: title.to_string(), body }
    }

    /// A heading.
    pub fn heading(&mut self, text: &str) -> &mut Self {
        self.push(format_args!("<h2>{}</h2>\n", escape(text)))
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.push(format_args!("<p>{}</p>\n", escape(text)))
    }

    /// A paragraph that stands out: good news or bad.
    pub fn verdict(&mut self, good: bool, text: &str) -> &mut Self {
        let class = if good { "good" } else { "bad" };
        self.push(format_args!("<p class=\"verdict {class}\">{}</p>\n", escape(text)))
    }

    /// Short lines.
    pub fn list(&mut self, items: &[String]) -> &mut Self {
        let lines: String = items.iter().map(|i| format!("<li>{}</li>\n", escape(i))).collect();
        self.push(format_args!("<ul>\n{lines}</ul>\n"))
    }

    /// A table; columns of numbers are aligned to the right.
    pub fn table(&mut self, head: &[&str], rows: &[Vec<String>]) -> &mut Self {
        let numeric = |text: &str| text.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '+');
        let of_numbers = |column: usize| {
            let mut told = rows.iter().filter_map(|r| r.get(column)).filter(|c| *c != NOT_TOLD).peekable();
            told.peek().is_some() && told.all(|c| numeric(c))
        };
        let classes: Vec<&str> =
            (0..head.len()).map(|column| if of_numbers(column) { " class=\"n\"" } else { "" }).collect();
        let row = |cells: Vec<&str>, tag: &str| {
            let cells = cells.iter().zip(&classes);
            let cells: String =
                cells.map(|(c, class)| format!("<{tag}{class}>{}</{tag}>", escape(c))).collect();
            format!("<tr>{cells}</tr>\n")
        };
        let head = row(head.to_vec(), "th");
        let rows: String = rows.iter().map(|r| row(r.iter().map(String::as_str).collect(), "td")).collect();
        self.push(format_args!(
            "<div class=\"scroll\"><table>\n<thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>\n"
        ))
    }

    /// A plot (of this module's) with its caption.
    pub fn figure(&mut self, svg: &str, caption: &str) -> &mut Self {
        self.push(format_args!("<figure>{svg}<figcaption>{}</figcaption></figure>\n", escape(caption)))
    }

    fn push(&mut self, text: std::fmt::Arguments<'_>) -> &mut Self {
        self.body.write_fmt(text).expect("a string takes everything");
        self
    }

    /// The whole page.
    pub fn html(&self) -> String {
        let (title, body) = (escape(&self.title), &self.body);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
        )
    }
}

/// Writes a report's file.
pub fn write_file(path: &Path, text: &str) -> Result {
    std::fs::write(path, text).map_err(|e| Error::file(path, e))
}

/// Refuses an output file before the time is spent. One that was not there is not there afterwards: a run that is broken
/// off leaves no empty file, which could be taken for its results.
pub fn check_writable(path: &Path) -> Result {
    let is_new = path.symlink_metadata().is_err();
    let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
    opened.map(drop).map_err(|e| Error::file(path, e))?;
    if is_new { std::fs::remove_file(path).map_err(|e| Error::file(path, e)) } else { Ok(()) }
}

/// Now, in UTC, as vLLM's tools write it.
pub fn timestamp() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M:%S").to_string()
}

pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

const STYLE: &str = r#":root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2330; --soft: #5d6675; --line: #d9dee6;
  --card: #f5f7fa; --good: #12744a; --bad: #b3261e;
  --c0: #2563c9; --c1: #d1660a; --c2: #188a58; --c3: #9a3fb5; --c4: #b3261e; --c5: #5d6675; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --ink: #e6eaf0; --soft: #9aa5b5; --line: #2e3643;
  --card: #1a202a; --good: #52c48d; --bad: #ff8a80;
  --c0: #6ea8ff; --c1: #ffa657; --c2: #56d39b; --c3: #d68cf0; --c4: #ff8a80; --c5: #9aa5b5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, ul { margin: .5rem 0; overflow-wrap: anywhere; }
.sub { color: var(--soft); }
.verdict { padding: .6rem .9rem; border-left: .3rem solid; border-radius: .2rem; background: var(--card); font-weight: 600; }
.good { border-color: var(--good); color: var(--good); } .bad { border-color: var(--bad); color: var(--bad); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--card); color: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; } th.n, td.n { text-align: right; }
td:last-child:not(.n) { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; padding: .75rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--card); }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .25rem; }
svg { display: block; width: 100%; height: auto; max-width: 60rem; }
svg.bars { max-width: 38rem; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .strong { fill: var(--ink); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .mark { fill: none; stroke-width: 2; }
svg .spread { stroke-width: 1.5; opacity: .6; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); }
.s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
svg .mark, svg .spread { stroke: var(--c); } svg .dot, svg .bar { fill: var(--c); }
@media (max-width: 40rem) { main { padding: 1rem .6rem 2rem; } h1 { font-size: 1.3rem; }
  figure { padding: .4rem; } th, td { padding: .35rem .5rem; }
  svg text { font-size: 20px; } svg.bars text { font-size: 14px; }
  td:last-child:not(.n) { min-width: 9.5rem; } }
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_at_an_output_file_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        check_writable(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "old").unwrap();
        check_writable(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        assert!(
            check_writable(dir.path()).is_err() && check_writable(&dir.path().join("no/r.json")).is_err()
        );
        assert!(dir.path().exists());
    }

    #[test]
    fn a_page_needs_nothing_else_and_names_cannot_break_it() {
        let mut page = Page::new("A <b>", "x & y");
        let point = |x: f64| Point { x, y: x * 2.0, low: x, high: x * 3.0 };
        let series = [Series { name: "<s>".into(), points: vec![point(1.0), point(64.0)] }];
        page.heading("h").text("t").verdict(true, "v").list(&["<l>".into()]);
        page.table(&["a", "b"], &[vec!["<x>".into(), "1.0".into()]]);
        page.figure(&lines("batch", "ms", &series), "caption <1>");
        page.figure(
            &bars("ms", &[Bar { name: "<b>".into(), value: 1.0, low: 0.5, high: 2.0, series: 0 }]),
            "c",
        );
        page.figure(&histogram("ms", &[1.0, 1.1, 5.0]), "c");
        let html = page.html();
        for bad in ["<b>", "<s>", "<l>", "<x>", "http://", "https://", "<script", "NaN", "inf"] {
            assert!(!html.contains(bad), "{bad}");
        }
        assert_eq!(html.matches("<svg").count(), 3);
        assert_eq!(html.matches("</svg>").count(), 3);
        assert!(html.contains("prefers-color-scheme: dark") && html.contains("width=device-width"));
    }
}
