//! Sizes and times as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is no size or no time.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {expected}")]
pub struct UnitError {
    text: String,
    expected: &'static str,
}

const SIZE_EXPECTED: &str = "a size such as 4GiB, 512MB or 1048576";
const TIME_EXPECTED: &str = "a time such as 500ms, 5s or 2m";

/// A number of bytes: `4GiB`, `512MB`, `1.5KiB`, `1048576`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Units of size, longest names first so that `KiB` is not read as `B`.
const SIZE_UNITS: [(&str, u64); 10] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

impl ByteSize {
    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = || UnitError { text: text.to_owned(), expected: SIZE_EXPECTED };
        let (number, unit) = SIZE_UNITS
            .iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
            .unwrap_or((text, 1));
        let bytes = scale(number, unit).ok_or_else(error)?;
        u64::try_from(bytes).map(Self).map_err(|_| error())
    }
}

impl fmt::Display for ByteSize {
    /// The largest binary unit that divides it, so that it reads back to the same number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, unit) in SIZE_UNITS[..4].iter().rev() {
            if self.0 >= *unit && self.0.is_multiple_of(*unit) {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A span of time: `500ms`, `5s`, `1.5m`, `2h`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration(pub std::time::Duration);

/// Units of time in nanoseconds, longest names first so that `ms` is not read as `s`.
const TIME_UNITS: [(&str, u64); 7] = [
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

impl Duration {
    /// So many seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(std::time::Duration::from_secs(seconds))
    }

    /// So many milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(std::time::Duration::from_millis(milliseconds))
    }

    /// The span of time.
    pub const fn get(self) -> std::time::Duration {
        self.0
    }
}

impl From<std::time::Duration> for Duration {
    fn from(duration: std::time::Duration) -> Self {
        Self(duration)
    }
}

impl From<Duration> for std::time::Duration {
    fn from(duration: Duration) -> Self {
        duration.0
    }
}

impl FromStr for Duration {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = || UnitError { text: text.to_owned(), expected: TIME_EXPECTED };
        let (number, unit) = TIME_UNITS
            .iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
            .ok_or_else(error)?;
        let nanoseconds = scale(number, unit).ok_or_else(error)?;
        let nanoseconds = u64::try_from(nanoseconds).map_err(|_| error())?;
        Ok(Self(std::time::Duration::from_nanos(nanoseconds)))
    }
}

impl fmt::Display for Duration {
    /// The largest unit that divides it, so that it reads back to the same time.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        if nanoseconds == 0 {
            return f.write_str("0s");
        }
        for (name, unit) in TIME_UNITS.iter().rev() {
            let unit = u128::from(*unit);
            if nanoseconds.is_multiple_of(unit) {
                return write!(f, "{}{name}", nanoseconds / unit);
            }
        }
        Ok(())
    }
}

/// `number * unit` for a decimal number without sign or exponent; `None` if it is none or too
/// large. What is finer than one is cut off.
fn scale(number: &str, unit: u64) -> Option<u128> {
    let number = number.trim_end();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Twenty digits are all that a u64 has, and few enough for the products below.
    let digits = |text: &str| {
        (1..=20).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let unit = u128::from(unit);
    let power = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction = fraction.parse::<u128>().ok()?.checked_mul(unit)? / power;
    whole.parse::<u128>().ok()?.checked_mul(unit)?.checked_add(fraction)
}

/// Serialises as the text that reads back to the same value.
macro_rules! serde_as_text {
    ($type:ty, $expected:expr, $from_u64:expr) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$type, E> {
                        let from: Option<fn(u64) -> $type> = $from_u64;
                        from.map(|from| from(number))
                            .ok_or_else(|| E::invalid_type(de::Unexpected::Unsigned(number), &self))
                    }

                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$type, E> {
                        match u64::try_from(number) {
                            Ok(number) => self.visit_u64(number),
                            Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
                        }
                    }
                }
                deserializer.deserialize_any(Text)
            }
        }
    };
}

serde_as_text!(ByteSize, SIZE_EXPECTED, Some(ByteSize));
// A bare number has no unit, and there is none that everyone would guess.
serde_as_text!(Duration, TIME_EXPECTED, None);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("7B", 7),
            ("4GiB", 4 << 30),
            ("512MB", 512_000_000),
            ("1.5KiB", 1536),
            ("2 TiB", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in
            ["", "GiB", "-1", "1e3", "4gib", "1..2", "1.", "0x10", "16777216TiB", "²", "1 000"]
        {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, nanoseconds) in
            [("500ms", 500_000_000), ("5s", 5_000_000_000), ("1.5m", 90_000_000_000), ("0s", 0)]
        {
            let wanted = std::time::Duration::from_nanos(nanoseconds);
            assert_eq!(text.parse(), Ok(Duration(wanted)), "{text}");
        }
        for text in ["", "5", "s", "-1s", "5 parsecs", "1h30m", "99999999999999d"] {
            assert!(text.parse::<Duration>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_shown_reads_back() {
        for bytes in [0, 1, 1023, 1024, 1536, 1 << 30, (1 << 30) + 1, 3 << 40, u64::MAX] {
            let size = ByteSize(bytes);
            assert_eq!(size.to_string().parse(), Ok(size), "{size}");
        }
        assert_eq!(ByteSize(4 << 30).to_string(), "4GiB");
        for nanoseconds in [0, 1, 999, 1_000, 1_500_000, 90_000_000_000, 86_400_000_000_000] {
            let time = Duration(std::time::Duration::from_nanos(nanoseconds));
            assert_eq!(time.to_string().parse(), Ok(time), "{time}");
        }
        assert_eq!(Duration::from_secs(5).to_string(), "5s");
        assert_eq!(Duration::from_secs(120).to_string(), "2m");
    }
}
