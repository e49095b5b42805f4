use super::plan::keep_some;
use super::*;

fn refused(text: &str) -> String {
    Transcript::parse(text).unwrap_err()
}

#[test]
fn damaged_transcripts_are_refused_in_words() {
    assert_eq!(refused(""), "holds no transcript");
    assert!(refused("not json").contains("expected"), "{}", refused("not json"));
    assert!(refused(r#"{"outputs": ["#).contains("EOF"));
    assert!(refused(r#"{"system_fingerprint": "x"}"#).contains("\"outputs\""));
    assert!(refused(r#"{"outputs": []}"#).contains("prompt_token_ids is missing"));
    assert!(refused(r#"{"outputs": [], "prompt_token_ids": []}"#).contains("prompt_token_ids is empty"));
    let short = r#"{"prompt_token_ids": [1], "outputs": [{"index": 0, "token_ids": [2, 3],
        "logprobs": [{"2": {"logprob": -1, "rank": 1}}]}]}"#;
    assert!(refused(short).contains("1 entries for 2 tokens"), "{}", refused(short));
    let other = r#"{"prompt_token_ids": [1], "outputs": [{"index": 0, "token_ids": [2],
        "logprobs": [{"5": {"logprob": -1, "rank": 1}}]}]}"#;
    assert!(refused(other).contains("an entry for token 5 where the token is 2"));
    let nobody =
        r#"{"prompt_token_ids": [1], "outputs": [{"index": 0, "token_ids": [2], "logprobs": [{}]}]}"#;
    assert!(refused(nobody).contains("without an entry"));
    assert!(refused(r#"{"choices": [{"index": 0}]}"#).contains("return_token_ids"));
    let second = r#"{"prompt_token_ids": [1], "outputs": []} {"outputs": 3}"#;
    assert!(refused(second).starts_with("transcript 2: "), "{}", refused(second));
}

#[test]
fn the_servers_forms_are_read() {
    let completion = r#"{"id": "cmpl-1", "object": "text_completion", "system_fingerprint": "f", "choices": [
        {"index": 0, "text": "x", "finish_reason": "length", "prompt_token_ids": [1, 2], "token_ids": [7], "seed": 3,
         "logprobs": {"text_offset": [0], "token_logprobs": [-0.5], "tokens": ["x"], "top_logprobs": [{"x": -0.5}]}},
        {"index": 5, "sample": 1, "prompt_token_ids": [4], "token_ids": [8, 9], "sampling": {"temperature": 0.5, "top_p": 1.0,
         "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
         "logprobs": {"token_logprobs": [null, -1.5, -2.5], "tokens": [], "top_logprobs": []}}]}"#;
    let all = Transcript::parse(completion).unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!((all[0].name.as_str(), all[0].seed), ("cmpl-1[0]", Some(3)));
    assert_eq!(all[0].samples[0].logprobs[0].logprob, -0.5);
    assert_eq!((all[1].name.as_str(), all[1].samples[0].index), ("cmpl-1[5]", 1));
    assert_eq!(all[1].sampling.as_ref().map(|s| s.temperature), Some(0.5));
    assert_eq!(all[1].prompt_logprobs, [None], "the echoed prompt's first token");
    assert_eq!(all[1].samples[0].logprobs.iter().map(|l| l.logprob).collect::<Vec<_>>(), [-1.5, -2.5]);
    let chat = r#"{"id": "chatcmpl-1", "prompt_token_ids": [1, 2], "system_fingerprint": "f", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "x"}, "token_ids": [7], "seed": 3,
         "logprobs": {"content": [{"token": "x", "logprob": -0.25, "bytes": [120], "top_logprobs": []}], "refusal": null}}]}"#;
    let chat = &Transcript::parse(chat).unwrap()[0];
    assert_eq!(chat.prompt_token_ids, [1, 2]);
    assert_eq!(chat.samples[0].logprobs[0].logprob, -0.25);
}

#[test]
fn fingerprints_say_what_can_be_derived() {
    let v = NUMERICS_VERSION;
    assert_eq!(class_of(&format!("bitfast-v{v}-hopper-0123456789abcdef")), Ok(Class::Hopper));
    assert_eq!(class_of(&format!("bitfast-v{v}-portable-0123456789abcdef")), Ok(Class::Portable));
    for (fingerprint, culprit) in [
        ("gpt".to_owned(), "none of Bitfast's"),
        ("bitfast-v999-hopper-00".to_owned(), "numerics version v999"),
        (format!("bitfast-v{v}-blackwell-00"), "class \"blackwell\""),
        (format!("bitfast-v{v}-portable-00-unconstrained"), "gave up the law"),
    ] {
        let error = class_of(&fingerprint).unwrap_err();
        assert!(error.contains(culprit), "{error}");
    }
}

#[test]
fn a_random_part_keeps_its_size_and_order() {
    for (all, count) in [(10, 3), (10, 10), (3, 10), (1000, 64)] {
        let targets = || (1..=all).map(|position| Target { position, recorded: None }).collect::<Vec<_>>();
        let draw = |seed| {
            let mut some = targets();
            keep_some(&mut some, count, seed);
            some.iter().map(|t| t.position).collect::<Vec<_>>()
        };
        assert_eq!(draw(1).len(), count.min(all));
        assert!(draw(1).is_sorted());
        assert_eq!(draw(1), draw(1));
        assert!(count >= all || draw(1) != draw(2), "{all} {count}");
    }
}
