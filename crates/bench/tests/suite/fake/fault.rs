//! Ways to break the law, each of its own kind, and what servers of others lack.

/// What makes a row's bits depend on more than its own tokens. Noise is one unit in the last place or a little more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Any neighbour does.
    Load,
    /// There is a kernel for two rows with a short context.
    TwoRows,
    /// There is a kernel for 9 to 16 rows, and its odd rows differ.
    OddRowsOf16,
    /// A prompt that was cut gives other keys and values.
    Chunks,
    /// Long prefixes from the cache are read with less precision.
    Cached,
    /// When a client leaves, the rows behind its own move up.
    Leaving,
    /// One random generator for the batch.
    SharedDraws,
    /// Another model under the same name.
    OtherWeights,
}

/// What a server does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// Parameters that are not OpenAI's are refused.
    Extras,
    /// Log probabilities are never told.
    Logprobs,
    /// Neither `echo` nor `prompt_logprobs`.
    Scoring,
    /// `echo` alone.
    Echo,
    /// One prompt a request.
    Lists,
    Streams,
    Seeds,
    /// Usage does not tell cached tokens.
    CachedTokens,
    /// vLLM's and SGLang's routes that empty the prefix cache.
    Reset,
    /// No tokenizer.
    Texts,
}
