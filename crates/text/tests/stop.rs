//! Stop strings, against a naive search of the whole text.

use bitfast_text::{InvalidStop, StopOutcome, StopStrings, StopText};
use proptest::prelude::*;

/// What `parts` come to: the text released, and the stop string that ended it.
fn run(stops: &[&str], keep: StopText, parts: &[&str]) -> (String, Option<String>) {
    let mut matcher = StopStrings::new(stops.iter().copied(), keep).unwrap().matcher();
    let mut text = String::new();
    for part in parts {
        match matcher.push(part) {
            StopOutcome::Text(released) => text.push_str(&released),
            StopOutcome::Stopped { text: released, stop } => {
                text.push_str(&released);
                return (text, Some(stop));
            }
        }
    }
    text.push_str(&matcher.finish());
    (text, None)
}

/// The first end of any stop string; there, the longest.
fn naive(stops: &[&str], keep: StopText, text: &str) -> (String, Option<String>) {
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let found = stops.iter().filter(|stop| text[..end].ends_with(**stop)).max_by_key(|stop| stop.len());
        if let Some(stop) = found {
            let cut = if keep == StopText::Keep { end } else { end - stop.len() };
            return (text[..cut].to_owned(), Some((*stop).to_owned()));
        }
    }
    (text.to_owned(), None)
}

#[test]
fn a_stop_string_over_a_border_of_tokens() {
    assert_eq!(run(&["END"], StopText::Drop, &["abc E", "N", "D tail"]), ("abc ".into(), Some("END".into())));
    assert_eq!(
        run(&["END"], StopText::Keep, &["abc E", "N", "D tail"]),
        ("abc END".into(), Some("END".into()))
    );
    assert_eq!(run(&["END"], StopText::Drop, &["abc E", "N", "d"]), ("abc ENd".into(), None));
    assert_eq!(run(&["END"], StopText::Drop, &["EN"]), ("EN".into(), None));
    assert_eq!(run(&[], StopText::Drop, &["a", "b"]), ("ab".into(), None));
}

#[test]
fn the_first_to_be_complete_wins_and_of_those_the_longest() {
    assert_eq!(run(&["abcd", "bc"], StopText::Drop, &["xabcd"]), ("xa".into(), Some("bc".into())));
    assert_eq!(run(&["bc", "abc"], StopText::Drop, &["xabcd"]), ("x".into(), Some("abc".into())));
}

#[test]
fn text_is_held_no_longer_than_needed() {
    let mut matcher = StopStrings::new(["\n\nUser:"], StopText::Drop).unwrap().matcher();
    assert_eq!(matcher.push("Hi"), StopOutcome::Text("Hi".into()));
    assert_eq!(matcher.push("\n"), StopOutcome::Text("".into()));
    assert_eq!(matcher.push("\n\nUse"), StopOutcome::Text("\n".into()));
    assert_eq!(matcher.push("d"), StopOutcome::Text("\n\nUsed".into()));
    assert_eq!(matcher.finish(), "");
}

#[test]
fn a_stop_string_that_overlaps_itself() {
    assert_eq!(run(&["aab"], StopText::Drop, &["aa", "a", "ab"]), ("aa".into(), Some("aab".into())));
    assert_eq!(run(&["ababc"], StopText::Drop, &["abab", "abc"]), ("ab".into(), Some("ababc".into())));
}

#[test]
fn characters_of_several_bytes() {
    assert_eq!(run(&["é🦙"], StopText::Drop, &["caf", "é", "🦙!"]), ("caf".into(), Some("é🦙".into())));
    // Same first bytes, another character.
    assert_eq!(run(&["é"], StopText::Drop, &["è", "ê"]), ("èê".into(), None));
}

#[test]
fn what_cannot_be_searched_for_is_refused() {
    let new = |stops: Vec<String>| StopStrings::new(stops, StopText::Drop).map(drop);
    assert_eq!(new(vec!["a".into(), String::new()]), Err(InvalidStop::Empty));
    assert_eq!(new(vec!["a".repeat(4096); 256]), Ok(()));
    assert_eq!(new(vec!["a".repeat(4097)]), Err(InvalidStop::TooLong { bytes: 4097 }));
    assert_eq!(new(vec!["a".into(); 257]), Err(InvalidStop::TooMany));
}

#[test]
fn a_stop_string_may_begin_in_text_that_none_may_end() {
    let mut matcher = StopStrings::new(["aba", "xy"], StopText::Drop).unwrap().matcher();
    // Complete, which does not count; its last letter may begin the next one.
    assert_eq!(matcher.pass("xy aba"), "xy ab");
    let stop = "aba".to_string();
    assert_eq!(matcher.push("ba!"), StopOutcome::Stopped { text: String::new(), stop });
    assert_eq!(matcher.pass("abx"), "ab");
    assert_eq!(matcher.pass("y"), "xy");
    assert_eq!(matcher.push("y"), StopOutcome::Text("y".into()));
    assert_eq!(matcher.finish(), "");
}

/// The control: a search of each part alone misses a border, so the law below can fail.
#[test]
fn searching_parts_alone_misses_borders() {
    let parts = ["ab", "cd"];
    assert!(parts.iter().all(|part| !part.contains("bc")));
    assert_eq!(run(&["bc"], StopText::Drop, &parts), ("a".into(), Some("bc".into())));
}

/// Few characters, so that matches and near misses are common; of one to four bytes.
fn letters() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!['a', 'b', 'é', 'è', '🦙', '🦚']), 0..6)
        .prop_map(|letters| letters.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn any_cut_equals_a_search_of_the_whole_text(
        parts in prop::collection::vec(letters(), 0..10),
        stops in prop::collection::vec(letters().prop_filter("not empty", |stop| !stop.is_empty()), 0..4),
        keep in prop::sample::select(vec![StopText::Drop, StopText::Keep]),
    ) {
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        prop_assert_eq!(run(&stops, keep, &parts), naive(&stops, keep, &parts.concat()));
    }

    /// Only ends behind the first `passed` parts count.
    #[test]
    fn text_that_is_passed_ends_nothing_and_loses_nothing(
        parts in prop::collection::vec(letters(), 0..10),
        passed in 0..10usize,
        stops in prop::collection::vec(letters().prop_filter("not empty", |stop| !stop.is_empty()), 0..4),
    ) {
        let mut matcher = StopStrings::new(stops.clone(), StopText::Keep).unwrap().matcher();
        let text = parts.concat();
        let (free, searched) = parts.split_at(passed.min(parts.len()));
        let mut got: String = free.iter().map(|part| matcher.pass(part)).collect();
        let outcome = matcher.push(&searched.concat());
        let from = free.concat().len();
        let ends = (from + 1..=text.len()).filter(|&end| text.is_char_boundary(end));
        let end = ends.filter(|&end| stops.iter().any(|stop| text[..end].ends_with(stop.as_str()))).min();
        match outcome {
            StopOutcome::Text(released) => {
                got.push_str(&(released + &matcher.finish()));
                prop_assert_eq!((got.as_str(), None), (text.as_str(), end));
            }
            StopOutcome::Stopped { text: released, .. } => {
                got.push_str(&released);
                prop_assert_eq!((got.as_str(), Some(got.len())), (&text[..got.len()], end));
            }
        }
    }
}
