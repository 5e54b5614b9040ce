//! Chat templates, rendered as `transformers` renders them, inside limits.
//!
//! Fuel bounds what a template computes and the texts it makes. Two things it does not bound, for
//! the library builds them before it charges for them: lists that are doubled with `+` more than
//! 32 times, and lists of shared lists that `~`, `join` and `string` write out. A template comes
//! with a model and never with a request, so this is between an operator and the model's source.

use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use proto::generate::ChatMessage;

use super::bounded::BoundedOutput;
use super::guard::Guard;
use super::json::PythonJson;
use super::methods::{self, MAX_TEXT_BYTES};
use super::strftime::strftime;

/// Bytes of a template's source: several times the longest known.
const MAX_SOURCE_BYTES: usize = 256 << 10;

/// Instructions of any rendering, however short the conversation. A unit also pays for 64 bytes of
/// every text that the template makes, so no doubling in a loop gets far.
const FUEL: u64 = 50_000;

/// Instructions more for each message: templates use some thirty.
const FUEL_OF_MESSAGE: u64 = 100;

/// Users' bytes that pay for one instruction more: every text may be copied eight times.
const BYTES_OF_FUEL: u64 = 8;

/// Nested calls of macros and blocks: templates use two or three.
const RECURSION_LIMIT: usize = 64;

/// The stack that a rendering runs on; only what is touched takes memory. A list put into a list
/// in a loop is as deep as the fuel allows, and is let go of level by level.
const STACK_BYTES: usize = 256 << 20;

/// Bytes of JSON whose keys are to be sorted: it is held as a tree of many times its size.
const MAX_SORTED_JSON_BYTES: usize = 1 << 20;

/// Bytes that a rendering may write: twice the longest message a client may send.
pub(super) const MAX_RENDERED_BYTES: usize = 2 * proto::limits::CLIENT_MESSAGE_BYTES;

/// The name that the one template has in its environment.
const NAME: &str = "chat_template";

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
    /// The source is not a template.
    #[error("the template is not valid")]
    Compile(#[source] Error),
    /// The template said that it cannot render these messages.
    #[error("the template says: {0}")]
    Raised(String),
    /// It failed, or ran into a limit.
    #[error("the template failed")]
    Render(#[source] Error),
    /// It wrote without end.
    #[error("the template wrote more than {MAX_RENDERED_BYTES} bytes")]
    OutputTooLong,
    /// There is no thread to render on.
    #[error("failed to start a thread for the template")]
    Thread(#[source] std::io::Error),
    /// The renderer did not survive it.
    #[error("the renderer failed on the template")]
    Panicked,
}

/// The texts of tokens that a template may write.
#[derive(Clone, Debug, Default)]
pub(crate) struct TemplateTexts {
    /// `bos_token`.
    pub(crate) bos: String,
    /// `eos_token`.
    pub(crate) eos: String,
}

/// A compiled chat template.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    texts: TemplateTexts,
}

impl ChatTemplate {
    /// Compiles `source` once.
    ///
    /// # Errors
    ///
    /// [`TemplateError::SourceTooLong`] or [`TemplateError::Compile`].
    pub(crate) fn compile(source: &str, texts: TemplateTexts) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError::SourceTooLong { bytes: source.len() });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(TemplateError::Compile)?);
        environment.set_recursion_limit(RECURSION_LIMIT);
        // Else errors carry the template's variables: users' texts, and values too deep to be let
        // go of on another stack.
        environment.set_debug(false);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(methods::call);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(TemplateError::Compile)?;
        Ok(Self { environment, texts })
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
        arguments: &serde_json::Map<String, serde_json::Value>,
        guard: &Guard,
    ) -> Result<String, TemplateError> {
        thread::scope(|scope| {
            thread::Builder::new()
                .name("template".into())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || self.render_here(messages, arguments, guard))
                .map_err(TemplateError::Thread)?
                .join()
                .unwrap_or(Err(TemplateError::Panicked))
        })
    }

    fn render_here(
        &self,
        messages: &[ChatMessage],
        arguments: &serde_json::Map<String, serde_json::Value>,
        guard: &Guard,
    ) -> Result<String, TemplateError> {
        let fuel = fuel(messages, arguments);
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                let content = guard.protect(&message.content);
                minijinja::context! { role => message.role.as_str(), content => content }
            })
            .collect();
        let own = minijinja::context! {
            messages => messages,
            bos_token => self.texts.bos.as_str(),
            eos_token => self.texts.eos.as_str(),
        };
        let given = Value::from(Serde(protect_all(arguments.clone().into(), guard)));
        let defaults = minijinja::context! {
            add_generation_prompt => true,
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let context = minijinja::context! { ..own, ..given, ..defaults };

        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let template = environment.get_template(NAME).map_err(TemplateError::Render)?;
        let mut output = BoundedOutput::new(MAX_RENDERED_BYTES);
        let outcome = template.render_captured_to(context, &mut output).map(drop);
        match outcome {
            Ok(()) => String::from_utf8(output.bytes).map_err(|error| {
                TemplateError::Render(Error::new(ErrorKind::WriteFailure, error.to_string()))
            }),
            Err(_) if output.overflowed => Err(TemplateError::OutputTooLong),
            Err(error) => {
                Err(raised_message(&error)
                    .map_or(TemplateError::Render(error), TemplateError::Raised))
            }
        }
    }
}

