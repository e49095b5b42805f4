//! Our logits of the tiny models against those of Hugging Face transformers, teacher-forced.
//!
//! The truth is transformers in fp32 on the same bf16 weights. The yardstick is transformers' own bf16 run: our
//! distance from the truth may be at most 1.2 times its distance. Distance is the root mean square of the
//! differences of all stored logits, pooled over all stored rows: one number for a model, so that a row on which
//! bf16 happens to be lucky does not decide; and the mean KL divergence, which weighs logits as a reader of
//! probabilities does, and grows with the square of an error, so its limit is 1.2 squared. Both hold against
//! two readings of the bf16 run: as it comes, and the stricter one whose last product is fp32.

use bitfast_ops::Backend;

use crate::digest;
use crate::figures::{self, RowFigures};
use crate::fixtures::{self, Tensors, TinyGolden, Yardstick};
use crate::rig::{Rig, RigSizes};

/// Times transformers' own distance.
pub const LIMIT: f64 = 1.2;

/// Sizes in which the stored digests' logits are computed, though none of them moves a bit.
pub const SIZES: RigSizes = RigSizes { max_rows: 512, max_len: 1024, block_size: 64, num_blocks: 16 };

/// A model's logits, measured.
pub struct Measured {
    /// What transformers computed.
    pub golden: TinyGolden,
    /// Our distance on every stored row.
    pub rows: Vec<RowFigures>,
    /// Of all logits of all prompts.
    pub digest: String,
}

/// Measures the tiny model `name` of the fixtures, which was loaded into `rig`.
pub fn measure<B: Backend>(name: &str, rig: &mut Rig<B>) -> Measured {
    let golden: TinyGolden = fixtures::json(&format!("golden/{name}.json"));
    let (shape, want) = Tensors::open(&format!("golden/{name}.safetensors")).f32("logits");
    let vocab = rig.config().vocab_size;
    assert_eq!(shape, [golden.rows.len(), vocab]);
    let ours: Vec<Vec<f32>> = golden.prompts.iter().map(|ids| rig.score(ids)).collect();
    let rows =
        golden.rows.iter().zip(want.chunks(vocab)).map(|(&(prompt, position), want)| {
            figures::row(&ours[prompt][position * vocab..][..vocab], want)
        });
    let rows = rows.collect();
    Measured { golden, rows, digest: digest::of_logits(ours.iter().map(Vec::as_slice)) }
}

impl Measured {
    /// Whether we are near enough to the truth by both readings.
    pub fn passes(&self) -> bool {
        let (ours, theirs) = (figures::pooled(&self.rows), self.golden.yardstick);
        passes(ours, theirs.bf16) && passes(ours, theirs.bf16_body)
    }

    /// Prints the figures under the name of `what` and panics if they are too large.
    #[track_caller]
    pub fn check(&self, what: &str) {
        let ours = figures::pooled(&self.rows);
        let (rough, body) = (self.golden.yardstick.bf16, self.golden.yardstick.bf16_body);
        println!(
            "{what}: rms {:.5} = {:.3} of transformers' bf16 ({:.3} of its body), kl {:.2e} ({:.3}), max {:.4} ({:.3})",
            ours.rms,
            ours.rms / rough.rms,
            ours.rms / body.rms,
            ours.kl,
            ours.kl / rough.kl,
            ours.max,
            ours.max / rough.max,
        );
        assert!(passes(ours, rough), "{what}: {ours:?} against {rough:?}");
        assert!(passes(ours, body), "{what}: {ours:?} against the fp32-head reading {body:?}");
    }
}

fn passes(ours: RowFigures, theirs: Yardstick) -> bool {
    ours.rms <= LIMIT * theirs.rms && ours.kl <= LIMIT * LIMIT * theirs.kl
}
