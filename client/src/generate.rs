//! `tercet generate`: one answer, as text while it comes or as one JSON object.

use std::io::{self, IsTerminal, Write};
use std::str::FromStr;

use futures::{Stream, StreamExt};
use proto::generate::{Delta, GenerateEvent, GenerateRequest, Logprobs, Prompt, Timings};
use proto::limits::TOP_LOGPROBS;
use serde::Serialize;

use crate::command::{self, TextWriter};
use crate::request::AnswerArgs;
use crate::waiting::Notices;
use crate::{Client, ClientError, CommandError};

/// What `tercet generate` is told, beside whom to ask.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct GenerateArgs {
    /// Text to go on from, completed as it is; `-` reads it from standard input
    #[arg(value_name = "PROMPT", required_unless_present = "tokens", conflicts_with = "tokens")]
    pub prompt: Option<String>,
    /// Token ids to go on from, as 1,2,3
    #[arg(long, value_name = "IDS")]
    pub tokens: Option<TokenIds>,
    /// How to draw and when to end.
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// Report log probabilities, with the K most probable tokens at every place (needs --json)
    #[arg(long, value_name = "K", requires = "json",
          value_parser = clap::value_parser!(u32).range(0..=i64::from(TOP_LOGPROBS)))]
    pub top_logprobs: Option<u32>,
    /// Name of this request: without a seed, the same name gives the same draws
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
    /// Print one JSON object when the answer is whole
    #[arg(long)]
    pub json: bool,
}

/// Token ids as they are written on the command line: `1,2,3`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenIds(pub Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = |part: &str| {
            let part = part.trim();
            part.parse().map_err(|_| format!("{part:?} is not a token id; write them as 1,2,3"))
        };
        text.split(',').map(id).collect::<Result<_, _>>().map(Self)
    }
}

impl GenerateArgs {
    /// The request these arguments describe; reads standard input if they say so.
    ///
    /// # Errors
    ///
    /// If standard input cannot be read or is too long.
    pub fn request(&self) -> Result<GenerateRequest, CommandError> {
        let prompt = match (&self.tokens, self.prompt.as_deref()) {
            (Some(TokenIds(ids)), _) => Prompt::Tokens(ids.clone()),
            (None, Some("-")) => Prompt::Text(command::read_prompt(io::stdin().lock())?),
            (None, text) => Prompt::Text(text.unwrap_or_default().to_owned()),
        };
        Ok(GenerateRequest {
            prompt,
            max_tokens: self.answer.max_tokens.unwrap_or(0),
            sampling: self.answer.sampling(),
            stop: self.answer.stop.clone(),
            ignore_eos: self.answer.ignore_eos,
            seed: self.answer.seed,
            deadline_ms: self.answer.deadline_ms(),
            idempotency_key: self.idempotency_key.clone().unwrap_or_default(),
            top_logprobs: self.top_logprobs,
            priority: self.answer.priority(),
            user: self.answer.user.clone().unwrap_or_default(),
            ..GenerateRequest::default()
        })
    }
}

/// A whole answer: what `--json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Completion {
    /// Every token of the answer.
    pub tokens: Vec<u32>,
    /// Their text; empty when the model has no tokenizer.
    pub text: String,
    /// `stop` or `length`; empty when the answer was cancelled.
    pub finish_reason: &'static str,
    /// How much was read and written.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
    /// When asked for: of every token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<f32>>,
    /// When asked for: the most probable tokens at every place, best first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<Vec<Vec<TokenLogprob>>>,
}

/// Counts of tokens, as OpenAI's API names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of the answer.
    pub completion_tokens: u32,
    /// Of both.
    pub total_tokens: u32,
}

/// A token and its log probability (natural logarithm).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// ln p.
    pub logprob: f32,
}

impl Completion {
    /// An answer of which nothing has come yet. `with_logprobs`: they were asked for.
    pub fn new(with_logprobs: bool) -> Self {
        let logprobs = with_logprobs.then(Vec::new);
        let top_logprobs = with_logprobs.then(Vec::new);
        Self { logprobs, top_logprobs, ..Self::default() }
    }

