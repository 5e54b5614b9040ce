//! Dates as glibc's `strftime` writes them in the C locale, in UTC: what Python's gives on Linux.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// 1970-01-01 was a Thursday.
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Digits of one field: more than any date has.
const MAX_WIDTH: usize = 32;

/// A moment's parts.
#[derive(Clone, Copy)]
struct Moment {
    unix_s: u64,
    year: u64,
    /// 1 to 12.
    month: u64,
    /// 1 to 31.
    day: u64,
    /// 0 to 365.
    day_of_year: u64,
    /// 0 is Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

/// The parts of `format` at `unix_s` seconds since 1970, one after another, each short.
///
/// # Errors
///
/// A part is the sentence to say if its width is beyond any date's.
pub(super) fn parts(format: &str, unix_s: u64) -> impl Iterator<Item = Result<String, String>> {
    let moment = Moment::at(unix_s);
    let mut rest = format;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let literal = rest.find('%').unwrap_or(rest.len());
        if literal > 0 {
            let (text, after) = rest.split_at(literal);
            rest = after;
            return Some(Ok(text.to_owned()));
        }
        let (part, len) = directive(&rest[1..], &moment);
        let len = 1 + len;
        let part = match part {
            Some(part) => part,
            // An unknown one stays as it is.
            None => Ok(rest[..len].to_owned()),
        };
        rest = &rest[len..];
        Some(part)
    })
}

/// `format` at `unix_s`, for tests.
#[cfg(test)]
pub(crate) fn strftime(format: &str, unix_s: u64) -> String {
    parts(format, unix_s).collect::<Result<_, _>>().unwrap()
}

/// What the directive after a `%` writes, and its length.
fn directive(text: &str, moment: &Moment) -> (Option<Result<String, String>>, usize) {
    let bytes = text.as_bytes();
    let mut at = 0;
    let (mut pad, mut upper, mut swap) = (None, false, false);
    while let Some(&flag) = bytes.get(at) {
        match flag {
            b'-' | b'_' | b'0' | b'+' => pad = Some(flag),
            b'^' => upper = true,
            b'#' => swap = true,
            _ => break,
        }
        at += 1;
    }
    let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let width = if digits == 0 { Some(0) } else { text[at..at + digits].parse().ok() };
    at += digits;
    let Some(width) = width.filter(|&width: &usize| width <= MAX_WIDTH) else {
        return (Some(Err(format!("a date's field is at most {MAX_WIDTH} wide"))), text.len());
    };
    // Other calendars and digits: the C locale has none.
    if matches!(bytes.get(at), Some(b'E' | b'O')) {
        at += 1;
    }
    let Some(kind) = text[at..].chars().next() else { return (None, text.len()) };
    let len = at + kind.len_utf8();
    let style = Style { pad, upper, swap, width };
    (moment.field(kind, style).map(Ok), len)
}

/// How a field was asked for.
#[derive(Clone, Copy)]
struct Style {
    pad: Option<u8>,
    upper: bool,
    swap: bool,
    width: usize,
}

impl Style {
    /// A number with so many digits, filled with `fill` unless told otherwise.
    fn number(self, value: u64, digits: usize, fill: char) -> String {
        let text = value.to_string();
        let (fill, digits) = match self.pad {
            Some(b'-') => return format!("{text:0>width$}", width = self.width),
            Some(b'_') => (' ', digits),
            Some(b'0' | b'+') => ('0', digits),
            _ => (fill, digits),
        };
        let missing = digits.max(self.width).saturating_sub(text.len());
        format!("{}{text}", String::from(fill).repeat(missing))
    }

    fn text(self, text: &str) -> String {
        let text = if self.upper { text.to_uppercase() } else { text.to_owned() };
        let fill = if matches!(self.pad, Some(b'0' | b'+')) { "0" } else { " " };
        format!("{}{text}", fill.repeat(self.width.saturating_sub(text.chars().count())))
    }
}

