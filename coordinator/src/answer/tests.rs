//! Tokens in, events out, with the small tokenizer of the text's tests.

use super::*;
use crate::driver::testing::{Feed, handle, tokens};
use crate::driver::{Command, MAX_TOKENS_BEHIND};
use crate::scheduler::{EmissionEvent, SequenceError};
use crate::text::tests::text_with;
use proto::ids::NumericsClass;
use tokio::sync::mpsc;

struct Bench {
    feed: Feed,
    answer: Answer,
    commands: mpsc::Receiver<Command>,
    next_index: u32,
}

/// The tokens of a text, one for each byte or merge, without BOS.
fn ids(text: &str) -> Vec<u32> {
    text_with("").encode(&proto::generate::Prompt::Text(text.into())).unwrap().split_off(1)
}

fn bench(change: impl FnOnce(&mut AnswerParts)) -> Bench {
    let (driver, commands) = handle();
    let mut parts = AnswerParts {
        text: Arc::new(text_with("")),
        compute: Compute::new(),
        driver,
        model: "small".into(),
        request_id: "r".into(),
        seed: 7,
        prompt: [0, 5].into(),
        received: Vec::new(),
        stop: Vec::new(),
        include_stop: false,
        stop_tokens: vec![2],
        min_tokens: 0,
        logprobs: false,
        score_prompt: false,
        span: Span::none(),
    };
    change(&mut parts);
    let next_index = parts.received.len() as u32;
    let mut answer = Answer::new(parts);
    let (feed, tokens) = tokens();
    let class = NumericsClass([1; 32]);
    answer.admit(Admitted { class, max_tokens: 99, answer: Ok(tokens) });
    Bench { feed, answer, commands, next_index }
}

impl Bench {
    fn feed(&mut self, tokens: &[u32]) {
        for &token in tokens {
            let sampled = Sampled { token, logprob: Some(-1.0), top: Vec::new() };
            let index = self.next_index;
            self.next_index += 1;
            assert!(self.feed.tell(EmissionEvent::Token { index, sampled }));
        }
    }

    fn finish(&mut self, reason: FinishReason, stop_token: Option<u32>) {
        let finish = Finish { reason, stop_token };
        let event = EmissionEvent::Finished { finish, timings: Timings::default() };
        assert!(self.feed.tell(event));
    }

    /// Text, tokens and end of the whole answer.
    async fn read(mut self) -> (String, Vec<u32>, Result<Finished, RequestError>) {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        loop {
            match self.answer.next().await.expect("an answer says how it ends") {
                Ok(GenerateEvent::Started(started)) => assert_eq!(started.seed, 7),
                Ok(GenerateEvent::Delta(delta)) => {
                    text.push_str(&delta.text);
                    tokens.extend(delta.tokens);
                }
                Ok(GenerateEvent::Finished(finished)) => {
                    assert!(self.answer.next().await.is_none());
                    return (text, tokens, Ok(finished));
                }
                Err(error) => return (text, tokens, Err(error)),
            }
        }
    }
}

#[tokio::test]
async fn an_answer_ends_by_length_with_all_its_text() {
    let mut bench = bench(|_| {});
    bench.feed(&ids("hi é"));
    bench.finish(FinishReason::Length, None);
    let (text, tokens, end) = bench.read().await;
    assert_eq!((text.as_str(), &tokens), ("hi é", &ids("hi é")));
    let end = end.unwrap();
    assert_eq!((end.reason, end.completion_tokens as usize), (FinishReason::Length, tokens.len()));
}

#[tokio::test]
async fn a_stop_token_adds_no_text_and_is_named() {
    let mut bench = bench(|parts| parts.stop_tokens = vec![ids("x")[0]]);
    bench.feed(&ids("hix"));
    bench.finish(FinishReason::Stop, Some(ids("x")[0]));
    let (text, tokens, end) = bench.read().await;
    assert_eq!((text.as_str(), tokens), ("hi", ids("hix")));
    assert_eq!(end.unwrap().stop_reason, format!("<{}>", ids("x")[0]));
}

#[tokio::test]
async fn a_stop_string_over_tokens_ends_the_sequence() {
    for (include_stop, want) in [(false, "a"), (true, "aUser")] {
        let mut bench = bench(|parts| {
            parts.stop = vec!["User".into()];
            parts.include_stop = include_stop;
        });
        // The merged token, cut: "aUs", "er".
        let [us, er] = [ids("Us")[0], ids("er")[0]];
        bench.feed(&[ids("a")[0], us, er]);
        let mut commands = std::mem::replace(&mut bench.commands, handle().1);
        let told = async {
            // Dropping the command is what a driver does that has ended.
            matches!(commands.recv().await, Some(Command::Finish { .. }))
        };
        let (told, (text, tokens, end)) = tokio::join!(told, bench.read_until_finish());
        assert!(told, "the sequence is let go");
        assert_eq!((text.as_str(), tokens.len()), (want, 3));
        assert_eq!((end.reason, end.stop_reason.as_str()), (FinishReason::Stop, "User"));
    }
}

