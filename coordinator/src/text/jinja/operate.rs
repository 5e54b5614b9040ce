//! Python's operators; what picks from lists and texts is in [`items`].

mod items;

use std::cmp::Ordering;
use std::rc::Rc;

use super::meter::{Meter, Writer};
use super::syntax::{BinaryOp, CompareOp};
use super::value::{Items, Object, Value, View};
use super::{Failure, write};
use items::charge_items;
pub(super) use items::{is_iterable, item, items, length, slice};

/// `a op b`.
pub(super) fn binary(
    meter: &Rc<Meter>,
    op: BinaryOp,
    a: &Value,
    b: &Value,
) -> Result<Value, Failure> {
    for side in [a, b] {
        if let Value::Undefined(words) = side {
            // A text formats even what is undefined.
            if !(op == BinaryOp::Remainder && a.as_str().is_some()) {
                return Err(Failure::new(words.to_string()));
            }
        }
    }
    if let (Some(x), Some(y)) = (a.as_int(), b.as_int()) {
        return integers(op, x, y);
    }
    if let (Some(x), Some(y)) = (a.as_float(), b.as_float()) {
        return floats(op, x, y);
    }
    match (op, a, b) {
        (BinaryOp::Add, Value::Text(x), Value::Text(y)) => {
            let safe = x.safe || y.safe;
            let mut out = Writer::new(meter);
            for side in [x, y] {
                if safe && !side.safe {
                    escape(&mut out, &side.text)?;
                } else {
                    out.push_str(&side.text)?;
                }
            }
            Value::marked(meter, out.finish(), safe)
        }
        (BinaryOp::Add, Value::List(x), Value::List(y)) => Value::list(meter, joined(meter, x, y)?),
        (BinaryOp::Add, Value::Tuple(x), Value::Tuple(y)) => {
            Value::tuple(meter, joined(meter, x, y)?)
        }
        (BinaryOp::Remainder, Value::Text(text), _) => super::percent::format(meter, text, b),
        (BinaryOp::Multiply, _, _) => match (a, b.as_int(), b, a.as_int()) {
            (items, Some(times), ..) | (_, _, items, Some(times)) => repeat(meter, items, times),
            _ => Err(unsupported(op, a, b)),
        },
        _ => Err(unsupported(op, a, b)),
    }
}

fn unsupported(op: BinaryOp, a: &Value, b: &Value) -> Failure {
    let (a, b) = (a.type_name(), b.type_name());
    Failure::new(format!("unsupported operand types for {}: {a:?} and {b:?}", op.sign()))
}

fn joined(meter: &Meter, x: &Items, y: &Items) -> Result<Vec<Value>, Failure> {
    charge_items(meter, x.len() + y.len())?;
    Ok(x.iter().chain(y.iter()).cloned().collect())
}

fn repeat(meter: &Rc<Meter>, value: &Value, times: i128) -> Result<Value, Failure> {
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    let many = |items: &Items| {
        charge_items(meter, items.len().saturating_mul(times))?;
        let times = if items.is_empty() { 0 } else { times };
        Ok::<_, Failure>((0..times).flat_map(|_| items.iter().cloned()).collect())
    };
    match value {
        Value::Text(text) => {
            let mut out = Writer::new(meter);
            out.repeat(&text.text, if text.text.is_empty() { 0 } else { times })?;
            Value::marked(meter, out.finish(), text.safe)
        }
        Value::List(items) => Value::list(meter, many(items)?),
        Value::Tuple(items) => Value::tuple(meter, many(items)?),
        _ => Err(Failure::new(format!("cannot repeat a {}", value.type_name()))),
    }
}

