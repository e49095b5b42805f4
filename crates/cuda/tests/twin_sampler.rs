//! The device's sampler gives the bits of `ops::sample_row`, whatever shares the step. Needs an H100 or H200 and NVRTC:
//! `--include-ignored` runs the tests there.

use std::sync::{Arc, Mutex};

use bitfast_cuda::sampler::Sampler;
use bitfast_ops::{BitMask, RowChoice, RowFault, RowParams, RowSample, SampleRow, exact, sample_row};

mod gpu;
use gpu::{Gpu, compile, exact_gpu, floats, gpu, parallel, word};

const VOCABS: [usize; 14] = [1, 2, 5, 31, 33, 100, 1000, 1023, 2049, 4097, 10_007, 49_152, 151_935, 151_936];

/// A stream of words that look random.
struct Draw {
    salt: u64,
    next: u64,
}

impl Draw {
    fn word(&mut self) -> u64 {
        self.next += 1;
        word(self.next, self.salt)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.word() >> 16) as usize % n
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// Roughly normal.
    fn normal(&mut self) -> f32 {
        let w = self.word();
        let sum: u64 = (0..4).map(|i| w >> (16 * i) & 0xFFFF).sum();
        (sum as f32 / 65536.0 - 2.0) * 1.73
    }
}

/// One row of logits of kind `kind mod KINDS`.
fn logits(vocab: usize, kind: usize, draw: &mut Draw) -> Vec<f32> {
    let mut row: Vec<f32> = (0..vocab).map(|_| draw.normal()).collect();
    let any = draw.below(vocab);
    match kind % KINDS {
        0 => row.iter_mut().for_each(|x| *x *= 4.0),
        1 => row.iter_mut().for_each(|x| *x = (*x * 2.0).round()), // ties, zeros of both signs
        2 => row.fill(draw.of(&[0.0, -0.0, 3.25, -1e30, f32::MAX])),
        3 => row.iter_mut().for_each(|x| *x *= 1e37),
        4 => {
            // A few tokens far above the others.
            for i in 0..8 {
                row[(any + i * 97) % vocab] = 12.0 + i as f32 / 3.0;
            }
        }
        5 => {
            for x in &mut row {
                if draw.below(3) > 0 {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
        6 => {
            row[any] = f32::INFINITY;
            row[draw.below(vocab)] = f32::MAX;
        }
        7 => row[any] = f32::NAN,
        8 => row.fill(f32::NEG_INFINITY),
        9 => (0..vocab).for_each(|i| row[i] = -(i as f32) / 16.0),
        10 => (0..vocab).for_each(|i| row[i] = (i as f32 / 64.0).floor() / 1024.0),
        11 => row.iter_mut().for_each(|x| *x *= 1e-3),
        12 => {
            row.fill(f32::NEG_INFINITY);
            row[any] = -2.0;
        }
        13 => {
            // The largest are neighbours.
            for i in 0..vocab.min(3000) {
                row[(any + i) % vocab] = 10.0 + draw.below(1000) as f32 / 1000.0;
            }
        }
        14 => {
            // A sum above 2^14 of weights of 1, then weights around half a unit of its last place: many are ties, whose rounding depends on the sum.
            let ten = 10.0 * std::f32::consts::LN_2;
            for x in &mut row {
                let little = draw.below(1000) as f32 * 1e-6;
                *x = draw.of(&[0.0, -ten, -ten, little - ten, little - ten, 0.9 * -ten - little]);
            }
        }
        _ => row.iter_mut().for_each(|x| *x = x.abs() * 10.0 - 40.0),
    }
    row
}

const KINDS: usize = 16;

/// What a row refers to.
struct Lists {
    mask: Option<Arc<BitMask>>,
    bias: Vec<(u32, f32)>,
    forbidden: Vec<u32>,
    prompt: Vec<u32>,
    output: Vec<u32>,
    params: RowParams,
    position: u32,
    choose: bool,
    score: Option<u32>,
    logprobs: Option<u32>,
}

fn lists(vocab: usize, draw: &mut Draw) -> Lists {
    let ids = |draw: &mut Draw, n: usize| -> Vec<u32> {
        (0..draw.below(n + 1)).map(|_| draw.below(vocab + vocab / 8) as u32).collect()
    };
    let edits = draw.below(2) == 0;
    let mask = (edits && draw.below(2) == 0).then(|| {
        let every = draw.of(&[1, 2, 3, 50]);
        let mut mask = BitMask::from_ids(vocab, (0..vocab as u32).filter(|i| i % every == 0));
        if draw.below(4) == 0 {
            mask.0.truncate(vocab.div_ceil(64)); // missing words allow nothing
        }
        Arc::new(mask)
    });
    let bias = if edits { ids(draw, 40) } else { vec![] };
    let bias = bias.into_iter().flat_map(|id| {
        let x = draw.normal() * 8.0;
        let again = draw.below(4) == 0;
        let extreme = draw.of(&[x, x, x, 1e38, f32::NEG_INFINITY]);
        [(id, x), (id, extreme)].into_iter().take(1 + usize::from(again)).collect::<Vec<_>>()
    });
    let bias = bias.collect();
    let filters = draw.below(3) > 0;
    let params = RowParams {
        temperature: draw.of(&[0.0, 1.0, 1.0, 0.7, 1.5, 30.0, 1e-4, f32::NAN]),
        top_k: if filters {
            let all = vocab as u32;
            draw.of(&[0, 0, 1, 2, 5, 50, 300, 512, 513, 1187, 1188, 5000, all - 1, all, all + 5])
        } else {
            0
        },
        top_p: if filters { draw.of(&[1.0, 0.9, 0.9, 0.5, 0.99, 0.999_999, 1e-6, 0.0, -1.0]) } else { 1.0 },
        min_p: draw.of(&[0.0, 0.0, 0.05, 0.9, 1.0, 1.5, -1.0, 1e-20]),
        presence_penalty: if edits { draw.of(&[0.0, 0.5, -2.0, 1e38]) } else { 0.0 },
        frequency_penalty: if edits { draw.of(&[0.0, 0.0, 0.25, -1.5]) } else { 0.0 },
        repetition_penalty: if edits { draw.of(&[1.0, 1.0, 1.3, 0.8, 0.0]) } else { 1.0 },
        seed: draw.word(),
    };
    let choose = draw.below(8) > 0;
    Lists {
        mask,
        bias,
        forbidden: if edits { ids(draw, 6) } else { vec![] },
        prompt: ids(draw, 600),
        output: ids(draw, 200),
        params,
        position: draw.word() as u32 % 100_000,
        choose,
        score: (draw.below(6) == 0).then(|| draw.below(vocab) as u32),
        logprobs: draw.of(&[
            None,
            None,
            None,
            Some(0),
            Some(1),
            Some(5),
            Some(20),
            Some(1187),
            Some(1188),
            Some(vocab as u32 / 3 + 1),
        ]),
    }
}

impl Lists {
    fn row(&self, logit_row: u32) -> SampleRow<'_> {
        let choose = self.choose.then(|| RowChoice {
            params: self.params.clone(),
            allowed: self.mask.clone(),
            bias: &self.bias,
            forbidden: &self.forbidden,
            prompt: &self.prompt,
            output: &self.output,
        });
        let (position, score_token, logprobs) = (self.position, self.score, self.logprobs);
        SampleRow { logit_row, position, choose, score_token, logprobs }
    }
}

/// All bits of an answer.
type Bits = (Result<u32, RowFault>, Option<(u32, u32, Vec<(u32, u32)>)>);

fn bits(sample: &RowSample) -> Bits {
    let logprobs = sample.logprobs.as_ref().map(|l| {
        (l.logprob.to_bits(), l.rank, l.top.iter().map(|(id, x)| (*id, x.to_bits())).collect::<Vec<_>>())
    });
    (sample.token, logprobs)
}

fn reference(vocab: usize, logits: &[f32], rows: &[SampleRow<'_>]) -> Vec<Bits> {
    let answers = Mutex::new(vec![None; rows.len()]);
    parallel(rows.len(), |i| {
        let mut logits = logits[rows[i].logit_row as usize * vocab..][..vocab].to_vec();
        let answer = bits(&sample_row(&mut logits, &rows[i]));
        answers.lock().expect("answers")[i] = Some(answer);
    });
    answers.into_inner().expect("answers").into_iter().map(|a| a.expect("every row")).collect()
}

/// Differences between the device and the reference, in words.
fn differences(
    gpu: &Gpu,
    sampler: &mut Sampler,
    vocab: usize,
    logits: &[f32],
    rows: &[SampleRow<'_>],
) -> Vec<String> {
    let on_gpu = gpu.input(&floats(logits));
    let got = sampler.run(&gpu.stream, &on_gpu, rows).expect("a kernel that ran");
    let expected = reference(vocab, logits, rows);
    assert_eq!(got.len(), rows.len());
    let mut all = Vec::new();
    for ((got, expected), row) in got.iter().zip(&expected).zip(rows) {
        let got = bits(got);
        if got != *expected {
            let params = row.choose.as_ref().map(|c| &c.params);
            let parts = |b: &Bits| (b.0, b.1.as_ref().map(|l| (l.0, l.1, l.2.len())));
            all.push(format!(
                "vocab {vocab}, row {} of {}: {:?} for {:?}; {params:?} score {:?} logprobs {:?}",
                row.logit_row,
                rows.len(),
                parts(&got),
                parts(expected),
                row.score_token,
                row.logprobs
            ));
        }
    }
    if gpu.difference(&on_gpu, &floats(logits)).is_some() {
        all.push(format!("vocab {vocab}: logits were changed"));
    }
    all
}

#[test]
#[ignore = "needs NVRTC"]
fn every_kernel_compiles() {
    compile(&VOCABS.map(Sampler::sources).concat());
}

#[test]
#[ignore = "needs an H100 or H200"]
fn random_and_adversarial_rows_equal_the_reference() {
    let gpu = gpu();
    gpu.prepare(&VOCABS.map(Sampler::sources).concat());
    let (mut compared, mut failures) = (0, Vec::new());
    for (v, vocab) in VOCABS.into_iter().enumerate() {
        let mut sampler = Sampler::new(&gpu.device, &gpu.jit, vocab, 256).expect("a sampler");
        let steps: &[usize] = if vocab > 20_000 { &[1, 17, 256] } else { &[1, 2, 3, 17, 64, 255, 256, 256] };
        for (s, &count) in steps.iter().enumerate() {
            let mut draw = Draw { salt: (v * 100 + s) as u64, next: 0 };
            // Fewer rows of logits than questions: some are asked twice.
            let held = count.div_ceil(2).min(KINDS * 2);
            let first = draw.below(KINDS);
            let data: Vec<f32> = (0..held).flat_map(|r| logits(vocab, first + r, &mut draw)).collect();
            let asked: Vec<Lists> = (0..count).map(|_| lists(vocab, &mut draw)).collect();
            let rows: Vec<_> = asked.iter().map(|a| a.row(draw.below(held) as u32)).collect();
            failures.extend(differences(&gpu, &mut sampler, vocab, &data, &rows));
            compared += count;
        }
    }
    let first: Vec<_> = failures.iter().take(25).collect();
    assert!(failures.is_empty(), "{} of {compared} rows differ: {first:#?}", failures.len());
    println!("sampler: {compared} rows equal the reference");
}

/// As many rows as linears are tried with.
#[test]
#[ignore = "needs an H100 or H200"]
fn every_number_of_rows_equals_the_reference() {
    const ROWS: [usize; 17] = [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 128, 129, 256, 1000, 4096];
    let gpu = gpu();
    for (v, vocab) in [1000, 2049].into_iter().enumerate() {
        let mut sampler = Sampler::new(&gpu.device, &gpu.jit, vocab, 4096).expect("a sampler");
        for count in ROWS {
            let mut draw = Draw { salt: (70 + v * 10_000 + count) as u64, next: 0 };
            let data: Vec<f32> = (0..count).flat_map(|r| logits(vocab, r, &mut draw)).collect();
            let asked: Vec<Lists> = (0..count).map(|_| lists(vocab, &mut draw)).collect();
            let rows: Vec<_> = asked.iter().enumerate().map(|(i, a)| a.row(i as u32)).collect();
            let found = differences(&gpu, &mut sampler, vocab, &data, &rows);
            let first: Vec<_> = found.iter().take(10).collect();
            assert!(found.is_empty(), "{} of {count} rows differ: {first:#?}", found.len());
        }
    }
}

/// Small enough to run under compute-sanitizer.
#[test]
#[ignore = "needs an H100 or H200"]
fn small_vocabularies() {
    let gpu = exact_gpu();
    let mut compared = 0;
    for (v, vocab) in [33, 2049, 4097].into_iter().enumerate() {
        let mut sampler = Sampler::new(&gpu.device, &gpu.jit, vocab, 8).expect("a sampler");
        for count in [1, 8] {
            let mut draw = Draw { salt: 9000 + (10 * v + count) as u64, next: 0 };
            let data: Vec<f32> = (0..count).flat_map(|r| logits(vocab, r, &mut draw)).collect();
            let asked: Vec<Lists> = (0..count).map(|_| lists(vocab, &mut draw)).collect();
            let rows: Vec<_> = asked.iter().enumerate().map(|(i, a)| a.row(i as u32)).collect();
            let found = differences(&gpu, &mut sampler, vocab, &data, &rows);
            assert!(found.is_empty(), "{found:#?}");
            compared += count;
        }
    }
    println!("sampler: {compared} rows equal the reference");
}

/// Where what filters keep ends, to the token: positions at which its last token, or the first one behind it, has so much noise that it wins if
/// it runs. One entry more or less would be seen. Prefixes of each way of finding them, and on both sides of the limits between these ways: 2048
/// candidates, 512 tokens of top-k alone, as many tokens as there are groups of 128 (1187).
#[test]
#[ignore = "needs an H100 or H200"]
fn prefixes_end_at_the_reference_s_token() {
    let gpu = gpu();
    let vocab = 151_936;
    let mut sampler = Sampler::new(&gpu.device, &gpu.jit, vocab, 256).expect("a sampler");
    let of_kinds = [
        (0, 0.9, 0),
        (1, 0.9, 0),
        (2, 0.7, 0),
        (10, 0.5, 0),
        (11, 0.3, 0),
        (11, 0.999, 0),
        (11, 0.9, 70_000),
        (13, 0.9, 0),
        (13, 1.0, 512),
        (14, 0.6, 0),
        (14, 0.9, 70_000),
        (15, 0.95, 0),
        (1, 0.97, 5000),
        (4, 0.6, 40),
        (11, 1.0, 512),
        (11, 1.0, 513),
        (11, 1.0, 1187),
        (11, 1.0, 1188),
        (11, 0.9999, 1187),
        (11, 0.9999, 1188),
    ];
    let mut cases: Vec<(String, Vec<f32>, f32, u32)> = Vec::new();
    for (kind, top_p, top_k) in of_kinds {
        let mut draw = Draw { salt: 77 + kind as u64, next: 0 };
        cases.push((format!("kind {kind}"), logits(vocab, kind, &mut draw), top_p, top_k));
    }
    for n in [2047, 2048, 2049] {
        let row = crowded(vocab, n, &mut Draw { salt: n as u64, next: 0 });
        assert_eq!(candidates(&row, 50), n);
        cases.push((format!("{n} candidates"), row.clone(), 1.0, 50));
        cases.push((format!("{n} candidates"), row, 0.8, 50));
    }
    let (mut failures, mut last_won, mut compared) = (Vec::new(), 0, 0);
    for (name, data, top_p, top_k) in cases {
        let (len, sorted) = (prefix(&data, top_p, top_k), in_order(&data));
        println!("{name}, top_p {top_p}, top_k {top_k}: {len} tokens");
        let (seed, ends) = (word(len as u64, 3), [sorted[len - 1], sorted[len.min(vocab - 1)]]);
        let asked: Vec<Lists> = ends
            .into_iter()
            .flat_map(|token| {
                // Noise far above what so many tokens reach, on top of what this one lacks against the best.
                let lacks = data[sorted[0] as usize] - data[token as usize];
                let needed = (lacks + (len as f32).ln() + 1.5).min(17.0);
                (0..8_000_000).filter(move |p| exact::gumbel(seed, *p, token) > needed).take(4)
            })
            .map(|position| Lists {
                params: RowParams { top_p, top_k, seed, ..RowParams::default() },
                position,
                ..plain()
            })
            .collect();
        let rows: Vec<_> = asked.iter().map(|a| a.row(0)).collect();
        for answer in reference(vocab, &data, &rows) {
            last_won += usize::from(answer.0 == Ok(ends[0]));
        }
        compared += rows.len();
        failures.extend(differences(&gpu, &mut sampler, vocab, &data, &rows));
    }
    assert!(failures.is_empty(), "{} of {compared} differ: {failures:#?}", failures.len());
    assert!(last_won * 5 > compared, "the last token won {last_won} of {compared}: the ends were not tested");
    println!("sampler: {compared} prefixes, the last token won {last_won}");
}

/// A row of which the 50 groups of 128 with the largest values hold `n` tokens that reach the least of these values.
fn crowded(vocab: usize, n: usize, draw: &mut Draw) -> Vec<f32> {
    let mut row: Vec<f32> = (0..vocab).map(|_| -1.0 - draw.normal().abs()).collect();
    for i in 0..n - 1 {
        row[i % 49 * 128 + i / 49] = 5.1 + draw.below(50_000) as f32 / 10_000.0;
    }
    row[50 * 128 + 7] = 5.0;
    row
}

/// Tokens that reach what the largest values of `k` groups of 128 reach.
fn candidates(row: &[f32], k: usize) -> usize {
    let mut largest: Vec<f32> = row.chunks(128).map(|g| g.iter().copied().fold(f32::MIN, f32::max)).collect();
    largest.sort_by(|a, b| b.total_cmp(a));
    row.iter().filter(|x| **x >= largest[k - 1]).count()
}

/// A row that only chooses.
fn plain() -> Lists {
    Lists {
        mask: None,
        bias: vec![],
        forbidden: vec![],
        prompt: vec![],
        output: vec![],
        params: RowParams::default(),
        position: 0,
        choose: true,
        score: None,
        logprobs: None,
    }
}

fn in_order(row: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    ids.sort_by(|a, b| row[*b as usize].partial_cmp(&row[*a as usize]).expect("no NaN").then(a.cmp(b)));
    ids
}

/// Tokens that top-k and top-p keep, from their definition.
fn prefix(row: &[f32], top_p: f32, top_k: u32) -> usize {
    let (max, _) = exact::row_max(row);
    let order = in_order(row);
    let limit = if top_k > 0 { top_k as usize } else { row.len() };
    let weights = || order[..limit].iter().map(|id| exact::exp_below(row[*id as usize], max));
    let all = if top_k > 0 { weights().fold(0.0, |s, w| s + w) } else { exact::sum_exp(row, max) };
    let mut sum = 0.0;
    if top_p >= 1.0 {
        return limit;
    }
    let reached = weights().position(|w| {
        sum += w;
        sum >= top_p * all
    });
    reached.map_or(limit, |i| i + 1)
}

/// The comparison can fail: another position and another bit give other answers.
#[test]
#[ignore = "needs an H100 or H200"]
fn another_position_and_another_bit_differ() {
    let gpu = gpu();
    let vocab = 10_007;
    let mut sampler = Sampler::new(&gpu.device, &gpu.jit, vocab, 64).expect("a sampler");
    let mut draw = Draw { salt: 5, next: 0 };
    let mut data = logits(vocab, 0, &mut draw);
    let asked: Vec<Lists> =
        (0..64).map(|position| Lists { position, logprobs: Some(3), score: Some(17), ..plain() }).collect();
    let mut run = |shift: u32, data: &[f32]| -> Vec<Bits> {
        let rows: Vec<_> =
            asked.iter().map(|a| SampleRow { position: a.position + shift, ..a.row(0) }).collect();
        let on_gpu = gpu.upload(&floats(data));
        sampler.run(&gpu.stream, &on_gpu, &rows).expect("a kernel").iter().map(bits).collect()
    };
    let got = run(0, &data);
    let rows: Vec<_> = asked.iter().map(|a| a.row(0)).collect();
    assert_eq!(got, reference(vocab, &data, &rows));
    let moved = run(1, &data);
    assert!(got.iter().zip(&moved).any(|(a, b)| a.0 != b.0), "does not see the position");
    data[17] = f32::from_bits(data[17].to_bits() ^ 1 << 12);
    let changed = run(0, &data);
    assert!(got.iter().zip(&changed).all(|(a, b)| a.1 != b.1), "does not see a changed logit");
}