/// What a rendering of this conversation may use.
fn fuel(messages: &[ChatMessage], arguments: &serde_json::Map<String, serde_json::Value>) -> u64 {
    let content_bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    let argument_bytes: usize = arguments.values().map(|value| value.to_string().len()).sum();
    let bytes = content_bytes.saturating_add(argument_bytes) as u64;
    FUEL + FUEL_OF_MESSAGE * messages.len() as u64 + bytes / BYTES_OF_FUEL
}

/// What a template said with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

fn raised_message(error: &Error) -> Option<String> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        next = error.source();
    }
    None
}

fn strftime_now(format: String) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(&format, now.as_secs())
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "separators must be two texts"));
        }
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    // A deeper indent than any template's would write blanks without end.
    let indent = indent.map(|indent| indent.min(16));
    let style = PythonJson {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: ensure_ascii.unwrap_or(false),
    };
    let written = if sort_keys.unwrap_or(false) {
        // A first pass finds what is too long or too deep to be held as a tree.
        style
            .write(&value, MAX_SORTED_JSON_BYTES)
            .and_then(|_| serde_json::to_value(&value))
            .and_then(|value| style.write(&with_sorted_keys(value), MAX_TEXT_BYTES))
    } else {
        style.write(&value, MAX_TEXT_BYTES)
    };
    written
        .map(Value::from)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, "not JSON").with_source(error))
}

fn with_sorted_keys(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Object(entries) => {
            let mut entries: Vec<_> =
                entries.into_iter().map(|(key, value)| (key, with_sorted_keys(value))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            serde_json::Value::Object(entries.into_iter().collect())
        }
        serde_json::Value::Array(items) => {
            serde_json::Value::Array(items.into_iter().map(with_sorted_keys).collect())
        }
        other => other,
    }
}

/// Every text inside a user's JSON, protected; its depth was bounded when it was parsed.
fn protect_all(value: serde_json::Value, guard: &Guard) -> serde_json::Value {
    match value {
        serde_json::Value::String(text) => guard.protect(&text).into_owned().into(),
        serde_json::Value::Array(items) => {
            items.into_iter().map(|item| protect_all(item, guard)).collect()
        }
        serde_json::Value::Object(entries) => entries
            .into_iter()
            .map(|(key, value)| (guard.protect(&key).into_owned(), protect_all(value, guard)))
            .collect(),
        other => other,
    }
}

/// Without `{% generation %}` tags: they mark text for training and write nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let tag_end = rest[start..].find("%}").map(|end| start + end + 2);
        let Some(end) = tag_end else { break };
        let inner = rest[start + 2..end - 2].trim_matches(['-', '+']).trim();
        if matches!(inner, "generation" | "endgeneration") {
            // The marks for blanks keep their effect through an empty comment.
            let open = if rest[start..].starts_with("{%-") { "{#-" } else { "{#" };
            let close = if rest[..end].ends_with("-%}") { "-#}" } else { "#}" };
            out.push_str(&rest[..start]);
            out.push_str(open);
            out.push_str(close);
        } else {
            out.push_str(&rest[..end]);
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}
