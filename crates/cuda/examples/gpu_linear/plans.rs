//! The layers of the anchor models, and plans of them as a file tells them.

use bitfast_cuda::catalogue::LAYERS;
use bitfast_cuda::linear::{Few, LinearSpec, Narrow, Output, Variant, Wide, plan};
use bitfast_ops::LinearKind;
use bitfast_ops::contract::{Join, KOrder};

use crate::common::Result;

#[derive(Clone, Copy)]
pub struct Layer {
    pub name: &'static str,
    pub n: usize,
    pub k: usize,
    pub kind: LinearKind,
}

/// Those of Qwen3-1.7B and Llama-3.1-8B.
fn layers() -> impl Iterator<Item = Layer> {
    LAYERS.into_iter().map(|(name, n, k, kind)| Layer { name, n, k, kind })
}

/// One layer, one number of tokens, and the plans that are timed in turns.
pub struct Group {
    pub layer: Layer,
    /// In the contract's order, gates and ups apart.
    pub spec: LinearSpec,
    pub tokens: usize,
    pub plans: Vec<Plan>,
}

pub struct Plan {
    /// As it was written.
    pub word: String,
    pub spec: LinearSpec,
    pub variant: Variant,
}

impl Group {
    fn new(layer: Layer, tokens: usize) -> Self {
        Self { layer, spec: LinearSpec::new(layer.kind, layer.n, layer.k), tokens, plans: Vec::new() }
    }

    /// What must be read and written at least.
    pub fn bytes(&self) -> f64 {
        let Layer { n, k, .. } = self.layer;
        (n * k * 2 + self.tokens * (k * 2 + row_bytes(&self.spec))) as f64
    }

    pub fn flops(&self) -> f64 {
        2.0 * (self.layer.n * self.layer.k * self.tokens) as f64
    }
}

/// Bytes of an output row.
pub fn row_bytes(spec: &LinearSpec) -> usize {
    spec.outputs() * spec.output_bytes()
}

/// Every layer with what [`plan`] picks on a card of `sms` multiprocessors; most rows of logits are 512.
pub fn picked(sms: usize) -> Vec<Group> {
    let mut groups = Vec::new();
    for layer in layers() {
        for tokens in [1, 8, 64, 128, 512, 2048, 8192] {
            if layer.kind == LinearKind::Vocab && tokens > 512 {
                continue;
            }
            let mut group = Group::new(layer, tokens);
            let (spec, variant) = (group.spec, plan(&group.spec, tokens, sms));
            group.plans.push(Plan { word: "plan".to_owned(), spec, variant });
            groups.push(group);
        }
    }
    groups
}

/// The lines of a file, for a card of `sms` multiprocessors; `plans.txt` says what they look like.
pub fn read(text: &str, sms: usize) -> Result<Vec<Group>> {
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines.map(|line| group(line, sms).map_err(|why| format!("{line}: {why}").into())).collect()
}

fn group(line: &str, sms: usize) -> Result<Group> {
    let mut words = line.split_whitespace();
    let (layer, tokens) = (words.next().ok_or("no layer")?, words.next().ok_or("no tokens")?);
    let layer = layers().find(|l| l.name.replace(' ', "_") == layer).ok_or("no such layer")?;
    let mut group = Group::new(layer, tokens.parse()?);
    for word in words {
        let plan = parse(word, &group, sms).map_err(|why| format!("{word}: {why}"))?;
        if plan.variant.fits(&plan.spec) {
            group.plans.push(plan);
        } else {
            println!("{} {word}: too much shared memory", layer.name);
        }
    }
    Ok(group)
}

fn parse(word: &str, group: &Group, sms: usize) -> Result<Plan> {
    let (prefix, rest) = word.split_once(':').unwrap_or(("", word));
    let spec = spec(prefix, group).ok_or("no such order or output")?;
    let numbers = rest.trim_start_matches(char::is_alphabetic);
    let kind = &rest[..rest.len() - numbers.len()];
    let numbers = numbers.split(',').filter(|n| !n.is_empty()).map(str::parse);
    let variant = match (kind, &numbers.collect::<Result<Vec<usize>, _>>()?[..]) {
        ("plan", []) => plan(&spec, group.tokens, sms),
        (kind, numbers) => variant(kind, numbers, &spec, group.tokens).ok_or("no such plan of this layer")?,
    };
    Ok(Plan { word: word.to_owned(), spec, variant })
}

/// The numerics that a prefix asks for.
fn spec(prefix: &str, group: &Group) -> Option<LinearSpec> {
    let order = |join, leaves: &str| {
        let leaves = leaves.parse().ok().filter(|leaves| [1, 2, 4, 8].contains(leaves))?;
        Some(LinearSpec { order: KOrder { leaves, join }, ..group.spec })
    };
    match (prefix, prefix.split_at_checked(4)) {
        ("", _) => Some(group.spec),
        ("silu", _) if group.layer.kind == LinearKind::GateUp => group.spec.fused(),
        (_, Some(("fold", leaves))) => order(Join::Fold, leaves),
        (_, Some(("tree", leaves))) => order(Join::Tree, leaves),
        _ => None,
    }
}

fn variant(kind: &str, numbers: &[usize], spec: &LinearSpec, tokens: usize) -> Option<Variant> {
    Some(match (kind, numbers) {
        ("few", &[tiles, stages]) if spec.output != Output::SiluMul => {
            Variant::Few(Few { tiles, token_eights: tokens.div_ceil(8), stages })
        }
        ("narrow", &[tokens, groups, stages, ksplit, min_ctas]) => {
            Variant::Narrow(Narrow { tokens, groups, stages, ksplit, min_ctas })
        }
        ("wide", &[tile, stages, cluster, raster, out_cols]) => {
            Variant::Wide(Wide { tile, stages, cluster, raster, out_cols, regs: [(tile / 2).min(104); 3] })
        }
        ("wide", &[tile, stages, cluster, raster, out_cols, a, b, c]) if a.max(b).max(c) <= tile / 2 => {
            Variant::Wide(Wide { tile, stages, cluster, raster, out_cols, regs: [a, b, c] })
        }
        _ => return None,
    })
}
