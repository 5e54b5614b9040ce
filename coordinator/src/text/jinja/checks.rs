//! `is`: Jinja2's tests.

use super::evaluate::Given;
use super::render::Renderer;
use super::syntax::CompareOp;
use super::value::{Object, Value};
use super::{Failure, letters, names, operate};

/// Whether `value` passes the test `name`.
pub(super) fn holds(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: &Value,
    given: Given,
) -> Result<bool, Failure> {
    let meter = std::rc::Rc::clone(&renderer.meter);
    meter.spend(1)?;
    let compared = match name {
        "==" | "eq" | "equalto" => Some(CompareOp::Equal),
        "!=" | "ne" => Some(CompareOp::NotEqual),
        "<" | "lt" | "lessthan" => Some(CompareOp::Less),
        "<=" | "le" => Some(CompareOp::LessEqual),
        ">" | "gt" | "greaterthan" => Some(CompareOp::Greater),
        ">=" | "ge" => Some(CompareOp::GreaterEqual),
        "in" => Some(CompareOp::In),
        _ => None,
    };
    if let Some(op) = compared {
        let [other] = given.bind(name, ["seq"])?;
        let other = other.ok_or_else(|| Failure::new(format!("{name} takes one argument")))?;
        return operate::holds(&meter, op, value, &other);
    }
    if matches!(name, "divisibleby" | "sameas") {
        let [other] = given.bind(name, [if name == "sameas" { "other" } else { "num" }])?;
        let other = other.ok_or_else(|| Failure::new(format!("{name} takes one argument")))?;
        if name == "sameas" {
            return Ok(value.is_same(&other));
        }
        return remainder_is(&meter, value, &other, 0);
    }
    given.bind(name, [])?;
    let text = || operate::to_text(&meter, value);
    Ok(match name {
        "odd" => remainder_is(&meter, value, &Value::int(2), 1)?,
        "even" => remainder_is(&meter, value, &Value::int(2), 0)?,
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "filter" => value.as_str().is_some_and(|name| {
            names::FILTERS.contains(&name) || names::UNSUPPORTED_FILTERS.contains(&name)
        }),
        "test" => value.as_str().is_some_and(|name| names::TESTS.contains(&name)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "false" => matches!(value, Value::Bool(false)),
        "true" => matches!(value, Value::Bool(true)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => value.as_float().is_some(),
        "lower" => letters::is_lower(&text()?),
        "upper" => letters::is_upper(&text()?),
        "string" => value.as_str().is_some(),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => match value {
            Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) => true,
            Value::Undefined(_) => true,
            Value::Object(object) => matches!(&***object, Object::Range(_)),
            _ => false,
        },
        "iterable" => operate::is_iterable(value),
        "callable" => match value {
            Value::Object(object) => matches!(
                &***object,
                Object::Method { .. }
                    | Object::Function(_)
                    | Object::Macro(_)
                    | Object::Loop(_)
                    | Object::Joiner { .. }
            ),
            Value::Undefined(_) => true,
            _ => false,
        },
        "escaped" => matches!(value, Value::Text(text) if text.safe),
        _ => return Err(Failure::new(format!("No test named {name:?}."))),
    })
}

fn remainder_is(
    meter: &std::rc::Rc<super::Meter>,
    value: &Value,
    divisor: &Value,
    wanted: i32,
) -> Result<bool, Failure> {
    let remainder = operate::binary(meter, super::syntax::BinaryOp::Remainder, value, divisor)?;
    operate::is_equal(meter, &remainder, &Value::int(wanted))
}
