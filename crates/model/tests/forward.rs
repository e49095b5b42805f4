//! Loading and the forward pass against a backend that does no arithmetic: it writes down what it is asked.

use std::cell::RefCell;

use bitfast_model::{
    DummySource, LoadError, LoadOptions, Loaded, ModelConfig, Progress, TensorSpec, WeightError,
    WeightSource, kv_layout, load, tensor_specs, weights_digest,
};
use bitfast_ops::*;

/// Records calls; tensors and parameters are their names.
#[derive(Default)]
struct Recorder {
    ranks: usize,
    calls: Vec<String>,
    /// (description, data) of every weight, in the order of loading.
    weights: RefCell<Vec<(LinearDesc, Vec<bf16>)>>,
}

impl Recorder {
    fn note(&mut self, call: String) -> Result<()> {
        self.calls.push(call);
        Ok(())
    }
}

impl Backend for Recorder {
    type Weight = String;
    type Param = String;
    type Tensor = String;
    type Kv = ();

    fn name(&self) -> &'static str {
        "recorder"
    }
    fn class(&self) -> Class {
        Class::Portable
    }
    fn batch_invariant(&self) -> bool {
        true
    }
    fn device(&self) -> String {
        "paper".to_owned()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    fn rank(&self) -> (usize, usize) {
        (0, self.ranks.max(1))
    }
    fn block_sizes(&self) -> &'static [usize] {
        &[16]
    }
    fn weight(&self, desc: &LinearDesc, data: HostTensor<'_>) -> Result<String> {
        self.weights.borrow_mut().push((desc.clone(), data.data.into_owned()));
        Ok(desc.name.clone())
    }
    fn param(&self, name: &str, data: HostTensor<'_>) -> Result<String> {
        Ok(format!("{name}{:?}", data.shape))
    }
    fn rope(&self, table: &RopeTable) -> Result<String> {
        Ok(format!("rope{:?}", [table.cos.len() / (table.rot_dim / 2), table.rot_dim]))
    }
    fn tensor(&self, name: &str, rows: usize, cols: usize, dtype: Dtype) -> Result<String> {
        Ok(format!("{name}[{rows}, {cols}]{}", if dtype == Dtype::F32 { "f32" } else { "" }))
    }
    fn kv_block_bytes(&self, _: &KvLayout) -> u64 {
        0
    }
    fn kv(&self, _: &KvLayout, _: usize) -> Result<()> {
        Ok(())
    }
    fn free_bytes(&self) -> Result<u64> {
        Ok(0)
    }
    fn begin(&mut self, _: &BatchInputs) -> Result<()> {
        Ok(())
    }
    fn embed(&mut self, table: &String, out: &mut String) -> Result<()> {
        self.note(format!("{out} = embed {table}"))
    }
    fn rms_norm(&mut self, x: &String, w: &String, _: NormDesc, out: &mut String) -> Result<()> {
        self.note(format!("{out} = norm {x} {w}"))
    }
    fn add_rms_norm(
        &mut self,
        residual: &mut String,
        delta: &String,
        w: &String,
        _: NormDesc,
        out: &mut String,
    ) -> Result<()> {
        self.note(format!("{out} = norm {residual} += {delta} {w}"))
    }
    fn linear(&mut self, w: &String, x: &String, out: &mut String) -> Result<()> {
        self.note(format!("{out} = linear {w} {x}"))
    }
    fn gate_up(&mut self, w: &String, x: &String, out: &mut String) -> Result<()> {
        self.note(format!("{out} = gate_up {w} {x}"))
    }
    fn qkv_prep(
        &mut self,
        d: QkvPrepDesc,
        qkv: &String,
        norms: Option<(&String, &String)>,
        rope: &String,
        _: &mut (),
        q_out: &mut String,
    ) -> Result<()> {
        assert_eq!(d.qk_norm.is_some(), norms.is_some());
        self.note(format!("{q_out} = prep {} {}/{} {qkv} {norms:?} {rope}", d.layer, d.heads, d.kv_heads))
    }
    fn attention(&mut self, d: AttnDesc, q: &String, _: &(), out: &mut String) -> Result<()> {
        assert_eq!(d.scale_log2, std::f32::consts::LOG2_E / 8.0, "head_dim is 64 in both tiny configs");
        self.note(format!("{out} = attention {} {}/{} {q}", d.layer, d.heads, d.kv_heads))
    }
    fn select_logit_rows(&mut self, x: &String, out: &mut String) -> Result<()> {
        self.note(format!("{out} = select {x}"))
    }
    fn logits(&mut self, w: &String, x: &String, out: &mut String) -> Result<()> {
        self.note(format!("{out} = logits {w} {x}"))
    }
    fn sample(&mut self, _: &mut String, _: &[SampleRow<'_>]) -> Result<Vec<RowSample>> {
        Ok(Vec::new())
    }
    fn read_f32(&mut self, _: &String, _: usize) -> Result<Vec<f32>> {
        Ok(Vec::new())
    }
    fn poison_blocks(&mut self, _: &mut (), _: &[u32]) -> Result<()> {
        Ok(())
    }
}