    /// Adds what has come.
    pub fn add(&mut self, event: &GenerateEvent) {
        match event {
            GenerateEvent::Started(started) => self.usage.prompt_tokens = started.prompt_tokens,
            GenerateEvent::Delta(delta) => self.add_delta(delta),
            GenerateEvent::Finished(finished) => {
                self.finish_reason = finished.reason.name();
                self.timings = finished.timings;
                self.usage.prompt_tokens = finished.prompt_tokens;
                self.usage.completion_tokens = finished.completion_tokens;
            }
        }
        self.usage.total_tokens =
            self.usage.prompt_tokens.saturating_add(self.usage.completion_tokens);
    }

    fn add_delta(&mut self, delta: &Delta) {
        self.tokens.extend(&delta.tokens);
        self.text.push_str(&delta.text);
        self.usage.completion_tokens = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
        if let Some(logprobs) = &mut self.logprobs {
            logprobs.extend(delta.logprobs.iter().map(|place| place.logprob));
        }
        if let Some(top) = &mut self.top_logprobs {
            let candidates = |place: &Logprobs| {
                let of = |c: &proto::generate::Candidate| TokenLogprob {
                    token: c.token,
                    logprob: c.logprob,
                };
                place.top.iter().map(of).collect()
            };
            top.extend(delta.logprobs.iter().map(candidates));
        }
    }

    /// Collects a whole answer.
    ///
    /// # Errors
    ///
    /// The first error of the stream.
    pub async fn collect(
        mut events: impl Stream<Item = Result<GenerateEvent, ClientError>> + Unpin,
        with_logprobs: bool,
    ) -> Result<Self, ClientError> {
        let mut completion = Self::new(with_logprobs);
        while let Some(event) = events.next().await {
            completion.add(&event?);
        }
        Ok(completion)
    }
}

/// Runs the command: nothing but the answer goes to standard output.
///
/// # Errors
///
/// If there is no whole answer, or it cannot be written.
pub async fn run(client: &Client, args: &GenerateArgs) -> Result<(), CommandError> {
    let mut notices = Notices::stderr();
    let request = args.request()?;
    let mut events = notices.until(client, client.generate(request)).await?;
    let mut writer = TextWriter::stdout();
    let mut completion = Completion::new(args.top_logprobs.is_some());
    let mut failure = None;
    loop {
        // Once tokens come, it is seen that they do.
        let event = match completion.tokens.is_empty() {
            true => notices.until(client, events.next()).await,
            false => events.next().await,
        };
        let Some(event) = event else { break };
        match event {
            Ok(event) => {
                if let GenerateEvent::Delta(delta) = &event
                    && !args.json
                {
                    writer.text(&delta.text)?;
                }
                completion.add(&event);
            }
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    // What is said next, of a failure too, starts on a line of its own.
    if writer.is_terminal() && !args.json {
        writer.end_line()?;
    }
    if let Some(error) = failure {
        return Err(error.into());
    }
    if args.json {
        return writer.json(&completion);
    }
    note(&completion);
    Ok(())
}

/// What a person may want to know beside the answer, on standard error.
fn note(completion: &Completion) {
    let mut error_output = io::stderr();
    // A failure to write a remark is no failure of the command.
    if completion.text.is_empty() && !completion.tokens.is_empty() {
        let _ = writeln!(error_output, "note: the model has no text for its tokens; see --json");
    }
    if error_output.is_terminal() {
        let _ = writeln!(error_output, "{}", summary(completion));
    }
}

/// One line on how it went: `60 tokens, 41.3 tokens/s, first after 0.12 s`.
fn summary(completion: &Completion) -> String {
    let Timings { queue_us, prefill_us, decode_us, .. } = completion.timings;
    let tokens = completion.usage.completion_tokens;
    let mut line = format!("[{tokens} tokens");
    // The first token is the prefill's work: the rate is that of the others.
    if tokens > 1 && decode_us > 0 {
        let rate_tokens_per_s = f64::from(tokens - 1) * 1e6 / decode_us as f64;
        line += &format!(", {rate_tokens_per_s:.1} tokens/s");
    }
    line + &format!(", first after {:.2} s]", queue_us.saturating_add(prefill_us) as f64 / 1e6)
}

#[cfg(test)]
mod tests;
