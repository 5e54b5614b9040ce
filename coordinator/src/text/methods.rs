//! Python's methods on values of templates. The library's methods build their result before it is
//! charged for, so those whose result may be longer than what they are given are bounded here.

use std::fmt::Write as _;

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::bounded::BoundedOutput;

/// Bytes of a text that one call makes: as long as all that a template may write.
pub(super) const MAX_TEXT_BYTES: usize = super::template::MAX_RENDERED_BYTES;

/// Calls `method` of `value`.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str()) {
        match method {
            "replace" => check_replace(text, args)?,
            "join" => return join(text, args),
            "format" => check_format(text, args)?,
            _ => {}
        }
    }
    unknown_method_callback(state, value, method, args)
}

fn check_replace(text: &str, args: &[Value]) -> Result<(), Error> {
    let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let replaced = text.matches(old).take(count).count();
    check_length(replaced.saturating_mul(new.len()).saturating_add(text.len()))
}

fn join(separator: &str, args: &[Value]) -> Result<Value, Error> {
    let (values,): (&Value,) = from_args(args)?;
    let mut output = BoundedOutput::new(MAX_TEXT_BYTES);
    for (index, value) in values.try_iter()?.enumerate() {
        let before = if index > 0 { separator } else { "" };
        write!(output, "{before}{value}").map_err(|_| too_long())?;
    }
    Ok(Value::from(String::from_utf8_lossy(&output.bytes).into_owned()))
}

/// Each field may be as long as the longest argument. What a field says after a colon may be a
/// width, which is a length that nothing pays for.
fn check_format(text: &str, args: &[Value]) -> Result<(), Error> {
    let fields = || text.split('{').skip(1);
    if fields().any(|field| field.split('}').next().is_some_and(|field| field.contains(':'))) {
        let message = "format does not take widths and other ways to write a field";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let mut longest = 0;
    for value in args {
        let mut output = BoundedOutput::new(MAX_TEXT_BYTES);
        write!(output, "{value}").map_err(|_| too_long())?;
        longest = longest.max(output.bytes.len());
    }
    check_length(fields().count().saturating_mul(longest).saturating_add(text.len()))
}

fn check_length(bytes: usize) -> Result<(), Error> {
    if bytes <= MAX_TEXT_BYTES { Ok(()) } else { Err(too_long()) }
}

fn too_long() -> Error {
    let message = format!("a text would have more than {MAX_TEXT_BYTES} bytes");
    Error::new(ErrorKind::InvalidOperation, message)
}
