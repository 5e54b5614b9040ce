//! Numbers as texts: what `%` and `format` share.

use super::meter::Writer;
use super::{Failure, write};

/// Digits after the point, or characters of a width, that one field may ask for: far beyond any
/// template's.
pub(super) const MAX_DIGITS: usize = 4096;

/// How a float is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Exponent,
    Fixed,
    General,
}

/// The digits of a finite float that is not negative, or its name.
pub(super) fn float(value: f64, style: Style, precision: usize, alternate: bool) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return "inf".into();
    }
    match style {
        Style::Fixed => {
            let fixed = format!("{value:.precision$}");
            if alternate && precision == 0 { fixed + "." } else { fixed }
        }
        Style::Exponent => {
            let written = format!("{value:.precision$e}");
            let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
            let dot = if alternate && precision == 0 { "." } else { "" };
            format!("{digits}{dot}{}", exponent_text(exponent))
        }
        Style::General => {
            let precision = precision.max(1);
            let written = format!("{value:.0$e}", precision - 1);
            let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
            let exponent_number: i64 = exponent.parse().unwrap_or(0);
            if (-4..precision as i64).contains(&exponent_number) {
                let after = (precision as i64 - 1 - exponent_number).max(0) as usize;
                let fixed = format!("{value:.after$}");
                if alternate { with_dot(fixed) } else { without_zeros(fixed) }
            } else {
                let digits = digits.to_owned();
                let digits = if alternate { with_dot(digits) } else { without_zeros(digits) };
                format!("{digits}{}", exponent_text(exponent))
            }
        }
    }
}

/// `repr` of a float with at most `precision` digits: what a field without a type asks for.
/// `alternate` keeps the point and the zeros behind it.
pub(super) fn plain(value: f64, precision: Option<usize>, alternate: bool) -> String {
    let Some(precision) = precision else {
        let written = write::float(value);
        return match written.split_once('e') {
            Some((digits, exponent)) if alternate => {
                format!("{}e{exponent}", with_dot(digits.to_owned()))
            }
            _ => written,
        };
    };
    // As general, but with a digit after the point, and exponents from one digit earlier on.
    let precision = precision.max(1);
    let written = format!("{value:.0$e}", precision - 1);
    let exponent_number: i64 = written.split_once('e').map_or(0, |(_, e)| e.parse().unwrap_or(0));
    if alternate && value.is_finite() {
        return match written.split_once('e') {
            Some((digits, exponent)) if !(-4..precision as i64 - 1).contains(&exponent_number) => {
                format!("{}{}", with_dot(digits.to_owned()), exponent_text(exponent))
            }
            _ => {
                let after = (precision as i64 - 1 - exponent_number).max(0) as usize;
                with_dot(format!("{value:.after$}"))
            }
        };
    }
    if !value.is_finite() || !(-4..precision as i64 - 1).contains(&exponent_number) {
        let general = float(value, Style::General, precision, false);
        let is_fixed = !general.contains(['e', 'n', 'i']);
        if is_fixed && precision as i64 - 1 == exponent_number {
            let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
            return format!("{}{}", without_zeros(digits.to_owned()), exponent_text(exponent));
        }
        return general;
    }
    let general = float(value, Style::General, precision, false);
    if general.contains('.') { general } else { general + ".0" }
}

fn exponent_text(exponent: &str) -> String {
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent),
    };
    format!("e{sign}{digits:0>2}")
}

fn without_zeros(digits: String) -> String {
    if !digits.contains('.') {
        return digits;
    }
    digits.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn with_dot(digits: String) -> String {
    if digits.contains('.') { digits } else { digits + "." }
}

/// The digits of an integer that is not negative.
pub(super) fn integer(value: u128, radix: u32, upper: bool) -> String {
    match (radix, upper) {
        (2, _) => format!("{value:b}"),
        (8, _) => format!("{value:o}"),
        (16, false) => format!("{value:x}"),
        (16, true) => format!("{value:X}"),
        _ => value.to_string(),
    }
}

/// Where a text stands in its field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
    Center,
    /// After the sign.
    Sign,
}

/// Writes `sign` and `body` in a field of `width` characters.
pub(super) fn pad(
    out: &mut Writer,
    sign: &str,
    body: &str,
    width: usize,
    fill: char,
    align: Align,
) -> Result<(), Failure> {
    out.meter().scan(body.len())?;
    let missing = width.saturating_sub(sign.chars().count() + body.chars().count());
    let (before, between, after) = match align {
        Align::Left => (0, 0, missing),
        Align::Right => (missing, 0, 0),
        Align::Center => (missing / 2, 0, missing - missing / 2),
        Align::Sign => (0, missing, 0),
    };
    let mut letter = [0; 4];
    let fill = &*fill.encode_utf8(&mut letter);
    out.repeat(fill, before)?;
    out.push_str(sign)?;
    out.repeat(fill, between)?;
    out.push_str(body)?;
    out.repeat(fill, after)
}

/// A width or precision, read from `digits`.
///
/// # Errors
///
/// If it is beyond [`MAX_DIGITS`].
pub(super) fn bounded(digits: &str) -> Result<usize, Failure> {
    digits.parse().ok().filter(|&value| value <= MAX_DIGITS).ok_or_else(too_wide)
}

/// What a field is told that asks for more.
pub(super) fn too_wide() -> Failure {
    Failure::Limit(format!("a field had more than {MAX_DIGITS} characters"))
}
