//! Filters that make numbers, or texts of them.

use std::rc::Rc;

use super::super::digits::{self, Style};
use super::super::evaluate::Given;
use super::super::lexer::is_blank;
use super::super::meter::Meter;
use super::super::value::Value;
use super::super::{Failure, letters, operate};
use super::{int_argument, text_argument};

/// Bytes of a text that is read as a number: Python reads integers of up to 4300 digits.
const MAX_NUMBER_BYTES: usize = 4096;

pub(super) fn call(
    meter: &Rc<Meter>,
    name: &str,
    value: &Value,
    given: Given,
) -> Result<Value, Failure> {
    if let Value::Undefined(words) = value {
        return Err(Failure::new(words.to_string()));
    }
    if let Value::Text(text) = value {
        meter.scan(text.text.len())?;
        if text.text.trim_matches(is_blank).len() > MAX_NUMBER_BYTES {
            let message = format!("a number had more than {MAX_NUMBER_BYTES} bytes");
            return Err(Failure::Limit(message));
        }
    }
    match name {
        "abs" => {
            given.bind(name, [])?;
            match (value, value.as_int()) {
                (Value::Float(value), _) => Ok(Value::Float(value.abs())),
                (_, Some(value)) => {
                    value.checked_abs().map(Value::int).ok_or_else(operate::too_large)
                }
                _ => {
                    Err(Failure::new(format!("bad operand type for abs(): {}", value.type_name())))
                }
            }
        }
        "int" => {
            let [default, base] = given.bind(name, ["default", "base"])?;
            let default = default.unwrap_or(Value::int(0));
            let base = int_argument(base.as_ref(), 10)?;
            Ok(to_int(value, base)?.map_or(default, Value::int))
        }
        "float" => {
            let [default] = given.bind(name, ["default"])?;
            let found = match value {
                Value::Text(text) => parse_float(&text.text),
                _ => value.as_float(),
            };
            Ok(found.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "round" => round(value, given),
        _ => {
            let [binary] = given.bind(name, ["binary"])?;
            let bytes = match value {
                Value::Text(text) => parse_float(&text.text),
                _ => value.as_float(),
            };
            let bytes = bytes.ok_or_else(|| Failure::new("could not convert to float"))?;
            if bytes == f64::NEG_INFINITY {
                return Err(Failure::new("cannot convert float infinity to integer"));
            }
            Value::text(meter, file_size(bytes, binary.is_some_and(|binary| binary.is_true())))
        }
    }
}

fn file_size(bytes: f64, binary: bool) -> String {
    let (base, middle) = if binary { (1024.0_f64, "i") } else { (1000.0, "") };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        // An integer in Python: all its digits, and no -0.
        return format!("{:.0} Bytes", bytes.trunc() + 0.0);
    }
    let letters = [if binary { 'K' } else { 'k' }, 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'];
    let whole_base = base as i128;
    for (index, letter) in letters.iter().enumerate() {
        // Below 2^90 for the last letter.
        let unit = whole_base.pow(index as u32 + 2);
        // As Python compares them: the float nearest to an integer may lie below it.
        let is_less = operate::exact_int(bytes.floor()).is_some_and(|whole| whole < unit);
        if is_less || index + 1 == letters.len() {
            let size = digits::float(base * bytes / unit as f64, Style::Fixed, 1, false);
            return format!("{size} {letter}{middle}B");
        }
    }
    String::new()
}

/// Digits as Python reads them, of any script, with single underscores between what `joins`.
fn plain_digits(text: &str, joins: fn(char) -> bool) -> Option<String> {
    let text = text.trim_matches(is_blank);
    if text.starts_with('_') || text.ends_with('_') || text.contains("__") {
        return None;
    }
    let between = text.split('_').collect::<Vec<_>>();
    let all_join =
        between.windows(2).all(|pair| pair[0].ends_with(joins) && pair[1].starts_with(joins));
    let plain = between.concat();
    let ascii = |character: char| {
        letters::decimal_value(character).and_then(|digit| char::from_digit(digit, 10))
    };
    all_join.then(|| plain.chars().map(|c| ascii(c).unwrap_or(c)).collect())
}

fn parse_float(text: &str) -> Option<f64> {
    let plain = plain_digits(text, letters::is_decimal)?;
    let unsigned = plain.strip_prefix(['+', '-']).unwrap_or(&plain).to_ascii_lowercase();
    let named = matches!(&*unsigned, "inf" | "infinity" | "nan");
    let begins = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if named || begins { plain.parse().ok() } else { None }
}

fn parse_int(text: &str, base: u32) -> Result<Option<i128>, Failure> {
    let Some(plain) = plain_digits(text, letters::is_alnum) else { return Ok(None) };
    let negative = plain.starts_with('-');
    let digits = plain.strip_prefix(['+', '-']).unwrap_or(&plain);
    let lower = digits.to_ascii_lowercase();
    let (base, digits) = match (lower.get(..2), base) {
        (Some("0b"), 2 | 0) => (2, &lower[2..]),
        (Some("0o"), 8 | 0) => (8, &lower[2..]),
        (Some("0x"), 16 | 0) => (16, &lower[2..]),
        (_, 0) if lower.starts_with('0') && lower.bytes().any(|byte| byte != b'0') => {
            return Ok(None);
        }
        (_, 0) => (10, &*lower),
        (_, base) => (base, &*lower),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(base)) {
        return Ok(None);
    }
    let value = i128::from_str_radix(digits, base)
        .map_err(|_| Failure::Limit("an integer had more than 127 bits".into()))?;
    Ok(Some(if negative { -value } else { value }))
}

fn to_int(value: &Value, base: i128) -> Result<Option<i128>, Failure> {
    let truncated = |value: f64| {
        if !value.is_finite() {
            return Ok(None);
        }
        let large = || Failure::Limit("an integer had more than 127 bits".into());
        operate::exact_int(value.trunc()).map(Some).ok_or_else(large)
    };
    match value {
        Value::Text(text) => {
            // Python takes a base that it does not know for a wrong number.
            let base =
                u32::try_from(base).ok().filter(|&base| base == 0 || (2..=36).contains(&base));
            let whole = match base {
                Some(base) => parse_int(&text.text, base)?,
                None => None,
            };
            match (whole, parse_float(&text.text)) {
                (Some(whole), _) => Ok(Some(whole)),
                (None, Some(value)) => truncated(value),
                (None, None) => Ok(None),
            }
        }
        Value::Float(value) if value.is_infinite() => {
            Err(Failure::new("cannot convert float infinity to integer"))
        }
        Value::Float(value) => truncated(*value),
        _ => Ok(value.as_int()),
    }
}

/// A float rounded to `places` before the point as its exact decimal value says, halves to even.
fn round_left(value: f64, places: usize) -> f64 {
    if !value.is_finite() {
        return value;
    }
    let whole = format!("{:.0}", value.abs().trunc());
    // Whether anything of the value lies behind its integer.
    let more = value.fract() != 0.0;
    let kept = whole.len().saturating_sub(places);
    let padded = format!("{whole:0>width$}", width = places);
    let (head, tail) = padded.split_at(kept);
    let half = format!("5{}", "0".repeat(places - 1));
    let odd = head.bytes().next_back().is_some_and(|digit| digit % 2 == 1);
    let up = match tail.cmp(&half) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => more || odd,
        std::cmp::Ordering::Greater => true,
    };
    // One more at the place that is kept, as digits: the sum of floats could be rounded.
    let mut digits: Vec<u8> = format!("0{head}").into_bytes();
    let mut at = digits.len();
    while up && at > 0 {
        at -= 1;
        if digits[at] == b'9' {
            digits[at] = b'0';
        } else {
            digits[at] += 1;
            break;
        }
    }
    let digits = String::from_utf8(digits).unwrap_or_default();
    let size: f64 = format!("{digits}{}", "0".repeat(places)).parse().unwrap_or(value.abs());
    size.copysign(value)
}

fn round(value: &Value, given: Given) -> Result<Value, Failure> {
    let [precision, method] = given.bind("round", ["precision", "method"])?;
    let precision = int_argument(precision.as_ref(), 0)?;
    let method = match &method {
        None => "common".to_owned(),
        Some(_) => text_argument(method.as_ref(), "round")?.text.clone(),
    };
    let small = i32::try_from(precision).ok().filter(|small| small.abs() <= 30);
    let small = small.ok_or_else(|| Failure::new("round's precision is beyond 30"))?;
    let wrong = || Failure::new(format!("round of a {}", value.type_name()));
    match &*method {
        "common" => match (value, value.as_int()) {
            (Value::Float(value), _) => {
                if small >= 0 {
                    // Rust, like Python, rounds the exact decimal value, halves to even.
                    let digits = format!("{value:.0$}", small as usize);
                    return Ok(Value::Float(digits.parse().unwrap_or(*value)));
                }
                Ok(Value::Float(round_left(*value, small.unsigned_abs() as usize)))
            }
            (_, Some(whole)) if small < 0 => {
                let unit = 10_i128.pow(small.unsigned_abs());
                let (quotient, rest) = (whole.div_euclid(unit), whole.rem_euclid(unit));
                let up = rest * 2 > unit || (rest * 2 == unit && quotient % 2 != 0);
                let rounded = (quotient + i128::from(up)).checked_mul(unit);
                let large = || Failure::Limit("an integer had more than 127 bits".into());
                rounded.map(Value::int).ok_or_else(large)
            }
            (_, Some(whole)) => Ok(Value::int(whole)),
            _ => Err(wrong()),
        },
        "ceil" | "floor" => {
            let up = method == "ceil";
            // An integer in Python: none is infinite, and there is no -0.
            let rounded = |value: f64| match value.is_finite() {
                true => Ok(if up { value.ceil() } else { value.floor() } + 0.0),
                false => Err(Failure::new("cannot convert a float that is no number to integer")),
            };
            if small < 0 {
                let unit = 10_f64.powf(f64::from(small));
                let value = value.as_float().ok_or_else(wrong)?;
                return Ok(Value::Float(rounded(value * unit)? / unit));
            }
            let unit = 10_i128.pow(small.unsigned_abs());
            let scaled = match (value, value.as_int()) {
                (Value::Float(value), _) => operate::exact_int(rounded(value * unit as f64)?),
                (_, Some(value)) => value.checked_mul(unit),
                _ => return Err(wrong()),
            };
            let scaled = scaled.ok_or_else(operate::too_large)?;
            Ok(Value::Float(operate::quotient(scaled, unit)))
        }
        _ => Err(Failure::new("method must be common, ceil or floor")),
    }
}