fn integers(op: BinaryOp, x: i128, y: i128) -> Result<Value, Failure> {
    let division = matches!(op, BinaryOp::Divide | BinaryOp::FloorDivide | BinaryOp::Remainder);
    if division && y == 0 {
        return Err(Failure::new("division by zero"));
    }
    let result = match op {
        BinaryOp::Add => x.checked_add(y),
        BinaryOp::Subtract => x.checked_sub(y),
        BinaryOp::Multiply => x.checked_mul(y),
        BinaryOp::Divide => return Ok(Value::Float(quotient(x, y))),
        BinaryOp::FloorDivide => x.checked_div_euclid(y).map(|quotient| {
            // Euclid's remainder is never negative; Python's has the divisor's sign.
            if y < 0 && x.wrapping_rem_euclid(y) != 0 { quotient - 1 } else { quotient }
        }),
        BinaryOp::Remainder => {
            // Wrapping: the least integer's remainder by -1 is 0, though its quotient is too large.
            let remainder = x.wrapping_rem(y);
            let other_side = remainder != 0 && (remainder < 0) != (y < 0);
            Some(if other_side { remainder + y } else { remainder })
        }
        BinaryOp::Power if y < 0 => return floats(op, x as f64, y as f64),
        BinaryOp::Power => match x {
            0 | 1 => Some(if y == 0 { 1 } else { x }),
            -1 => Some(if y % 2 == 0 { 1 } else { -1 }),
            _ => u32::try_from(y).ok().and_then(|y| x.checked_pow(y)),
        },
    };
    result.map(Value::int).ok_or_else(too_large)
}

/// `x / y`, rounded once: two integers that are rounded first may give another float. `y` is not 0.
pub(super) fn quotient(x: i128, y: i128) -> f64 {
    /// Integers up to here are floats without being rounded.
    const EXACT: u128 = 1 << f64::MANTISSA_DIGITS;
    let (a, b) = (x.unsigned_abs(), y.unsigned_abs());
    if a == 0 || (a <= EXACT && b <= EXACT) {
        return x as f64 / y as f64;
    }
    let (mut quotient, mut rest, mut scale) = (a / b, a % b, 1.0_f64);
    // Two bits more than a float has, and whether there is a rest, decide how it is rounded.
    while quotient < EXACT << 2 {
        rest *= 2;
        quotient = quotient * 2 + u128::from(rest >= b);
        rest -= if rest >= b { b } else { 0 };
        scale /= 2.0;
    }
    let rounded = (quotient | u128::from(rest > 0)) as f64 * scale;
    if (x < 0) == (y < 0) { rounded } else { -rounded }
}

pub(super) fn too_large() -> Failure {
    Failure::Limit("an integer had more than 127 bits".into())
}

fn floats(op: BinaryOp, x: f64, y: f64) -> Result<Value, Failure> {
    let division = matches!(op, BinaryOp::Divide | BinaryOp::FloorDivide | BinaryOp::Remainder);
    if division && y == 0.0 {
        return Err(Failure::new("float division by zero"));
    }
    let remainder = || {
        let remainder = x % y;
        if remainder == 0.0 {
            0.0_f64.copysign(y)
        } else if (remainder < 0.0) != (y < 0.0) {
            remainder + y
        } else {
            remainder
        }
    };
    let result = match op {
        BinaryOp::Add => x + y,
        BinaryOp::Subtract => x - y,
        BinaryOp::Multiply => x * y,
        BinaryOp::Divide => x / y,
        BinaryOp::FloorDivide => {
            // As CPython's float_divmod, which is exact where the quotient would be rounded up.
            let rest = x % y;
            let mut quotient = (x - rest) / y;
            if rest != 0.0 && (y < 0.0) != (rest < 0.0) {
                quotient -= 1.0;
            }
            let floor = quotient.floor();
            if quotient == 0.0 {
                0.0_f64.copysign(x / y)
            } else if quotient - floor > 0.5 {
                floor + 1.0
            } else {
                floor
            }
        }
        BinaryOp::Remainder => remainder(),
        BinaryOp::Power => {
            if x == 0.0 && y < 0.0 {
                return Err(Failure::new("0.0 cannot be raised to a negative power"));
            }
            if x < 0.0 && x.is_finite() && y.is_finite() && y.fract() != 0.0 {
                return Err(Failure::new("a complex number is not supported"));
            }
            let power = x.powf(y);
            if power.is_infinite() && x.is_finite() && y.is_finite() {
                return Err(Failure::new("numerical result out of range"));
            }
            power
        }
    };
    Ok(Value::Float(result))
}

