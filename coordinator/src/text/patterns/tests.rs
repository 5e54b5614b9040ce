//! The library's own results, and an end for what has none.

use serde_json::json;
use tokenizers::{OffsetReferential, OffsetType};

use super::super::TextError;
use super::super::guard::Guard;
use super::*;

/// Hard enough that no automaton does it: each block of `x` doubles the work of the one before.
pub(in crate::text) const EXPONENTIAL: &str = "(?:(?:x+x+)+(?!z)y|.)";

const TEXTS: [&str; 6] = ["", " ", "a b  c", "xx yy\n\nzz'", "\u{e9}e\u{301} x\u{1f642}x", "''a''"];

fn splits(part: &impl PreTokenizer, text: &str) -> Vec<(String, (usize, usize))> {
    let mut text = PreTokenizedString::from(text);
    part.pre_tokenize(&mut text).unwrap();
    let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
    splits.into_iter().map(|(part, offsets, _)| (part.to_owned(), offsets)).collect()
}

#[test]
fn parts_do_what_the_librarys_do() {
    let split = |pattern: Value, behavior: &str, invert: bool| json!({ "type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert });
    for pattern in ["\\s+(?!\\S)|\\s+", "(?i:'s|'t)| ?\\w+", "x*"] {
        for behavior in
            ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
        {
            for invert in [false, true] {
                let one = split(json!({ "Regex": pattern }), behavior, invert);
                let two = json!({ "type": "Sequence",
                    "pretokenizers": [one, split(json!({ "String": "e" }), behavior, false)] });
                for value in [one, two] {
                    let own = TimedPreTokenizer::from_json(&value).unwrap();
                    let library = PreTokenizerWrapper::deserialize(&value).unwrap();
                    for text in TEXTS {
                        assert_eq!(splits(&own, text), splits(&library, text), "{value} {text:?}");
                    }
                }
            }
        }
        let replace = json!({ "type": "Replace", "pattern": { "Regex": pattern }, "content": "_" });
        let value = json!({ "type": "Sequence", "normalizers": [{ "type": "NFC" }, replace] });
        let own = TimedNormalizer::from_json(&value).unwrap();
        let library = NormalizerWrapper::deserialize(&value).unwrap();
        for text in TEXTS {
            let (mut a, mut b) = (NormalizedString::from(text), NormalizedString::from(text));
            own.normalize(&mut a).unwrap();
            library.normalize(&mut b).unwrap();
            assert_eq!(a, b, "{value} {text:?}");
        }
    }
}

#[test]
fn a_pattern_ends_when_its_time_is_over() {
    let pattern = json!({ "Regex": EXPONENTIAL });
    let split =
        json!({ "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false });
    let split = TimedPreTokenizer::from_json(&split).unwrap();
    let replace = json!({ "type": "Replace", "pattern": pattern, "content": "" });
    let replace = TimedNormalizer::from_json(&replace).unwrap();
    // Minutes, in matches of milliseconds.
    let slow = ("x".repeat(16) + " ").repeat(50_000);
    let time = Duration::from_millis(20);
    let began = Instant::now();
    let pattern_error = |error: LibraryError| *error.downcast::<PatternError>().unwrap();
    let error = within(time, || split.pre_tokenize(&mut slow.as_str().into())).unwrap();
    let error = pattern_error(error.unwrap_err());
    assert!(matches!(error, PatternError::TimedOut { part: "pre-tokenizer", limit_ms: 20 }));
    let error = within(time, || replace.normalize(&mut slow.as_str().into())).unwrap_err();
    let error = pattern_error(error);
    assert!(matches!(error, PatternError::TimedOut { part: "normalizer", .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // One match of too many steps: the library's own would take the rest of the text as one word.
    let error = split.pre_tokenize(&mut "x".repeat(40).as_str().into()).unwrap_err();
    let error = pattern_error(error);
    assert!(matches!(error, PatternError::GaveUp { .. }), "{error}");
    // The limit was that of the work alone.
    split.pre_tokenize(&mut "xx y".into()).unwrap();
}

/// The library drops what a normalizer fails with, and tokenises the text as it is.
#[test]
fn no_text_goes_on_that_a_normalizer_failed_on() {
    let replace = json!({ "type": "Replace", "pattern": { "Regex": EXPONENTIAL }, "content": "a" });
    let text = super::super::tests::text_of_json(|json| json["normalizer"] = replace.clone());
    let tokenizer = text.tokenizer.as_ref().unwrap();
    let (bad, good) = ("x".repeat(40), "a b");
    let gave_up = |error: TextError| {
        matches!(error, TextError::Pattern(PatternError::GaveUp { part: "normalizer", .. }))
    };
    let check = || {
        assert!(gave_up(tokenizer.encode_plain(&bad).unwrap_err()));
        assert!(gave_up(tokenizer.encode_with_offsets(&bad).unwrap_err()));
        assert!(gave_up(tokenizer.encode_rendered(&bad, &Guard::default()).unwrap_err()));
        // What failed before is no fault of the next text.
        tokenizer.encode_plain(good).unwrap();
    };
    std::thread::scope(|threads| {
        for _ in 0..4 {
            threads.spawn(check);
        }
    });
    // Work within work has failures of its own, and takes none away.
    let normalizer = TimedNormalizer::from_json(&replace).unwrap();
    let fails = || normalizer.normalize(&mut bad.as_str().into()).unwrap_err();
    let time = Duration::from_secs(60);
    let outer = within(time, || {
        assert!(within(time, || ()).is_ok());
        assert!(within(time, fails).is_err());
        assert!(within(time, || ()).is_ok());
    });
    assert!(outer.is_ok());
    let outer = within(time, || {
        fails();
        assert!(within(time, || ()).is_ok());
    });
    assert!(outer.unwrap_err().is::<PatternError>());
    // Outside of it the error is the caller's.
    assert!(fails().is::<PatternError>());
}
