//! `tercet chat`: a conversation. The server applies the model's chat template; the history is
//! kept here and sent whole with every turn.
//!
//! ```text
//!            ┌────────── Ctrl-C: drop the answer ──────────┐
//! line ──▶ Order ──Say──▶ history + line ──▶ Client ──▶ text as it comes ──▶ history
//! ```

mod input;

use std::future::Future;
use std::io::{self, Write};
use std::pin::pin;

use futures::StreamExt;
use node::config::printable;
use proto::generate::{ChatMessage, GenerateEvent, GenerateRequest, Prompt};
use serde::Serialize;

use crate::command::TextWriter;
use crate::generate::Completion;
use crate::request::AnswerArgs;
use crate::waiting::Notices;
use crate::{Client, ClientError, CommandError};
use input::{Input, Line};

/// What a person can type beside messages.
const HELP: &str = "/system TEXT  give the model an instruction (none: take it back); starts anew
/reset        forget the conversation
/exit         end; so does Ctrl-D
Ctrl-C        stop the answer";

/// What `tercet chat` is told, beside whom to ask.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ChatArgs {
    /// Instruction that comes before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// How to draw and when to end.
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// Print one JSON object for every answer
    #[arg(long)]
    pub json: bool,
}

/// What a line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Order {
    /// Nothing: an empty line.
    Nothing,
    /// An answer to this message.
    Say(String),
    /// A new instruction, or none.
    System(Option<String>),
    /// A new conversation.
    Reset,
    /// A list of orders.
    Help,
    /// The end.
    Exit,
    /// Something this program does not know.
    Unknown(String),
}

impl Order {
    fn parse(line: &str) -> Self {
        let line = line.trim();
        if line.is_empty() {
            return Self::Nothing;
        }
        if !line.starts_with('/') {
            return Self::Say(line.to_owned());
        }
        let (order, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (order, rest.trim()) {
            ("/system", "") => Self::System(None),
            ("/system", text) => Self::System(Some(text.to_owned())),
            ("/reset", "") => Self::Reset,
            ("/help" | "/?", "") => Self::Help,
            ("/exit" | "/quit" | "/bye", "") => Self::Exit,
            _ => Self::Unknown(order.to_owned()),
        }
    }
}

/// A conversation: what was said, and how to ask for more.
struct Conversation {
    answer: AnswerArgs,
    system: Option<String>,
    turns: Vec<ChatMessage>,
}

impl Conversation {
    fn new(args: &ChatArgs) -> Self {
        Self { answer: args.answer.clone(), system: args.system.clone(), turns: Vec::new() }
    }

    /// Everything so far, the instruction first, and `message`.
    fn request(&self, message: &str) -> GenerateRequest {
        let system = self.system.as_deref().map(|text| turn("system", text));
        let messages = system
            .into_iter()
            .chain(self.turns.iter().cloned())
            .chain([turn("user", message)])
            .collect();
        GenerateRequest {
            prompt: Prompt::Conversation { messages, template_arguments_json: String::new() },
            max_tokens: self.answer.max_tokens.unwrap_or(0),
            sampling: self.answer.sampling(),
            stop: self.answer.stop.clone(),
            ignore_eos: self.answer.ignore_eos,
            seed: self.answer.seed,
            deadline_ms: self.answer.deadline_ms(),
            priority: self.answer.priority(),
            user: self.answer.user.clone().unwrap_or_default(),
            ..GenerateRequest::default()
        }
    }

