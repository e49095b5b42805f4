use bitfast::Device;

use crate::exit::{Exit, Outcome};
use crate::flags::SelfCheckArgs;

/// `bitfast selfcheck`.
pub fn selfcheck(args: &SelfCheckArgs) -> Outcome {
    let found = bitfast::selfcheck(args.device.unwrap_or(Device::Auto))?;
    if args.json {
        println!("{}", serde_json::to_string(&found).map_err(|e| Exit::Ours(e.to_string()))?);
    } else {
        println!("{}, class {}", found.device, found.class);
        for f in &found.findings {
            let verdict = match (f.differing, f.required) {
                (0, _) => "equal".to_owned(),
                (n, true) => format!("{n} DIFFER"),
                (n, false) => format!("{n} differ (no model depends on it)"),
            };
            println!("  {:<60} {:>6} outputs  {verdict}", f.name, f.outputs);
            if let Some(first) = &f.first {
                println!("    {first}");
            }
        }
        println!("{:.2} s", found.seconds);
    }
    if found.passes() {
        Ok(())
    } else {
        Err(Exit::Ours("this device does not keep the law; it must not serve".into()))
    }
}