fn options() -> LoadOptions {
    LoadOptions { max_num_batched_tokens: 32, max_logit_rows: 8, max_model_len: 100, threads: 2 }
}

fn load_dummy(be: &Recorder, config: &ModelConfig) -> Loaded<Recorder> {
    load(be, config, &DummySource::new(config), &options(), &mut |_| {}).unwrap()
}

fn calls(config: &ModelConfig) -> Vec<String> {
    let mut be = Recorder::default();
    let mut model = load_dummy(&be, config).model;
    assert_eq!(model.forward(&mut be, &mut ()).unwrap(), "logits[8, 320]f32");
    assert_eq!(model.logits(), "logits[8, 320]f32");
    be.calls
}

#[test]
fn llama_runs_its_layers_in_order() {
    let layer = |i: usize, first: &str| {
        let p = format!("model.layers.{i}");
        vec![
            format!("normed[32, 96] = norm {first} {p}.input_layernorm.weight[96]"),
            format!("qkv[32, 512] = linear {p}.self_attn.qkv_proj.weight normed[32, 96]"),
            format!("q[32, 256] = prep {i} 4/2 qkv[32, 512] None rope[100, 64]"),
            format!("attn[32, 256] = attention {i} 4/2 q[32, 256]"),
            format!("delta[32, 96] = linear {p}.self_attn.o_proj.weight attn[32, 256]"),
            format!(
                "normed[32, 96] = norm residual[32, 96] += delta[32, 96] {p}.post_attention_layernorm.weight[96]"
            ),
            format!("inner[32, 160] = gate_up {p}.mlp.gate_up_proj.weight normed[32, 96]"),
            format!("delta[32, 96] = linear {p}.mlp.down_proj.weight inner[32, 160]"),
        ]
    };
    let mut expected = vec!["residual[32, 96] = embed model.embed_tokens.weight".to_owned()];
    expected.extend(layer(0, "residual[32, 96]"));
    expected.extend(layer(1, "residual[32, 96] += delta[32, 96]"));
    expected.extend([
        "normed[32, 96] = norm residual[32, 96] += delta[32, 96] model.norm.weight[96]".to_owned(),
        "selected[8, 96] = select normed[32, 96]".to_owned(),
        "logits[8, 320]f32 = logits lm_head.weight selected[8, 96]".to_owned(),
    ]);
    assert_eq!(calls(&ModelConfig::tiny_llama()), expected);
}

#[test]
fn qwen3_differs_by_head_norms_and_the_tied_matrix() {
    let tied = ModelConfig { tie_word_embeddings: true, ..ModelConfig::tiny_llama() };
    let (qwen3, llama) = (calls(&ModelConfig::tiny_qwen3()), calls(&tied));
    assert_eq!(qwen3.len(), llama.len());
    for (q, l) in qwen3.iter().zip(&llama) {
        if q.contains("prep") {
            assert!(q.contains("self_attn.q_norm.weight[64]") && q.contains("k_norm.weight[64]"), "{q}");
        } else {
            assert_eq!(q, l);
        }
    }
    assert!(qwen3.last().unwrap().contains("logits model.embed_tokens.weight"), "{:?}", qwen3.last());
}

/// A source's tensor as floats.
fn fetch(source: &dyn WeightSource, name: &str, shape: [usize; 2]) -> Vec<bf16> {
    source.fetch(&TensorSpec::new(name, shape)).unwrap().data.into_owned()
}

#[test]
fn fused_weights_stack_their_parts_and_group_heads_by_rank() {
    let config = ModelConfig::tiny_llama();
    let source = DummySource::new(&config);
    let p = "model.layers.1";
    let q = fetch(&source, &format!("{p}.self_attn.q_proj.weight"), [256, 96]);
    let k = fetch(&source, &format!("{p}.self_attn.k_proj.weight"), [128, 96]);
    let v = fetch(&source, &format!("{p}.self_attn.v_proj.weight"), [128, 96]);
    let gate = fetch(&source, &format!("{p}.mlp.gate_proj.weight"), [160, 96]);
    let up = fetch(&source, &format!("{p}.mlp.up_proj.weight"), [160, 96]);
    for ranks in [1, 2] {
        let be = Recorder { ranks, ..Recorder::default() };
        let model = load_dummy(&be, &config).model;
        let weights = be.weights.into_inner();
        let weight =
            |name: &str| weights.iter().find(|(d, _)| d.name == format!("{p}.{name}.weight")).unwrap();

        let (desc, data) = weight("self_attn.qkv_proj");
        assert_eq!((desc.kind, desc.n, desc.k, desc.experts), (LinearKind::Column, 512, 96, None));
        let mut expected = Vec::new();
        for rank in 0..ranks {
            for part in [&q, &k, &v] {
                let len = part.len() / ranks;
                expected.extend_from_slice(&part[rank * len..][..len]);
            }
        }
        assert!(*data == expected, "qkv of {ranks} ranks");

        let (desc, data) = weight("mlp.gate_up_proj");
        assert_eq!((desc.kind, desc.n, desc.k), (LinearKind::GateUp, 320, 96));
        assert!(*data == [gate.clone(), up.clone()].concat(), "gate rows, then up rows");

        let (desc, _) = weight("mlp.down_proj");
        assert_eq!((desc.kind, desc.n, desc.k), (LinearKind::Row, 96, 160));
        let layer = LayerKv::Gqa { kv_heads: 2 / ranks, head_dim: 64 };
        assert_eq!(model.kv_layout(16), KvLayout { layers: vec![layer; 2], block_size: 16 });
        assert_eq!(kv_layout(&config, ranks, 16), model.kv_layout(16));
    }
}

