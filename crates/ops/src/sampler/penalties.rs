use crate::RowChoice;
use crate::exact::cap;

/// Applies, in this order: allowed mask, bias, repetition, frequency and presence penalties, forbidden tokens.
/// Ids outside the vocabulary are ignored. Entries that become NaN are excluded.
#[inline(always)]
pub(super) fn apply(logits: &mut [f32], choice: &RowChoice<'_>) {
    if let Some(allowed) = &choice.allowed {
        let words = allowed.0.iter().copied().chain(std::iter::repeat(0));
        for (chunk, word) in logits.chunks_mut(32).zip(words) {
            for (bit, x) in chunk.iter_mut().enumerate() {
                *x = if word >> bit & 1 == 1 { *x } else { f32::NEG_INFINITY };
            }
        }
    }
    for (id, bias) in choice.bias {
        update(logits, *id, |x| x + bias);
    }
    if choice.params.repetition_penalty != 1.0 {
        repetition(logits, choice);
    }
    if choice.params.frequency_penalty != 0.0 || choice.params.presence_penalty != 0.0 {
        frequency_and_presence(logits, choice);
    }
    for id in choice.forbidden {
        update(logits, *id, |_| f32::NEG_INFINITY);
    }
}

/// Divides positive and multiplies other logits of every distinct token of prompt and output, once each.
#[inline(never)]
fn repetition(logits: &mut [f32], choice: &RowChoice<'_>) {
    let penalty = choice.params.repetition_penalty;
    let mut ids = [choice.prompt, choice.output].concat();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        update(logits, id, |x| if x > 0.0 { x / penalty } else { x * penalty });
    }
}

/// `x = (x - frequency * count) - presence` for every distinct token of the output.
#[inline(never)]
fn frequency_and_presence(logits: &mut [f32], choice: &RowChoice<'_>) {
    let (frequency, presence) = (choice.params.frequency_penalty, choice.params.presence_penalty);
    let mut ids = choice.output.to_vec();
    ids.sort_unstable();
    for same in ids.chunk_by(|a, b| a == b) {
        update(logits, same[0], |x| x - frequency * same.len() as f32 - presence);
    }
}

#[inline(always)]
fn update(logits: &mut [f32], id: u32, change: impl Fn(f32) -> f32) {
    if let Some(x) = logits.get_mut(id as usize) {
        let changed = change(cap(*x));
        *x = if changed.is_nan() { f32::NEG_INFINITY } else { cap(changed) };
    }
}