impl Bench {
    async fn read_until_finish(self) -> (String, Vec<u32>, Finished) {
        let Bench { feed, answer, commands, next_index } = self;
        // A driver that ended: nobody answers any more.
        drop(feed);
        let (gone, _) = tokens();
        let bench = Bench { feed: gone, answer, commands, next_index };
        let (text, tokens, end) = bench.read().await;
        (text, tokens, end.unwrap())
    }
}

#[tokio::test]
async fn text_that_might_have_been_a_stop_string_comes_at_the_end() {
    let mut bench = bench(|parts| parts.stop = vec!["hip".into()]);
    bench.feed(&ids("a hi"));
    bench.finish(FinishReason::Length, None);
    assert_eq!(bench.read().await.0, "a hi");
}

#[tokio::test]
async fn a_character_that_never_ends_is_shown_as_broken() {
    let mut bench = bench(|_| {});
    bench.feed(&ids("é")[..1]);
    bench.finish(FinishReason::Length, None);
    assert_eq!(bench.read().await.0, "\u{FFFD}");
}

#[tokio::test]
async fn a_resumed_answer_goes_on_where_the_text_was() {
    let whole = ids("hi é!");
    for cut in 0..whole.len() {
        let mut first = bench(|_| {});
        first.feed(&whole[..cut]);
        let mut before = String::new();
        for _ in 0..=cut {
            if let Some(Ok(GenerateEvent::Delta(delta))) = first.answer.next().await {
                before.push_str(&delta.text);
            }
        }
        let mut second = bench(|parts| parts.received = whole[..cut].to_vec());
        second.feed(&whole[cut..]);
        second.finish(FinishReason::Length, None);
        let (after, tokens, end) = second.read().await;
        assert_eq!(format!("{before}{after}"), "hi é!", "cut at {cut}");
        assert_eq!(tokens, whole[cut..]);
        assert_eq!(end.unwrap().completion_tokens as usize, whole.len());
    }
}

#[tokio::test]
async fn least_lengths_hold_for_stop_strings_too() {
    let mut bench = bench(|parts| {
        parts.stop = vec!["a".into()];
        parts.min_tokens = 3;
    });
    bench.feed(&ids("aabc"));
    bench.finish(FinishReason::Length, None);
    let (text, _, end) = bench.read().await;
    assert_eq!((text.as_str(), end.unwrap().reason), ("aabc", FinishReason::Length));
}

#[tokio::test]
async fn a_lost_pipeline_is_told_after_what_came_before() {
    let mut bench = bench(|_| {});
    bench.feed(&ids("hi"));
    let lost = SequenceError::PipelineLost { reason: "worker w1 died".into() };
    assert!(bench.feed.tell(EmissionEvent::Failed(lost)));
    let (text, _, end) = bench.read().await;
    assert_eq!(text, "hi");
    let error = end.unwrap_err();
    assert_eq!(error.to_string(), "the answer was cut off: worker w1 died");
}

#[tokio::test]
async fn an_answer_that_has_not_begun_is_not_cut_off() {
    let mut bench = bench(|_| {});
    let lost = SequenceError::PipelineLost { reason: "the coordinator is stopping".into() };
    assert!(bench.feed.tell(EmissionEvent::Failed(lost)));
    let (_, _, end) = bench.read().await;
    let error = end.unwrap_err();
    assert_eq!(error.to_string(), "the coordinator is stopping");
    assert!(matches!(error, RequestError::Unavailable { .. }));
}

#[tokio::test]
async fn a_reader_that_is_too_late_is_cut_off() {
    let mut bench = bench(|_| {});
    let token = ids("a")[0];
    bench.feed(&vec![token; MAX_TOKENS_BEHIND]);
    let sampled = Sampled { token, logprob: None, top: Vec::new() };
    let wanted = bench.feed.tell(EmissionEvent::Token { index: bench.next_index, sampled });
    assert!(!wanted, "the sequence is cancelled");
    let (text, _, end) = bench.read().await;
    assert_eq!(text.len(), MAX_TOKENS_BEHIND);
    assert!(matches!(end, Err(RequestError::SlowReader { .. })));
}
