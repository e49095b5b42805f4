mod cut;
mod error;
mod folder;
mod gguf;
mod pieces;
mod pre;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use crate::chat::{ChatTemplate, TemplateError, TemplateTokens};
use crate::detokenizer::{Detokenizer, Placement, SpecialTokens};
use cut::Cuts;
pub use error::TokenizerError;
pub use gguf::GgufVocab;
pub(crate) use pieces::Pieces;

/// A model's vocabulary: text to ids and back, its special ids and its chat template. Cheap to
/// clone, shared between threads.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

/// What encoding up to a limit gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// All ids of the text.
    Ids(Vec<u32>),
    /// It has at least so many.
    TooMany(usize),
}

struct Shared {
    encoder: tokenizers::Tokenizer,
    /// Where long texts may be cut.
    cuts: Option<Cuts>,
    pieces: Arc<Pieces>,
    bos: Option<u32>,
    eos: Vec<u32>,
    template_tokens: TemplateTokens,
    chat_template: Result<ChatTemplate, TemplateError>,
}

/// What a tokenizer is made from.
struct Parts {
    encoder: tokenizers::Tokenizer,
    pieces: Pieces,
    bos: Option<u32>,
    eos: Vec<u32>,
    template_tokens: TemplateTokens,
    chat_template: Result<ChatTemplate, TemplateError>,
}

impl Tokenizer {
    fn new(parts: Parts) -> Self {
        let Parts { encoder, pieces, bos, eos, template_tokens, chat_template } = parts;
        let cuts = Cuts::of(&encoder);
        let pieces = Arc::new(pieces);
        Self { shared: Arc::new(Shared { encoder, cuts, pieces, bos, eos, template_tokens, chat_template }) }
    }

    /// Reads a Hugging Face folder: `tokenizer.json`, and where they exist `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json` (more end tokens) and
    /// `chat_template.jinja`.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        folder::load(dir)
    }

    /// Builds the tokenizer that a GGUF file's metadata describes.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self, TokenizerError> {
        gguf::build(vocab)
    }

    /// Ids of `text`. Special tokens written out in the text become their ids. `add_special` adds
    /// what the model wants around a text (often a begin token); a rendered chat template has it
    /// already.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        match self.encode_until(text, add_special, usize::MAX)? {
            Encoded::Ids(ids) => Ok(ids),
            Encoded::TooMany(_) => unreachable!("no text has so many ids"),
        }
    }

    /// [`encode`](Self::encode), which stops when more than `limit` ids are known and some of the text is left. Texts that cannot be
    /// cut have ids beyond the limit.
    pub fn encode_until(
        &self,
        text: &str,
        add_special: bool,
        limit: usize,
    ) -> Result<Encoded, TokenizerError> {
        if let Some(start) = endless_space(text) {
            let limit = MAX_WHITE_SPACE;
            return Err(TokenizerError::Encode(format!(
                "more than {limit} white-space characters from byte {start}"
            )));
        }
        match &self.shared.cuts {
            Some(cuts) if text.len() > PART_BYTES => {
                self.encode_parts(cuts, text, PART_BYTES, add_special, limit)
            }
            _ => self.encode_whole(text, add_special).map(Encoded::Ids),
        }
    }

    /// As [`encode_whole`](Self::encode_whole), part by part, while there are no more than `limit` ids.
    fn encode_parts(
        &self,
        cuts: &Cuts,
        text: &str,
        least: usize,
        add_special: bool,
        limit: usize,
    ) -> Result<Encoded, TokenizerError> {
        let around = |ids: &[u32]| if add_special { ids.to_vec() } else { Vec::new() };
        let mut ids = around(&cuts.before);
        for part in cut::parts(text, least) {
            if ids.len() > limit {
                return Ok(Encoded::TooMany(ids.len()));
            }
            ids.extend(self.encode_whole(part, false)?);
        }
        ids.extend(around(&cuts.after));
        Ok(Encoded::Ids(ids))
    }

    fn encode_whole(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        // Rules of a tokenizer.json that contradict each other (a template that names a token which is not there) panic inside
        // `tokenizers`, some only on some texts.
        let encoding = catch_unwind(AssertUnwindSafe(|| self.shared.encoder.encode_fast(text, add_special)));
        let encoding = encoding
            .map_err(|_| TokenizerError::Encode("the tokenizer's rules contradict each other".into()))?
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, taken as a whole text. Bytes that are not UTF-8 become U+FFFD; ids outside
    /// the vocabulary leave nothing.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> String {
        let mut detokenizer = self.detokenizer(Placement::Start, special);
        let mut text = String::new();
        for &id in ids {
            detokenizer.push_into(id, &mut text);
        }
        detokenizer.finish_into(&mut text);
        text
    }

    /// The state that turns one sequence's ids into text as they come.
    pub fn detokenizer(&self, placement: Placement, special: SpecialTokens) -> Detokenizer {
        Detokenizer::new(self.shared.pieces.clone(), placement, special)
    }

    /// One more than the greatest id. The model's own vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.shared.pieces.len()
    }

    /// The begin-of-text id.
    pub fn bos(&self) -> Option<u32> {
        self.shared.bos
    }

    /// The ids that end an answer, ascending.
    pub fn eos(&self) -> &[u32] {
        &self.shared.eos
    }

    /// Whether an id is a special token, which [`SpecialTokens::Skip`] leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.pieces.is_special(id)
    }

    /// The bytes an id stands for; not always valid UTF-8 alone. `None` outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.shared.pieces.bytes(id)
    }

    /// The id of a token by its name in the vocabulary, such as `<|im_end|>`.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.shared.encoder.token_to_id(name)
    }

    /// The tokens that the model's chat template can name; for a template from elsewhere.
    pub fn template_tokens(&self) -> &TemplateTokens {
        &self.shared.template_tokens
    }

    /// The model's chat template, or why there is none.
    pub fn chat_template(&self) -> Result<&ChatTemplate, &TemplateError> {
        self.shared.chat_template.as_ref()
    }
}

/// Longer texts are encoded in parts of about this size, where that gives the same ids.
const PART_BYTES: usize = 64 << 10;

/// Words are cut by patterns with `\s+(?!\S)`, which backtracks over white space. From a million
/// steps on the engine stops matching without a word, and the ids would be others.
const MAX_WHITE_SPACE: usize = 500_000;

/// Where a run of more than [`MAX_WHITE_SPACE`] characters begins.
fn endless_space(text: &str) -> Option<usize> {
    if text.len() <= MAX_WHITE_SPACE {
        return None;
    }
    let (mut start, mut run) = (0, 0);
    for (at, character) in text.char_indices() {
        if !character.is_whitespace() {
            run = 0;
            continue;
        }
        if run == 0 {
            start = at;
        }
        run += 1;
        if run > MAX_WHITE_SPACE {
            return Some(start);
        }
    }
    None
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos())
            .field("eos", &self.eos())
            .finish_non_exhaustive()
    }
}
