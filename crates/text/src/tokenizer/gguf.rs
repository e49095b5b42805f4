use serde_json::json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, SplitDelimiterBehavior};

use super::pieces::{PieceStyle, Pieces, Token, TokenKind};
use super::{Parts, Tokenizer, TokenizerError, pre};
use crate::chat::{ChatTemplate, TemplateError, TemplateTokens};

/// A vocabulary as a GGUF file's metadata holds it (the keys `tokenizer.ggml.*`).
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokens`: names, by id.
    pub tokens: Vec<String>,
    /// `merges`: two names and a space between them, best first (`gpt2`).
    pub merges: Vec<String>,
    /// `scores`, by id: the merged name of the greatest score wins (`llama`).
    pub scores: Vec<f32>,
    /// `token_type`, by id; none at all means that every token is a normal one.
    pub token_types: Vec<i32>,
    /// `pre`: how text is cut into words (`gpt2`), such as `llama-bpe`.
    pub pre: Option<String>,
    /// `add_bos_token`; `None` takes the habit of the vocabulary's kind.
    pub add_bos: Option<bool>,
    /// `add_eos_token`; `None` is false.
    pub add_eos: Option<bool>,
    /// `add_space_prefix` (`llama`); `None` is true.
    pub add_space_prefix: Option<bool>,
    /// `bos_token_id`.
    pub bos_id: Option<u32>,
    /// `eos_token_id` first, then other end ids (`eot_token_id`, `eom_token_id`).
    pub eos_ids: Vec<u32>,
    /// `unknown_token_id` (`llama`).
    pub unknown_id: Option<u32>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// Bytes of a token's name. The longest in use are some hundreds of spaces; every cut of a name is looked up, at the cost of its
/// bytes, so that one of megabytes would take hours.
const MAX_NAME: usize = 4096;

/// Values of `token_type` that differ from a normal piece.
mod token_type {
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
}

pub(super) fn build(vocab: GgufVocab) -> Result<Tokenizer, TokenizerError> {
    check_lengths(&vocab)?;
    let (mut encoder, style, add_bos) = match vocab.model.as_str() {
        "gpt2" => byte_level(&vocab)?,
        "llama" => sentence_piece(&vocab)?,
        other => {
            return Err(TokenizerError::Unsupported {
                what: "tokenizer model",
                name: other.to_owned(),
                supported: "gpt2, llama",
            });
        }
    };
    let added = vocab.tokens.iter().enumerate().filter_map(|(id, name)| match kind(&vocab, id) {
        TokenKind::Piece => None,
        kind => Some(AddedToken::from(name.clone(), kind == TokenKind::Special).normalized(false)),
    });
    encoder.add_tokens(added).map_err(vocab_error)?;
    let begin = vocab.bos_id.filter(|_| vocab.add_bos.unwrap_or(add_bos));
    let end = vocab.eos_ids.first().copied().filter(|_| vocab.add_eos.unwrap_or(false));
    let surrounding = surround(&encoder, begin, end)?;
    encoder.with_post_processor(surrounding);

    let tokens = vocab.tokens.iter().enumerate().map(|(id, name)| Token {
        id: u32::try_from(id).unwrap_or(u32::MAX),
        name,
        kind: kind(&vocab, id),
    });
    let pieces = Pieces::new(tokens, style)?;
    let name_of = |id: u32| vocab.tokens.get(id as usize).cloned();
    let template_tokens = TemplateTokens {
        bos: vocab.bos_id.and_then(name_of),
        eos: vocab.eos_ids.first().copied().and_then(name_of),
        ..TemplateTokens::default()
    };
    let chat_template = match &vocab.chat_template {
        Some(source) => ChatTemplate::new(source, template_tokens.clone()),
        None => Err(TemplateError::Missing),
    };
    let mut eos = vocab.eos_ids.clone();
    eos.sort_unstable();
    eos.dedup();
    Ok(Tokenizer::new(Parts { encoder, pieces, bos: vocab.bos_id, eos, template_tokens, chat_template }))
}

fn check_lengths(vocab: &GgufVocab) -> Result<(), TokenizerError> {
    let tokens = vocab.tokens.len();
    for (name, len) in [("scores", vocab.scores.len()), ("token types", vocab.token_types.len())] {
        if len != 0 && len != tokens {
            return Err(TokenizerError::Vocab(format!("{tokens} tokens, but {len} {name}")));
        }
    }
    if let Some((id, name)) = vocab.tokens.iter().enumerate().find(|(_, name)| name.len() > MAX_NAME) {
        let len = name.len();
        return Err(TokenizerError::Vocab(format!("token {id} has {len} bytes, more than {MAX_NAME}")));
    }
    let ids = vocab.bos_id.iter().chain(&vocab.eos_ids).chain(&vocab.unknown_id);
    match ids.copied().find(|&id| id as usize >= tokens) {
        Some(id) => Err(TokenizerError::Vocab(format!("special id {id} is outside the {tokens} tokens"))),
        None => Ok(()),
    }
}

fn kind(vocab: &GgufVocab, id: usize) -> TokenKind {
    match vocab.token_types.get(id).copied() {
        Some(token_type::CONTROL | token_type::UNKNOWN) => TokenKind::Special,
        Some(token_type::USER_DEFINED) => TokenKind::Added,
        _ => TokenKind::Piece,
    }
}

type Encoder = (tokenizers::Tokenizer, PieceStyle, bool);

fn byte_level(vocab: &GgufVocab) -> Result<Encoder, TokenizerError> {
    let pre = pre::by_name(vocab.pre.as_deref().unwrap_or("gpt-2"))?;
    let ids = ids_by_name(vocab);
    let merges = merges(vocab, &ids)?;
    let model = BPE::builder()
        .vocab_and_merges(ids, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(vocab_error)?;
    let mut encoder = tokenizers::Tokenizer::new(model);
    if pre.nfc {
        encoder.with_normalizer(Some(NFC)).map_err(vocab_error)?;
    }
    let mut steps = Vec::new();
    for &pattern in pre.splits {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(vocab_error)?;
        steps.push(PreTokenizerWrapper::Split(split));
    }
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, pre.gpt2_words)));
    encoder.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
    Ok((encoder, PieceStyle::ByteLevel, pre.add_bos))
}

fn sentence_piece(vocab: &GgufVocab) -> Result<Encoder, TokenizerError> {
    if vocab.scores.is_empty() {
        return Err(TokenizerError::Vocab("a llama vocabulary needs scores".into()));
    }
    let ids = ids_by_name(vocab);
    let merges = merges_by_score(vocab, &ids);
    let mut builder = BPE::builder().vocab_and_merges(ids, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = vocab.unknown_id {
        builder = builder.unk_token(vocab.tokens[unknown as usize].clone());
    }
    let mut encoder = tokenizers::Tokenizer::new(builder.build().map_err(vocab_error)?);
    let spaced = vocab.add_space_prefix.unwrap_or(true);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if spaced {
        steps.push(Prepend::new("▁".to_owned()).into());
    }
    steps.push(Replace::new(" ", "▁").map_err(vocab_error)?.into());
    encoder.with_normalizer(Some(Normalizers::new(steps))).map_err(vocab_error)?;
    Ok((encoder, PieceStyle::SentencePiece { strips_leading_space: spaced }, true))
}

fn ids_by_name(vocab: &GgufVocab) -> Vocab {
    vocab.tokens.iter().cloned().zip(0..).collect()
}

fn merges(vocab: &GgufVocab, ids: &Vocab) -> Result<Vec<(String, String)>, TokenizerError> {
    let mut merged = String::new();
    let parse = |(index, merge): (usize, &String)| {
        let broken =
            || TokenizerError::Vocab(format!("merge {index} is {merge:?}, which is not two tokens of one"));
        // The first name may itself begin with a space.
        let border = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').ok_or_else(broken)?.0;
        let (left, right) = (&merge[..border], &merge[border + 1..]);
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        // `BPE` indexes past its buffer when the merged token does not exist.
        if [left, right, &merged].iter().all(|&name| ids.contains_key(name)) {
            Ok((left.to_owned(), right.to_owned()))
        } else {
            Err(broken())
        }
    };
    vocab.merges.iter().enumerate().map(parse).collect()
}

/// SentencePiece BPE keeps scores, not merges: two neighbours merge when their joint name is a
/// token, the greatest score first. Every cut of every token into two tokens is such a merge.
fn merges_by_score(vocab: &GgufVocab, ids: &Vocab) -> Vec<(String, String)> {
    let mut cuts: Vec<(f32, u32, u32)> = Vec::new();
    for (name, &score) in vocab.tokens.iter().zip(&vocab.scores) {
        let first = cuts.len();
        for (border, _) in name.char_indices().skip(1) {
            if let (Some(&left), Some(&right)) = (ids.get(&name[..border]), ids.get(&name[border..])) {
                cuts.push((score, left, right));
            }
        }
        cuts[first..].sort_unstable_by_key(|&(_, left, right)| (left, right));
    }
    cuts.sort_by(|a, b| b.0.total_cmp(&a.0));
    let name = |id: u32| vocab.tokens[id as usize].clone();
    cuts.into_iter().map(|(_, left, right)| (name(left), name(right))).collect()
}

/// The post-processor that puts `begin` before and `end` after a text.
pub(super) fn surround(
    encoder: &tokenizers::Tokenizer,
    begin: Option<u32>,
    end: Option<u32>,
) -> Result<Option<PostProcessorWrapper>, TokenizerError> {
    if begin.is_none() && end.is_none() {
        return Ok(None);
    }
    let mut special = serde_json::Map::new();
    let mut single = Vec::new();
    let mut mark = |id: u32| {
        let name = encoder.id_to_token(id).unwrap_or_default();
        special.insert(name.clone(), json!({ "id": name, "ids": [id], "tokens": [name] }));
        json!({ "SpecialToken": { "id": name, "type_id": 0 } })
    };
    single.extend(begin.map(&mut mark));
    single.push(json!({ "Sequence": { "id": "A", "type_id": 0 } }));
    single.extend(end.map(&mut mark));
    let pair = [single.clone(), vec![json!({ "Sequence": { "id": "B", "type_id": 1 } })]].concat();
    let template =
        json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special });
    serde_json::from_value(template).map(Some).map_err(|error| TokenizerError::Vocab(error.to_string()))
}

fn vocab_error(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Vocab(error.to_string())
}
