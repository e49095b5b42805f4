use super::TokenizerError;

/// Each id's bytes, and whether it is special.
#[derive(Debug)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// Per id where its bytes end; `None`: the id does not exist.
    spans: Vec<Option<Span>>,
    strips_leading_space: bool,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u32,
    end: u32,
    special: bool,
}

/// How a vocabulary writes bytes into the names of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceStyle {
    /// GPT-2: every byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` is a byte.
    SentencePiece {
        /// Whether decoding takes one leading space off a text.
        strips_leading_space: bool,
    },
}

/// One token of a vocabulary.
pub(super) struct Token<'a> {
    pub(super) id: u32,
    pub(super) name: &'a str,
    pub(super) kind: TokenKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Written in the vocabulary's style.
    Piece,
    /// Its name is its text, and it counts as text.
    Added,
    /// Its name is its text, and it can be skipped.
    Special,
}

/// More ids than this are a broken file: they would ask for the memory that they name.
const MAX_VOCAB: usize = 1 << 22;

impl Pieces {
    /// From tokens in any order; a later token of the same id replaces an earlier one.
    pub(super) fn new<'a>(
        tokens: impl IntoIterator<Item = Token<'a>>,
        style: PieceStyle,
    ) -> Result<Self, TokenizerError> {
        let unmap = byte_level_table();
        let strips_leading_space = style == PieceStyle::SentencePiece { strips_leading_space: true };
        let mut pieces = Self { bytes: Vec::new(), spans: Vec::new(), strips_leading_space };
        for token in tokens {
            let start = pieces.bytes.len();
            match (token.kind, style) {
                (TokenKind::Piece, PieceStyle::ByteLevel) => {
                    push_byte_level(&mut pieces.bytes, token.name, &unmap)
                }
                (TokenKind::Piece, PieceStyle::SentencePiece { .. }) => {
                    push_sentence_piece(&mut pieces.bytes, token.name)
                }
                (TokenKind::Added | TokenKind::Special, _) => pieces.bytes.extend(token.name.as_bytes()),
            }
            let (Ok(start), Ok(end)) = (u32::try_from(start), u32::try_from(pieces.bytes.len())) else {
                return Err(TokenizerError::Vocab("the tokens' names exceed 4 GiB".into()));
            };
            let index = token.id as usize;
            if index >= MAX_VOCAB {
                return Err(TokenizerError::Vocab(format!(
                    "token {:?} has id {index}, over {MAX_VOCAB}",
                    token.name
                )));
            }
            if index >= pieces.spans.len() {
                pieces.spans.resize(index + 1, None);
            }
            pieces.spans[index] = Some(Span { start, end, special: token.kind == TokenKind::Special });
        }
        Ok(pieces)
    }

    pub(crate) fn len(&self) -> usize {
        self.spans.len()
    }

    pub(crate) fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.span(id).map(|span| &self.bytes[span.start as usize..span.end as usize])
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.span(id).is_some_and(|span| span.special)
    }

    pub(crate) fn strips_leading_space(&self) -> bool {
        self.strips_leading_space
    }

    fn span(&self, id: u32) -> Option<Span> {
        *self.spans.get(id as usize)?
    }
}

/// Characters below this may stand for a byte.
const BYTE_LEVEL_CHARS: usize = 256 + 68;

/// GPT-2's table (Radford et al. 2019, `bytes_to_unicode`): the printable Latin-1 bytes are
/// themselves, the 68 others follow from U+0100 in order of their value.
fn byte_level_table() -> [Option<u8>; BYTE_LEVEL_CHARS] {
    let mut table = [None; BYTE_LEVEL_CHARS];
    let mut next = 256;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
}

fn push_byte_level(bytes: &mut Vec<u8>, name: &str, table: &[Option<u8>; BYTE_LEVEL_CHARS]) {
    let start = bytes.len();
    for character in name.chars() {
        match table.get(character as usize) {
            Some(Some(byte)) => bytes.push(*byte),
            // Not written in the byte alphabet: the name is the text.
            _ => {
                bytes.truncate(start);
                bytes.extend(name.as_bytes());
                return;
            }
        }
    }
}

fn push_sentence_piece(bytes: &mut Vec<u8>, name: &str) {
    if let Some(byte) = byte_piece(name) {
        bytes.push(byte);
        return;
    }
    let mut buffer = [0; 4];
    for character in name.chars() {
        match character {
            '▁' => bytes.push(b' '),
            other => bytes.extend(other.encode_utf8(&mut buffer).as_bytes()),
        }
    }
}

/// The byte of a piece such as `<0x0A>`.
fn byte_piece(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}
