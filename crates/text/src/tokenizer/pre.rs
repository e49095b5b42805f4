use super::TokenizerError;

/// How text is cut into words before merges apply, and what goes with it.
pub(super) struct PreTokenizer {
    /// Each cuts the pieces that the one before left.
    pub(super) splits: &'static [&'static str],
    /// GPT-2's own word pattern comes last.
    pub(super) gpt2_words: bool,
    /// A word that is a token is not built by merges.
    pub(super) ignore_merges: bool,
    /// What the metadata's silence on `add_bos_token` means.
    pub(super) add_bos: bool,
    /// The vocabulary was trained on text in NFC.
    pub(super) nfc: bool,
}

const PLAIN: PreTokenizer =
    PreTokenizer { splits: &[], gpt2_words: false, ignore_merges: false, add_bos: false, nfc: false };

const SUPPORTED: &str = "gpt-2, smollm, starcoder, refact, command-r, llama-bpe, llama3, qwen2, deepseek-r1-qwen, \
                         deepseek-v3 and their aliases";

/// The pre-tokenizer that GGUF calls `name`. The patterns are those of the models' own
/// `tokenizer.json`; the names are the ones that llama.cpp's converter writes.
pub(super) fn by_name(name: &str) -> Result<PreTokenizer, TokenizerError> {
    Ok(match name {
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling" | "exaone4" => {
            PreTokenizer { gpt2_words: true, ..PLAIN }
        }
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            PreTokenizer { splits: &[DIGIT], gpt2_words: true, ..PLAIN }
        }
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2" => {
            PreTokenizer { splits: &[LLAMA3], ignore_merges: true, add_bos: true, ..PLAIN }
        }
        "dbrx" | "smaug-bpe" => PreTokenizer { splits: &[LLAMA3], ..PLAIN },
        "qwen2" | "deepseek-r1-qwen" | "megrez" => PreTokenizer { splits: &[QWEN2], nfc: true, ..PLAIN },
        "stablelm2" | "hunyuan" => PreTokenizer { splits: &[QWEN2], ..PLAIN },
        "deepseek-v3" | "hunyuan-dense" => PreTokenizer { splits: &DEEPSEEK3, ..PLAIN },
        other => {
            return Err(TokenizerError::Unsupported {
                what: "pre-tokenizer",
                name: other.to_owned(),
                supported: SUPPORTED,
            });
        }
    })
}

pub(super) const DIGIT: &str = r"\p{N}";
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];