#[test]
fn loading_reports_progress_and_digests_independent_of_threads() {
    let config = ModelConfig::tiny_qwen3();
    let source = DummySource::new(&config);
    let expected = weights_digest(&source, tensor_specs(&config), 1).unwrap();
    for threads in [1, 2, 5] {
        let mut seen: Vec<Progress> = Vec::new();
        let options = LoadOptions { threads, ..options() };
        let loaded = load(&Recorder::default(), &config, &source, &options, &mut |p| seen.push(p)).unwrap();
        assert_eq!(loaded.weights_digest, expected, "{threads} threads");
        assert_eq!(loaded.config_digest, config.digest());
        assert!(seen.windows(2).all(|w| w[0].bytes < w[1].bytes && w[0].tensors < w[1].tensors));
        let last = seen.last().unwrap();
        assert_eq!((last.tensors, last.bytes), (last.tensors_total, last.bytes_total));
        assert_eq!(last.bytes, 2 * config.num_parameters() as u64);
    }
}

/// A source that changes, hides or fails to read one tensor of another source.
struct Faulty<'a> {
    inner: &'a DummySource,
    tensor: &'a str,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    FlipBit,
    Missing,
    Unreadable,
    Panics,
}

impl WeightSource for Faulty<'_> {
    fn describe(&self) -> String {
        "faulty".to_owned()
    }
    fn names(&self) -> Vec<String> {
        self.inner.names()
    }
    fn check(&self, spec: &TensorSpec) -> std::result::Result<(), WeightError> {
        if spec.name == self.tensor && self.fault == Fault::Missing {
            return Err(WeightError::MissingTensor { file: self.describe(), tensor: spec.name.clone() });
        }
        self.inner.check(spec)
    }
    fn read(&self, spec: &TensorSpec, out: &mut [bf16]) -> std::result::Result<(), WeightError> {
        self.inner.read(spec, out)?;
        if spec.name == self.tensor {
            match self.fault {
                Fault::FlipBit => out[0] = bf16::from_bits(out[0].to_bits() ^ 1),
                Fault::Missing => unreachable!("found missing before anything is read"),
                Fault::Panics => panic!("a bug in a source"),
                Fault::Unreadable => {
                    let problem = "unreadable".to_owned();
                    return Err(WeightError::Tensor {
                        file: self.describe(),
                        tensor: spec.name.clone(),
                        problem,
                    });
                }
            }
        }
        Ok(())
    }
}

const FAULTY: &str = "model.layers.1.self_attn.k_proj.weight";

fn load_faulty(fault: Fault) -> std::result::Result<Loaded<Recorder>, LoadError> {
    let config = ModelConfig::tiny_llama();
    let source = Faulty { inner: &DummySource::new(&config), tensor: FAULTY, fault };
    load(&Recorder::default(), &config, &source, &options(), &mut |_| {})
}

#[test]
fn one_changed_bit_changes_the_digest() {
    let config = ModelConfig::tiny_llama();
    let clean = load_dummy(&Recorder::default(), &config).weights_digest;
    assert_ne!(load_faulty(Fault::FlipBit).unwrap().weights_digest, clean);
}

#[test]
fn a_failing_source_ends_the_load_with_its_error() {
    for fault in [Fault::Missing, Fault::Unreadable] {
        let e = load_faulty(fault).err().unwrap().to_string();
        assert!(e.contains(FAULTY), "{e}");
    }
}

#[test]
#[should_panic]
fn a_panic_in_a_source_ends_the_load_as_well() {
    let _ = load_faulty(Fault::Panics);
}

#[test]
fn contradicting_options_are_refused() {
    let config = ModelConfig::tiny_llama();
    let attempt = |ranks: usize, options: LoadOptions| {
        let be = Recorder { ranks, ..Recorder::default() };
        load(&be, &config, &DummySource::new(&config), &options, &mut |_| {}).err().unwrap().to_string()
    };
    let e = attempt(1, LoadOptions { max_model_len: 1025, ..options() });
    assert!(e.contains("max_model_len = 1025: the model was made for at most 1024"), "{e}");
    let e = attempt(1, LoadOptions { max_logit_rows: 0, ..options() });
    assert!(e.contains("max_logit_rows = 0: must be at least 1"), "{e}");
    let e = attempt(4, options());
    assert!(e.contains("tensor_parallel_size = 4: the model's 2 key/value heads"), "{e}");
}