/// `-value` or `+value`.
pub(super) fn sign(value: &Value, negative: bool) -> Result<Value, Failure> {
    match value {
        Value::Undefined(words) => Err(Failure::new(words.to_string())),
        Value::Float(value) => Ok(Value::Float(if negative { -value } else { *value })),
        _ => match value.as_int() {
            Some(value) if negative => value.checked_neg().map(Value::int).ok_or_else(too_large),
            Some(value) => Ok(Value::int(value)),
            None => Err(Failure::new(format!("bad operand for a sign: {}", value.type_name()))),
        },
    }
}

/// The integer that a float is, if it is one.
pub(super) fn exact_int(value: f64) -> Option<i128> {
    let bound = 1.7e38;
    (value.fract() == 0.0 && value.abs() < bound).then_some(value as i128)
}

/// `a == b`.
pub(super) fn is_equal(meter: &Meter, a: &Value, b: &Value) -> Result<bool, Failure> {
    meter.spend(1)?;
    let lists = |x: &[Value], y: &[Value]| {
        if x.len() != y.len() {
            return Ok(false);
        }
        for (x, y) in x.iter().zip(y) {
            if !is_equal(meter, x, y)? {
                return Ok(false);
            }
        }
        Ok(true)
    };
    Ok(match (a, b) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Text(x), Value::Text(y)) => {
            if x.text.len() == y.text.len() {
                meter.scan(x.text.len())?;
            }
            x.text == y.text
        }
        (Value::List(x), Value::List(y)) | (Value::Tuple(x), Value::Tuple(y)) => {
            return lists(x, y);
        }
        (Value::Dict(x), Value::Dict(y)) => {
            if x.entries.len() != y.entries.len() {
                return Ok(false);
            }
            for (key, value) in &x.entries {
                match y.get(meter, key)? {
                    Some(other) if is_equal(meter, value, other)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::Object(x), Value::Object(y)) => match (&***x, &***y) {
            (Object::Range(x), Object::Range(y)) => {
                x.len == y.len
                    && (x.len == 0 || x.start == y.start)
                    && (x.len <= 1 || x.step == y.step)
            }
            (Object::View { kind: x, dict: a }, Object::View { kind: y, dict: b })
                if x == y && *x != View::Values =>
            {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &a.entries {
                    match b.get(meter, key)? {
                        Some(_) if *x == View::Keys => {}
                        Some(other) if is_equal(meter, value, other)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            _ => Rc::ptr_eq(x, y),
        },
        _ => match compare_numbers(a, b) {
            Some(order) => order == Some(Ordering::Equal),
            None => false,
        },
    })
}

/// The order of two numbers, `Some(None)` if one is no number at all; `None` if they are not both
/// numbers.
fn compare_numbers(a: &Value, b: &Value) -> Option<Option<Ordering>> {
    if let (Some(x), Some(y)) = (a.as_int(), b.as_int()) {
        return Some(Some(x.cmp(&y)));
    }
    let (x, y) = (a.as_float()?, b.as_float()?);
    // A whole float is compared as an integer: a large integer has no equal float.
    let whole = |value: &Value| match value {
        Value::Float(value) => exact_int(*value),
        other => other.as_int(),
    };
    match (whole(a), whole(b)) {
        (Some(x), Some(y)) => Some(Some(x.cmp(&y))),
        _ => Some(x.partial_cmp(&y)),
    }
}

/// The order of two values; `None` if a number is none.
///
/// # Errors
///
/// If Python does not order them.
pub(super) fn compare(meter: &Meter, a: &Value, b: &Value) -> Result<Option<Ordering>, Failure> {
    meter.spend(1)?;
    for side in [a, b] {
        if let Value::Undefined(words) = side {
            return Err(Failure::new(words.to_string()));
        }
    }
    if let Some(order) = compare_numbers(a, b) {
        return Ok(order);
    }
    match (a, b) {
        (Value::Text(x), Value::Text(y)) => {
            meter.scan(x.text.len().min(y.text.len()))?;
            Ok(Some(x.text.cmp(&y.text)))
        }
        (Value::List(x), Value::List(y)) | (Value::Tuple(x), Value::Tuple(y)) => {
            for (x, y) in x.iter().zip(y.iter()) {
                if !is_equal(meter, x, y)? {
                    return compare(meter, x, y);
                }
            }
            Ok(Some(x.len().cmp(&y.len())))
        }
        _ => {
            let (a, b) = (a.type_name(), b.type_name());
            Err(Failure::new(format!("{a:?} and {b:?} have no order")))
        }
    }
}

/// `a op b` of a comparison.
pub(super) fn holds(
    meter: &Rc<Meter>,
    op: CompareOp,
    a: &Value,
    b: &Value,
) -> Result<bool, Failure> {
    let order = || compare(meter, a, b);
    Ok(match op {
        CompareOp::Equal => is_equal(meter, a, b)?,
        CompareOp::NotEqual => !is_equal(meter, a, b)?,
        CompareOp::Less => order()? == Some(Ordering::Less),
        CompareOp::LessEqual => matches!(order()?, Some(Ordering::Less | Ordering::Equal)),
        CompareOp::Greater => order()? == Some(Ordering::Greater),
        CompareOp::GreaterEqual => matches!(order()?, Some(Ordering::Greater | Ordering::Equal)),
        CompareOp::In => contains(meter, b, a)?,
        CompareOp::NotIn => !contains(meter, b, a)?,
    })
}

/// `item in container`.
pub(super) fn contains(
    meter: &Rc<Meter>,
    container: &Value,
    item: &Value,
) -> Result<bool, Failure> {
    match container {
        Value::Text(text) => {
            let Some(part) = item.as_str() else {
                return Err(Failure::new("'in <string>' requires string as left operand"));
            };
            meter.scan(text.text.len() + part.len())?;
            Ok(text.text.contains(part))
        }
        Value::Dict(dict) => Ok(dict.get(meter, item)?.is_some()),
        Value::Object(object) => match (&***object, item) {
            (Object::View { kind: View::Keys, dict }, _) => Ok(dict.get(meter, item)?.is_some()),
            (Object::Range(range), Value::Int(_) | Value::Bool(_) | Value::Float(_)) => {
                let wanted = match item {
                    Value::Float(value) => exact_int(*value),
                    _ => item.as_int(),
                };
                // What overflows here is farther from the start than any number of the range.
                let offset = wanted.and_then(|wanted| wanted.checked_sub(range.start));
                Ok(offset.is_some_and(|offset| {
                    let index = offset.checked_div(range.step);
                    offset.checked_rem(range.step) == Some(0)
                        && index.is_some_and(|index| (0..range.len as i128).contains(&index))
                }))
            }
            _ => any_is(meter, &items(meter, container)?, item),
        },
        _ => any_is(meter, &items(meter, container)?, item),
    }
}

fn any_is(meter: &Rc<Meter>, items: &[Value], item: &Value) -> Result<bool, Failure> {
    for other in items.iter() {
        if item.is_same(other) || is_equal(meter, other, item)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Writes a text as HTML.
pub(super) fn escape(out: &mut Writer, text: &str) -> Result<(), Failure> {
    let mut rest = text;
    while let Some(at) = rest.find(['&', '<', '>', '\'', '"']) {
        out.push_str(&rest[..at])?;
        out.push_str(match rest.as_bytes()[at] {
            b'&' => "&amp;",
            b'<' => "&lt;",
            b'>' => "&gt;",
            b'\'' => "&#39;",
            _ => "&#34;",
        })?;
        rest = &rest[at + 1..];
    }
    out.push_str(rest)
}

/// `str(value)` as a text of its own.
pub(super) fn to_text(meter: &Rc<Meter>, value: &Value) -> Result<String, Failure> {
    let mut out = Writer::new(meter);
    write::str(&mut out, value)?;
    Ok(out.finish())
}
