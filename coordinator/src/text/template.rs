//! Chat templates, rendered as `transformers` renders them, inside limits.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use proto::generate::ChatMessage;

use super::guard::Guard;
use super::json::PythonJson;
use super::strftime::strftime;

/// Bytes of a template's source: several times the longest known.
const MAX_SOURCE_BYTES: usize = 256 << 10;

/// Instructions of one rendering: some two hundred for each of 4096 messages.
const FUEL: u64 = 1_000_000;

/// Nested calls of macros and blocks: templates use two or three, and a thread's stack is 2 MiB.
const RECURSION_LIMIT: usize = 64;

/// Bytes that a rendering may write: twice the longest message a client may send.
const MAX_RENDERED_BYTES: usize = 2 * proto::limits::CLIENT_MESSAGE_BYTES;

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
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_LIMIT);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
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

        let template = self.environment.get_template(NAME).map_err(TemplateError::Render)?;
        let mut output = BoundedOutput { bytes: Vec::new(), overflowed: false };
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

/// Takes no more than [`MAX_RENDERED_BYTES`].
struct BoundedOutput {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RENDERED_BYTES {
            self.overflowed = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
        serde_json::to_value(&value).and_then(|value| style.write(&with_sorted_keys(value)))
    } else {
        style.write(&value)
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
