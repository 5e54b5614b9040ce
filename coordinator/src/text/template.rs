//! Chat templates, rendered as `transformers` renders them, inside limits.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use model::{SpecialText, SpecialTexts};
use proto::generate::ChatMessage;

use super::guard::Guard;
use super::jinja::{CompileError, Failure, Json, Meter, Program};

#[cfg(test)]
mod tests;

/// Bytes of a template's source: several times the longest known.
const MAX_SOURCE_BYTES: usize = 256 << 10;

/// The stack that a template is parsed, rendered and let go of on; only what is touched takes
/// memory. The deepest parse takes 2 MiB and the deepest rendering 12 MiB without optimisation.
const STACK_BYTES: usize = 64 << 20;

/// How long a rendering may take by the clock. Its limit of work comes first but where processors
/// are scarce.
const RENDER_TIME: Duration = Duration::from_secs(1);

/// Why a chat template could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The source is longer than any template.
    #[error("the template has {bytes} bytes, the limit is {MAX_SOURCE_BYTES}")]
    SourceTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The source is not a template, or asks for what there is not.
    #[error("the template is not valid")]
    Compile(#[source] CompileError),
    /// The template said that it cannot render these messages.
    #[error("the template says: {0}")]
    Raised(String),
    /// It failed, as it would have in Python.
    #[error("the template failed: {0}")]
    Render(String),
    /// It ran into a limit.
    #[error("the template was stopped: {0}")]
    Limit(String),
    /// There is no thread to render on.
    #[error("failed to start a thread for the template")]
    Thread(#[source] std::io::Error),
    /// The renderer did not survive it.
    #[error("the renderer failed on the template")]
    Panicked,
}

impl From<Failure> for TemplateError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Raised(words) => Self::Raised(words),
            Failure::Limit(words) => Self::Limit(words),
            Failure::Error(words) => Self::Render(words),
        }
    }
}

/// The texts of tokens that a template may write. One that the model has not is not defined there,
/// as in `transformers`: templates ask `bos_token is defined`.
#[derive(Clone, Debug, Default)]
pub(crate) struct TemplateTexts {
    /// `bos_token`.
    pub(crate) bos: Option<String>,
    /// `eos_token`.
    pub(crate) eos: Option<String>,
    /// Of others, by the names that the template uses.
    pub(crate) special: SpecialTexts,
}

/// A compiled chat template.
pub(crate) struct ChatTemplate {
    program: Program,
    texts: TemplateTexts,
}

impl ChatTemplate {
    /// Compiles `source` once.
    ///
    /// # Errors
    ///
    /// [`TemplateError::SourceTooLong`], [`TemplateError::Compile`] or [`TemplateError::Thread`].
    pub(crate) fn compile(source: &str, texts: TemplateTexts) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError::SourceTooLong { bytes: source.len() });
        }
        let program = on_own_stack(|| Program::parse(source).map_err(TemplateError::Compile))?;
        Ok(Self { program, texts })
    }

    /// Renders conversations as clients send them, to learn at import what would fail later. What
    /// the template itself refuses (`raise_exception`) is its right.
    ///
    /// # Errors
    ///
    /// Why the plainest conversations cannot be rendered.
    pub(crate) fn try_out(&self) -> Result<(), TemplateError> {
        let turn = |role: &str, content: &str| ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
        };
        let user = turn("user", "Hello <there> & \"you\"");
        let conversations = [
            vec![user.clone()],
            vec![turn("system", "Be brief."), user.clone()],
            vec![user.clone(), turn("assistant", "<think>\nhm\n</think>\n\nHi"), user.clone()],
            vec![turn("system", ""), user.clone(), turn("assistant", "Hi"), user],
        ];
        let guard = Guard::default();
        let mut failure = None;
        for messages in &conversations {
            for add_generation_prompt in [true, false] {
                let prompt = Json::Bool(add_generation_prompt);
                let arguments = [("add_generation_prompt".to_owned(), prompt)];
                match self.render(messages, &arguments, &guard) {
                    Ok(_) => {}
                    Err(TemplateError::Raised(_)) if messages.len() > 1 => {}
                    Err(error) if failure.is_none() => failure = Some(error),
                    Err(_) => {}
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Writes a conversation; users' texts pass through `guard`.
    ///
    /// `arguments` are given to the template beside the messages; they cannot replace them.
    ///
    /// # Errors
    ///
    /// [`TemplateError`] if the template refuses, fails or reaches a limit.
    pub(crate) fn render(
        &self,
        messages: &[ChatMessage],
        arguments: &[(String, Json)],
        guard: &Guard,
    ) -> Result<String, TemplateError> {
        self.render_within(RENDER_TIME, messages, arguments, guard)
    }

    fn render_within(
        &self,
        time: Duration,
        messages: &[ChatMessage],
        arguments: &[(String, Json)],
        guard: &Guard,
    ) -> Result<String, TemplateError> {
        let text = |text: &str| Json::Text(text.to_owned());
        let turn = |message: &ChatMessage| {
            let content = Json::Text(guard.protect(&message.content).into_owned());
            Json::Dict(vec![("role".into(), text(&message.role)), ("content".into(), content)])
        };
        let mut variables = vec![
            ("add_generation_prompt".into(), Json::Bool(true)),
            ("tools".into(), Json::Null),
            ("documents".into(), Json::Null),
        ];
        for (name, value) in arguments {
            variables.push((name.clone(), protect_all(value, guard)));
        }
        // The last of a name counts.
        variables.push(("messages".into(), Json::List(messages.iter().map(turn).collect())));
        let Self { texts: TemplateTexts { bos, eos, special }, .. } = self;
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            variables.extend(token.as_deref().map(|token| (name.into(), text(token))));
        }
        for (name, token) in special.iter() {
            let value = match token {
                SpecialText::One(token) => text(token),
                SpecialText::Several(tokens) => {
                    Json::List(tokens.iter().map(|token| text(token)).collect())
                }
            };
            variables.push((name.into(), value));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        on_own_stack(|| {
            self.program
                .render(&variables, now.as_secs(), &Meter::new(Some(time)))
                .map_err(TemplateError::from)
        })
    }
}

/// Runs `run` on a stack that is known to be large enough, and waits for it: so far for as long as
/// a rendering may take.
fn on_own_stack<T: Send>(
    run: impl FnOnce() -> Result<T, TemplateError> + Send,
) -> Result<T, TemplateError> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("template".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, run)
            .map_err(TemplateError::Thread)?
            .join()
            .unwrap_or(Err(TemplateError::Panicked))
    })
}

/// Every text inside a user's JSON, protected; its depth was bounded when it was parsed.
fn protect_all(value: &Json, guard: &Guard) -> Json {
    match value {
        Json::Text(text) => Json::Text(guard.protect(text).into_owned()),
        Json::List(items) => {
            Json::List(items.iter().map(|item| protect_all(item, guard)).collect())
        }
        Json::Dict(entries) => {
            let entry = |(key, value): &(String, Json)| {
                (guard.protect(key).into_owned(), protect_all(value, guard))
            };
            Json::Dict(entries.iter().map(entry).collect())
        }
        other => other.clone(),
    }
}
