//! The Chrome trace format (Google, "Trace Event Format"): complete events, in microseconds.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::recorder::{Recorded, StepSpan};
use crate::config::EngineInfo;

/// Writes a recording as gzipped JSON.
pub(super) fn write(file: File, info: &EngineInfo, recorded: &Recorded) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, GzEncoder::new(file, Compression::fast()));
    write_json(&mut out, info, recorded)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?.finish()?;
    file.sync_all()
}

fn write_json(out: &mut impl Write, info: &EngineInfo, recorded: &Recorded) -> io::Result<()> {
    let rank = info.config.rank;
    writeln!(
        out,
        "{{\"displayTimeUnit\":\"ms\",\"metadata\":{},\"traceEvents\":[",
        metadata(info, recorded)
    )?;
    let name = format!("engine {rank} ({})", info.device);
    write!(
        out,
        "{{\"ph\":\"M\",\"pid\":{rank},\"tid\":0,\"name\":\"process_name\",\"args\":{{\"name\":{}}}}}",
        quoted(&name)
    )?;
    // The engine's thread has its steps also where the device reports no lanes.
    let engine = recorded.lanes.iter().find(|(tid, _)| *tid == 0).and_then(|(_, lane)| lane.name.as_deref());
    let engine = engine.map_or("engine thread".to_owned(), |name| format!("engine thread, {name}"));
    let others = recorded.lanes.iter().filter(|(tid, _)| *tid > 0);
    let others = others.map(|(tid, lane)| (*tid, lane.name.clone().unwrap_or_else(|| format!("lane {tid}"))));
    for (tid, name) in std::iter::once((0, engine)).chain(others) {
        write!(
            out,
            ",\n{{\"ph\":\"M\",\"pid\":{rank},\"tid\":{tid},\"name\":\"thread_name\",\"args\":{{\"name\":{}}}}}",
            quoted(&name)
        )?;
    }
    recorded.steps.iter().try_for_each(|step| write_step(out, rank, step))?;
    let names: Vec<String> = recorded.names.iter().map(|name| quoted(name)).collect();
    for (tid, lane) in &recorded.lanes {
        for span in &lane.spans {
            let (start, duration) =
                (Duration::from_nanos(span.start_ns), Duration::from_nanos(span.duration_ns));
            span_event(out, rank, *tid, &names[span.op.0 as usize], "op", start, duration)?;
            out.write_all(b"}")?;
        }
    }
    out.write_all(b"\n]}\n")
}

/// The step, its three parts, and the figures after it.
fn write_step(out: &mut impl Write, rank: usize, step: &StepSpan) -> io::Result<()> {
    let StepSpan { record, execute, .. } = step;
    let end = record.start + record.duration;
    let name = quoted(&step.name());
    span_event(out, rank, 0, &name, "step", record.start, record.duration)?;
    write!(
        out,
        ",\"args\":{{\"step\":{},\"seqs\":{},\"prefill_tokens\":{},\"decode_tokens\":{},\"waiting\":{}}}}}",
        record.id, record.seqs, record.prefill_tokens, record.decode_tokens, record.waiting
    )?;
    let parts = [
        ("\"schedule\"", record.start..execute.start),
        ("\"execute\"", execute.clone()),
        ("\"commit\"", execute.end..end),
    ];
    for (name, span) in parts {
        span_event(out, rank, 0, name, "step", span.start, span.end.saturating_sub(span.start))?;
        out.write_all(b"}")?;
    }
    let counters = [
        ("requests", format!("\"running\":{},\"waiting\":{}", step.running, record.waiting)),
        ("kv_blocks", format!("\"used\":{}", step.kv_blocks)),
    ];
    for (name, values) in counters {
        let ts = micros(end);
        write!(
            out,
            ",\n{{\"ph\":\"C\",\"pid\":{rank},\"name\":\"{name}\",\"ts\":{ts},\"args\":{{{values}}}}}"
        )?;
    }
    Ok(())
}

/// An event without its closing brace. `name` is quoted already.
fn span_event(
    out: &mut impl Write,
    pid: usize,
    tid: usize,
    name: &str,
    category: &str,
    start: Duration,
    duration: Duration,
) -> io::Result<()> {
    let (ts, dur) = (micros(start), micros(duration));
    write!(
        out,
        ",\n{{\"ph\":\"X\",\"pid\":{pid},\"tid\":{tid},\"cat\":\"{category}\",\"name\":{name},\"ts\":{ts},\"dur\":{dur}"
    )
}

fn metadata(info: &EngineInfo, recorded: &Recorded) -> String {
    format!(
        "{{\"program\":\"bitfast\",\"version\":{},\"model\":{},\"device\":{},\"rank\":{},\"fingerprint\":{},\
         \"numerics_class\":{},\"dropped_op_spans\":{},\"dropped_steps\":{}}}",
        quoted(env!("CARGO_PKG_VERSION")),
        quoted(&info.config.profile.model),
        quoted(&info.device),
        info.config.rank,
        quoted(&info.fingerprint),
        quoted(info.class.name()),
        recorded.dropped_spans,
        recorded.dropped_steps
    )
}

impl StepSpan {
    /// `execute_context_{requests}({tokens})_generation_{requests}({tokens})`
    fn name(&self) -> String {
        let r = &self.record;
        let decoding = r.seqs - self.prefill_seqs;
        format!(
            "execute_context_{}({})_generation_{decoding}({})",
            self.prefill_seqs, r.prefill_tokens, r.decode_tokens
        )
    }
}

/// Microseconds, to the nanosecond.
fn micros(time: Duration) -> String {
    let ns = time.as_nanos();
    format!("{}.{:03}", ns / 1000, ns % 1000)
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => drop(write!(out, "\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