    /// Remembers a turn and what came of it: what the person saw, even if it was cut short. A turn
    /// that gave nothing is forgotten, so that it can be said again.
    fn remember(&mut self, message: &str, answer: &str) {
        if !answer.is_empty() {
            self.turns.push(turn("user", message));
            self.turns.push(turn("assistant", answer));
        }
    }
}

fn turn(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

/// One answer as `--json` prints it.
#[derive(Serialize)]
struct JsonAnswer<'a> {
    role: &'static str,
    /// The person stopped it.
    cancelled: bool,
    #[serde(flatten)]
    completion: &'a Completion,
}

/// Runs the command until the input ends.
///
/// An answer that fails is reported and the conversation goes on, when a person talks; when the
/// input is a file or a pipe, the first failure ends the command.
///
/// # Errors
///
/// If input or output fail, or an answer does and nobody is there to try again.
pub async fn run(client: &Client, args: &ChatArgs) -> Result<(), CommandError> {
    let mut input = Input::open()?;
    let mut writer = TextWriter::stdout();
    let mut conversation = Conversation::new(args);
    if input.is_terminal() {
        remark("Type a message. Ctrl-C stops an answer, /help lists what else there is.");
    }
    loop {
        let line = match input.line().await? {
            Line::Text(line) => line,
            Line::Interrupted => {
                remark("(/exit or Ctrl-D ends)");
                continue;
            }
            Line::End => return Ok(()),
        };
        let message = match Order::parse(&line) {
            Order::Say(message) => message,
            Order::Exit => return Ok(()),
            Order::Nothing => continue,
            other => {
                obey(&mut conversation, other);
                continue;
            }
        };
        let interrupted = async { tokio::signal::ctrl_c().await.map_err(CommandError::Input) };
        match say(client, &mut conversation, &message, args.json, &mut writer, interrupted).await {
            Err(CommandError::Client(error)) if input.is_terminal() => {
                writer.end_line()?;
                remark(&told(&error));
            }
            other => other?,
        }
    }
}

/// An order that needs no answer.
fn obey(conversation: &mut Conversation, order: Order) {
    match order {
        Order::System(text) => {
            conversation.system = text;
            conversation.turns.clear();
        }
        Order::Reset => conversation.turns.clear(),
        Order::Help => remark(HELP),
        Order::Unknown(name) => {
            let name = printable(&name);
            remark(&format!("{name} is not known; /help lists what is"));
        }
        Order::Say(_) | Order::Exit | Order::Nothing => {}
    }
}

/// A failure in one line that gives the terminal no orders: it may be what a server said.
fn told(error: &ClientError) -> String {
    format!("error: {}", printable(&node::Chain(error).to_string()))
}

/// A line for the person, beside the conversation. That it cannot be written is no failure.
fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// One turn: asks, writes the answer as it comes, remembers both. When `interrupted` is ready the
/// answer is dropped, which cancels it on every stage.
async fn say<W: Write>(
    client: &Client,
    conversation: &mut Conversation,
    message: &str,
    json: bool,
    writer: &mut TextWriter<W>,
    interrupted: impl Future<Output = Result<(), CommandError>>,
) -> Result<(), CommandError> {
    let mut completion = Completion::new(false);
    let mut interrupted = pin!(interrupted);
    let outcome = {
        let answer = listen(client, conversation.request(message), json, writer, &mut completion);
        tokio::select! {
            biased;
            interruption = &mut interrupted => interruption.map(|()| true),
            outcome = answer => outcome.map(|()| false),
        }
    };
    conversation.remember(message, &completion.text);
    let cancelled = outcome?;
    if json {
        return writer.json(&JsonAnswer { role: "assistant", cancelled, completion: &completion });
    }
    writer.end_line()
}

/// Adds everything that comes to `completion` and shows it.
async fn listen<W: Write>(
    client: &Client,
    request: GenerateRequest,
    json: bool,
    writer: &mut TextWriter<W>,
    completion: &mut Completion,
) -> Result<(), CommandError> {
    let mut notices = Notices::stderr();
    let mut events = notices.until(client, client.generate(request)).await?;
    loop {
        let event = match completion.tokens.is_empty() {
            true => notices.until(client, events.next()).await,
            false => events.next().await,
        };
        let Some(event) = event.transpose()? else { return Ok(()) };
        completion.add(&event);
        if let GenerateEvent::Delta(delta) = &event
            && !json
        {
            writer.text(&delta.text)?;
        }
    }
}

#[cfg(test)]
mod tests;