impl Moment {
    fn at(unix_s: u64) -> Self {
        let (days, second_of_day) = (unix_s / 86_400, unix_s % 86_400);
        let (year, month, day) = civil_from_days(days);
        let is_leap =
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
        let leap_day = u64::from(month > 2 && is_leap);
        Self {
            unix_s,
            year,
            month,
            day,
            day_of_year: before + leap_day + day - 1,
            weekday: (days + 4) % 7,
            hour: second_of_day / 3600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
        }
    }

    /// The year and week of ISO 8601.
    fn iso_week(&self) -> (u64, u64) {
        let weeks_of = |year: u64| {
            // The weekday of its last day; years begin and end on the same one, or the next.
            let last = |year: u64| (year + year / 4 - year / 100 + year / 400) % 7;
            if last(year) == 4 || last(year - 1) == 3 { 53 } else { 52 }
        };
        let weekday = (self.weekday + 6) % 7 + 1;
        let week = (self.day_of_year + 1 + 10 - weekday) / 7;
        if week == 0 {
            (self.year - 1, weeks_of(self.year - 1))
        } else if week > weeks_of(self.year) {
            (self.year + 1, 1)
        } else {
            (self.year, week)
        }
    }

    fn several(&self, format: &str, style: Style) -> String {
        let text: String = parts(format, self.unix_s).filter_map(Result::ok).collect();
        style.text(&text)
    }

    fn field(&self, kind: char, style: Style) -> Option<String> {
        let month = MONTHS[self.month as usize - 1];
        let weekday = WEEKDAYS[self.weekday as usize];
        let hour_of_12 = (self.hour + 11) % 12 + 1;
        let half = if self.hour < 12 { "AM" } else { "PM" };
        // `#` makes names large, and what is large small.
        let named = |text: &str| Style { upper: style.upper || style.swap, ..style }.text(text);
        let two = |value| style.number(value, 2, '0');
        Some(match kind {
            'Y' => style.number(self.year, 1, '0'),
            'C' => two(self.year / 100),
            'y' => two(self.year % 100),
            'G' => style.number(self.iso_week().0, 1, '0'),
            'g' => two(self.iso_week().0 % 100),
            'm' => two(self.month),
            'd' => two(self.day),
            'e' => style.number(self.day, 2, ' '),
            'j' => style.number(self.day_of_year + 1, 3, '0'),
            'U' => two((self.day_of_year + 7 - self.weekday) / 7),
            'W' => two((self.day_of_year + 7 - (self.weekday + 6) % 7) / 7),
            'V' => two(self.iso_week().1),
            'u' => style.number((self.weekday + 6) % 7 + 1, 1, '0'),
            'w' => style.number(self.weekday, 1, '0'),
            'H' => two(self.hour),
            'I' => two(hour_of_12),
            'k' => style.number(self.hour, 2, ' '),
            'l' => style.number(hour_of_12, 2, ' '),
            'M' => two(self.minute),
            'S' => two(self.second),
            's' => style.number(self.unix_s, 1, '0'),
            // Python gives microseconds here, and this clock shows seconds.
            'f' => "000000".into(),
            'B' => named(month),
            'b' | 'h' => named(&month[..3]),
            'A' => named(weekday),
            'a' => named(&weekday[..3]),
            'p' if style.swap => style.text(&half.to_lowercase()),
            'p' => style.text(half),
            'P' => Style { upper: false, ..style }.text(&half.to_lowercase()),
            'D' | 'x' => self.several("%m/%d/%y", style),
            'F' => self.several("%Y-%m-%d", style),
            'T' | 'X' => self.several("%H:%M:%S", style),
            'R' => self.several("%H:%M", style),
            'r' => self.several("%I:%M:%S %p", style),
            'c' => self.several("%a %b %e %H:%M:%S %Y", style),
            // A Python clock without a zone writes nothing for these.
            'Z' | 'z' => style.text(""),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            _ => return None,
        })
    }
}

/// Year, month (1..=12) and day (1..=31) of a day counted from 1970-01-01.
///
/// Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}
