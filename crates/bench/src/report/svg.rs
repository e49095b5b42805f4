//! Plots. Colours come from the page's style: series n has the class `s{n}`.

use std::fmt::Write;

use super::escape;

/// A point with its spread.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Abscissa; above 0.
    pub x: f64,
    /// The value.
    pub y: f64,
    /// Lower end of its spread.
    pub low: f64,
    /// Upper end of its spread.
    pub high: f64,
}

/// Points that belong together.
#[derive(Clone, Debug)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// By ascending x.
    pub points: Vec<Point>,
}

/// A bar with its spread.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Before it.
    pub name: String,
    /// Its length.
    pub value: f64,
    /// Lower end of its spread.
    pub low: f64,
    /// Upper end of its spread.
    pub high: f64,
    /// Its colour.
    pub series: usize,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
// Wide enough for the larger letters that the page's style gives to narrow screens.
const LEFT: f64 = 72.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 54.0;
/// Distinct colours.
const COLOURS: usize = 6;
const LEGEND_LINE: f64 = 24.0;

/// Values by a quantity that grows by factors: x is logarithmic, each x that occurs has its tick.
pub fn lines(x_label: &str, y_label: &str, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let mut xs: Vec<f64> = points().map(|p| p.x).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let (Some(&first), Some(&last)) = (xs.first(), xs.last()) else { return empty() };
    let span = (last / first).ln();
    let x_at = |x: f64| {
        let part = if span > 0.0 { (x / first).ln() / span } else { 0.5 };
        LEFT + 16.0 + part * (WIDTH - LEFT - RIGHT - 32.0)
    };
    let scale = Scale::new(points().fold(0.0, |m: f64, p| m.max(p.high)));
    let height = HEIGHT + LEGEND_LINE * series.len() as f64;
    let mut svg = open(height, &format!("{y_label} by {x_label}"));
    scale.grid(&mut svg, y_label);
    let mut labelled = f64::NEG_INFINITY;
    for &x in &xs {
        let at = x_at(x);
        // Labels that would touch are left out.
        if at - labelled > 44.0 {
            text(&mut svg, at, HEIGHT - BOTTOM + 20.0, "middle", &number(x));
            labelled = at;
        }
    }
    text(&mut svg, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0, "middle", x_label);
    for (index, one) in series.iter().enumerate() {
        let class = index % COLOURS;
        let path: Vec<String> =
            one.points.iter().map(|p| format!("{:.1},{:.1}", x_at(p.x), scale.at(p.y))).collect();
        put(
            &mut svg,
            format_args!("<g class=\"s{class}\"><polyline class=\"mark\" points=\"{}\"/>", path.join(" ")),
        );
        for p in &one.points {
            let (x, low, high) = (x_at(p.x), scale.at(p.low), scale.at(p.high));
            put(
                &mut svg,
                format_args!(
                    "<line class=\"spread\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\"/>"
                ),
            );
            let tip = format!("{}: {} {} at {}", one.name, number(p.y), y_label, number(p.x));
            put(
                &mut svg,
                format_args!(
                    "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"3.5\"><title>{}</title></circle>",
                    scale.at(p.y),
                    escape(&tip)
                ),
            );
        }
        let y = HEIGHT + LEGEND_LINE * index as f64 + 10.0;
        put(
            &mut svg,
            format_args!("<rect class=\"bar\" x=\"{LEFT}\" y=\"{:.1}\" width=\"14\" height=\"4\"/>", y - 6.0),
        );
        text(&mut svg, LEFT + 22.0, y, "start", &one.name);
        svg.push_str("</g>");
    }
    svg + "</svg>"
}

