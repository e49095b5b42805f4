//! `bitfast pull` and `bitfast models`.

use std::io::Write;

use bitfast::{LoadFormat, ModelFiles, PACKAGES};

use crate::exit::{Exit, Outcome};
use crate::flags::PullArgs;
use crate::progress::StartBar;

/// Fetches a model and prints where it is.
pub fn pull(args: &PullArgs) -> Outcome {
    let mut bar = StartBar::new(args.quiet);
    let files =
        bitfast::resolve(&args.name, args.revision.as_deref(), LoadFormat::Auto, &mut |p| bar.show(p))?;
    let (ModelFiles::Folder(path) | ModelFiles::Gguf(path)) = files else {
        return Err(Exit::User(format!("name: {:?} is built in, there is nothing to fetch", args.name)));
    };
    writeln!(std::io::stdout(), "{}", path.display())?;
    Ok(())
}

/// Lists the aliases.
pub fn list() -> Outcome {
    let mut out = std::io::stdout().lock();
    for package in PACKAGES {
        let state = if package.is_cached()? { "fetched" } else { "not fetched" };
        writeln!(out, "{:<16} {} ({state})", package.alias, package.about)?;
    }
    writeln!(out, "\nAlso: a folder with safetensors, a .gguf file, or a hub id (org/name).")?;
    Ok(())
}
