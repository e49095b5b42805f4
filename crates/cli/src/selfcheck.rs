use std::io::Write;

use bitfast::Device;

use crate::exit::{Exit, Outcome};
use crate::flags::SelfCheckArgs;

/// `bitfast selfcheck`.
pub fn selfcheck(args: &SelfCheckArgs) -> Outcome {
    let found = bitfast::selfcheck(args.device.unwrap_or(Device::Auto))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &found).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        writeln!(out, "{}, class {}", found.device, found.class)?;
        for f in &found.findings {
            let verdict = match (f.differing, f.required) {
                (0, _) => "equal".to_owned(),
                (n, true) => format!("{n} DIFFER"),
                (n, false) => format!("{n} differ (no model depends on it)"),
            };
            writeln!(out, "  {:<60} {:>6} outputs  {verdict}", f.name, f.outputs)?;
            if let Some(first) = &f.first {
                writeln!(out, "    {first}")?;
            }
        }
        writeln!(out, "{:.2} s", found.seconds)?;
    }
    out.flush()?;
    if found.passes() {
        Ok(())
    } else {
        Err(Exit::Ours("this device does not keep the law; it must not serve".into()))
    }
}