/// Values side by side, lying.
pub fn bars(unit: &str, all: &[Bar]) -> String {
    const LINE: f64 = 34.0;
    // Narrow, so that it can be read on a phone without scrolling.
    const WIDTH: f64 = 460.0;
    const NAMES: f64 = 120.0;
    const NUMBERS: f64 = 122.0;
    let most = all.iter().fold(0.0, |m: f64, b| m.max(b.high).max(b.value));
    let most = if most > 0.0 { most } else { 1.0 };
    let height = LINE * all.len() as f64 + 8.0;
    let mut svg = format!(
        "<svg class=\"bars\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">",
        escape(unit)
    );
    for (index, bar) in all.iter().enumerate() {
        let y = LINE * index as f64 + 4.0;
        let length = |v: f64| v.max(0.0) / most * (WIDTH - NAMES - NUMBERS);
        put(&mut svg, format_args!("<g class=\"s{}\">", bar.series % COLOURS));
        text(&mut svg, NAMES - 10.0, y + 19.0, "end", &bar.name);
        put(
            &mut svg,
            format_args!(
                "<rect class=\"bar\" x=\"{NAMES}\" y=\"{:.1}\" width=\"{:.1}\" height=\"20\" rx=\"2\"/>",
                y + 4.0,
                length(bar.value).max(1.0)
            ),
        );
        if bar.high > bar.low {
            let (from, to, mid) = (NAMES + length(bar.low), NAMES + length(bar.high), y + 14.0);
            put(
                &mut svg,
                format_args!(
                    "<g class=\"s5\"><line class=\"spread\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{mid:.1}\" y2=\"{mid:.1}\"/></g>"
                ),
            );
        }
        let end = NAMES + length(bar.value.max(bar.high)) + 8.0;
        put(
            &mut svg,
            format_args!(
                "<text class=\"strong\" x=\"{end:.1}\" y=\"{:.1}\">{} {}</text></g>",
                y + 19.0,
                number(bar.value),
                escape(unit)
            ),
        );
    }
    svg + "</svg>"
}

/// How often values fall into each of a number of equal ranges.
pub fn histogram(unit: &str, values: &[f64]) -> String {
    const BINS: usize = 40;
    let values: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.is_empty() {
        return empty();
    }
    let width = if high > low { (high - low) / BINS as f64 } else { low.abs().max(1e-9) / BINS as f64 };
    let mut counts = [0usize; BINS];
    for v in &values {
        counts[(((v - low) / width) as usize).min(BINS - 1)] += 1;
    }
    let scale = Scale::whole(counts.iter().copied().max().unwrap_or(1));
    let mut svg = open(HEIGHT, &format!("distribution in {unit}"));
    scale.grid(&mut svg, "count");
    let step = (WIDTH - LEFT - RIGHT) / BINS as f64;
    svg.push_str("<g class=\"s0\">");
    for (bin, &count) in counts.iter().enumerate().filter(|(_, c)| **c > 0) {
        let (x, y) = (LEFT + bin as f64 * step, scale.at(count as f64));
        let from = low + bin as f64 * width;
        put(
            &mut svg,
            format_args!(
                "<rect class=\"bar\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{count} from {} to {} {}</title></rect>",
                x + 0.5,
                step - 1.0,
                HEIGHT - BOTTOM - y,
                number(from),
                number(from + width),
                escape(unit)
            ),
        );
    }
    svg.push_str("</g>");
    for part in 0..=4 {
        let x = LEFT + f64::from(part) / 4.0 * (WIDTH - LEFT - RIGHT);
        let anchor = ["start", "middle", "middle", "middle", "end"][part as usize];
        text(
            &mut svg,
            x,
            HEIGHT - BOTTOM + 20.0,
            anchor,
            &number(low + f64::from(part) / 4.0 * width * BINS as f64),
        );
    }
    text(&mut svg, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0, "middle", unit);
    svg + "</svg>"
}

/// Ordinates from 0 to a round number.
struct Scale {
    step: f64,
    steps: usize,
}

impl Scale {
    fn new(most: f64) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let rough = most / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|f| f * power).into_iter().find(|s| *s >= rough);
        let step = step.unwrap_or(10.0 * power);
        Self { step, steps: (most / step).ceil().max(1.0) as usize }
    }

    /// For counts: there is no half of one.
    fn whole(most: usize) -> Self {
        let step = Self::new(most as f64).step.ceil();
        Self { step, steps: most.div_ceil(step as usize).max(1) }
    }

    fn at(&self, y: f64) -> f64 {
        let part = y / (self.step * self.steps as f64);
        HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP - 10.0)
    }

    fn grid(&self, svg: &mut String, label: &str) {
        for n in 0..=self.steps {
            let value = self.step * n as f64;
            let y = self.at(value);
            put(
                svg,
                format_args!(
                    "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                    WIDTH - RIGHT
                ),
            );
            text(svg, LEFT - 8.0, y + 4.0, "end", &number(value));
        }
        text(svg, 4.0, 16.0, "start", label);
    }
}

fn open(height: f64, title: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">", escape(title))
}

fn empty() -> String {
    open(40.0, "no values") + "<text x=\"8\" y=\"24\">no values</text></svg>"
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    put(
        svg,
        format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(content)),
    );
}

fn put(svg: &mut String, text: std::fmt::Arguments<'_>) {
    svg.write_fmt(text).expect("a string takes everything");
}

/// Three significant digits.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v == 0.0 || v >= 100.0 || v.fract() == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        v if v >= 0.01 => 3,
        _ => 5,
    };
    format!("{value:.digits$}")
}
