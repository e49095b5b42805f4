use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::ModelWrapper;

use super::gguf::surround;
use super::pieces::{PieceStyle, Pieces, Token, TokenKind};
use super::{Parts, Tokenizer, TokenizerError};
use crate::chat::{ChatTemplate, TemplateError, TemplateTokens};

pub(super) fn load(dir: &Path) -> Result<Tokenizer, TokenizerError> {
    let mut encoder = read_encoder(&dir.join("tokenizer.json"))?;
    let mut config = read_object(dir, "tokenizer_config.json")?.unwrap_or_default();
    for (key, value) in read_object(dir, "special_tokens_map.json")?.unwrap_or_default() {
        // The config wins; where it says null, the map speaks.
        if config.get(&key).is_none_or(Value::is_null) {
            config.insert(key, value);
        }
    }
    let template_tokens = template_tokens(&config);
    let id_of = |name: &Option<String>| name.as_deref().and_then(|name| encoder.token_to_id(name));
    let (bos, first_eos) = (id_of(&template_tokens.bos), id_of(&template_tokens.eos));
    if let Some((begin, end)) = class_surrounds(&config) {
        let template = surround(&encoder, bos.filter(|_| begin), first_eos.filter(|_| end))?;
        encoder.with_post_processor(template);
    }
    let mut eos: Vec<u32> = first_eos.into_iter().chain(generation_eos(dir)?).collect();
    eos.sort_unstable();
    eos.dedup();
    let pieces = pieces(&encoder, &dir.join("tokenizer.json"))?;
    let chat_template = chat_template(dir, &config, template_tokens.clone())?;
    Ok(Tokenizer::new(Parts { encoder, pieces, bos, eos, template_tokens, chat_template }))
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    std::fs::read(path).map_err(|source| TokenizerError::Read { path: path.to_owned(), source })
}

/// `None` when the file does not exist.
fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match read(path) {
        Err(TokenizerError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn malformed(path: &Path, message: impl ToString) -> TokenizerError {
    TokenizerError::Malformed { path: path.to_owned(), message: message.to_string() }
}

fn read_object(dir: &Path, name: &str) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let path = dir.join(name);
    let Some(bytes) = read_optional(&path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| malformed(&path, error))
}

fn read_encoder(path: &Path) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let bytes = read(path)?;
    // A merge that names a token longer than any in the vocabulary panics inside `tokenizers`.
    let parsed = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(&bytes)));
    let mut encoder = parsed
        .map_err(|_| malformed(path, "the merges contradict the vocabulary"))?
        .map_err(|error| malformed(path, error))?;
    encoder.with_truncation(None).map_err(|error| malformed(path, error))?;
    encoder.with_padding(None);
    if let ModelWrapper::BPE(bpe) = encoder.get_model()
        && bpe.dropout.is_some()
    {
        // Merges left out at random are for training: ids are a function of the text.
        let mut whole = bpe.clone();
        whole.dropout = None;
        encoder.with_model(whole);
    }
    Ok(encoder)
}

fn pieces(encoder: &tokenizers::Tokenizer, path: &Path) -> Result<Pieces, TokenizerError> {
    let vocab = encoder.get_vocab(false);
    let added = encoder.get_added_tokens_decoder();
    // The order of both maps does not matter: ids are distinct within each, and added ones go last.
    let plain = vocab.iter().map(|(name, &id)| Token { id, name, kind: TokenKind::Piece });
    let marked = added.iter().map(|(&id, token)| Token {
        id,
        name: &token.content,
        kind: if token.special { TokenKind::Special } else { TokenKind::Added },
    });
    Pieces::new(plain.chain(marked), piece_style(encoder, path)?)
}

/// Reads the decoder's description, which is the only public sight of its settings.
fn piece_style(encoder: &tokenizers::Tokenizer, path: &Path) -> Result<PieceStyle, TokenizerError> {
    let decoder = serde_json::to_value(encoder.get_decoder()).map_err(|error| malformed(path, error))?;
    let steps = match decoder["decoders"].as_array() {
        Some(steps) => steps.as_slice(),
        None => std::slice::from_ref(&decoder),
    };
    let kind = |step: &Value| step["type"].as_str().unwrap_or("none").to_owned();
    let kinds: Vec<String> = steps.iter().map(kind).collect();
    let names: Vec<&str> = kinds.iter().map(String::as_str).collect();
    let unspaces = |step: &Value| step["pattern"]["String"] == "▁" && step["content"] == " ";
    match names.as_slice() {
        ["ByteLevel"] => Ok(PieceStyle::ByteLevel),
        ["Replace", "ByteFallback", "Fuse"] if unspaces(&steps[0]) => {
            Ok(PieceStyle::SentencePiece { strips_leading_space: false })
        }
        ["Replace", "ByteFallback", "Fuse", "Strip"] if unspaces(&steps[0]) => {
            Ok(PieceStyle::SentencePiece { strips_leading_space: steps[3]["start"] == 1 })
        }
        ["Metaspace"] => {
            Ok(PieceStyle::SentencePiece { strips_leading_space: steps[0]["prepend_scheme"] != "never" })
        }
        other => Err(TokenizerError::Unsupported {
            what: "decoder",
            name: other.join(" + "),
            supported: "ByteLevel, Metaspace, Replace + ByteFallback + Fuse (+ Strip)",
        }),
    }
}

/// A token's name: a string, or an object with `content`.
fn token_name(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

fn template_tokens(config: &Map<String, Value>) -> TemplateTokens {
    let name = |key: &str| config.get(key).and_then(token_name);
    let others = ["unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
    TemplateTokens {
        bos: name("bos_token"),
        eos: name("eos_token"),
        others: others
            .iter()
            .filter_map(|&key| Some((key.to_owned(), name(key)?)))
            .collect::<BTreeMap<_, _>>(),
    }
}

/// Whether begin and end tokens surround a text, for the classes whose config decides it and not
/// `tokenizer.json` (Llama, CodeLlama and Gemma, when they say so).
fn class_surrounds(config: &Map<String, Value>) -> Option<(bool, bool)> {
    let class = config.get("tokenizer_class")?.as_str()?;
    if !["Llama", "CodeLlama", "Gemma"].iter().any(|family| class.starts_with(family)) {
        return None;
    }
    let begin = config.get("add_bos_token")?.as_bool()?;
    let end = config.get("add_eos_token").and_then(Value::as_bool).unwrap_or(false);
    Some((begin, end))
}

/// `eos_token_id` of `generation_config.json`: one id or several.
fn generation_eos(dir: &Path) -> Result<Vec<u32>, TokenizerError> {
    let config = read_object(dir, "generation_config.json")?.unwrap_or_default();
    let ids = match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
        None => &[],
    };
    Ok(ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect())
}

/// The outer error is an unreadable file; the inner one a template that does not compile, which
/// only chat needs to know.
fn chat_template(
    dir: &Path,
    config: &Map<String, Value>,
    tokens: TemplateTokens,
) -> Result<Result<ChatTemplate, TemplateError>, TokenizerError> {
    let path = dir.join("chat_template.jinja");
    let source = match read_optional(&path)? {
        Some(bytes) => Some(String::from_utf8(bytes).map_err(|error| malformed(&path, error))?),
        None => config.get("chat_template").and_then(template_source),
    };
    Ok(source.ok_or(TemplateError::Missing).and_then(|source| ChatTemplate::new(&source, tokens)))
}

/// One template, or the one called `default` of several.
fn template_source(value: &Value) -> Option<String> {
    let named = || value.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named).map(str::to_owned)
}
