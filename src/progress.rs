//! Shows how far long work has come: a bar on a terminal, plain lines otherwise, on standard
//! error.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Plain lines come at every tenth part: enough to see that it goes on.
const PLAIN_LINES: u64 = 10;

/// Progress of one piece of work.
pub(crate) enum Progress {
    /// On a terminal.
    Bar(ProgressBar),
    /// In a log.
    Plain {
        /// What is being done: `importing`.
        verb: &'static str,
        /// Lines written so far.
        lines: u64,
    },
    /// Nobody is to see it.
    Hidden,
}

impl Progress {
    /// Shows work called `verb`, unless `quiet`.
    pub(crate) fn new(verb: &'static str, quiet: bool) -> Self {
        if quiet {
            return Self::Hidden;
        }
        if !io::stderr().is_terminal() {
            return Self::Plain { verb, lines: 0 };
        }
        // Nothing is shown before it is known how much there is: a bar of no parts looks full.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let template = "{prefix} {bar:30} {pos}/{len} {msg} ({eta})";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(verb);
        Self::Bar(bar)
    }

    /// `done` of `total` parts are finished; `what` is next.
    pub(crate) fn show(&mut self, what: &str, done: u64, total: u64) {
        match self {
            Self::Hidden => {}
            Self::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                if bar.is_hidden() && total > 0 {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                }
                bar.set_message(what.to_owned());
            }
            Self::Plain { verb, lines } => {
                if let Some(line) = plain_line(lines, verb, what, done, total) {
                    // A line that cannot be written holds up no work.
                    let _ = writeln!(io::stderr(), "{line}");
                }
            }
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// The line that is due, if one is.
fn plain_line(lines: &mut u64, verb: &str, what: &str, done: u64, total: u64) -> Option<String> {
    let part = done.saturating_mul(PLAIN_LINES) / total.max(1);
    if *lines > part {
        return None;
    }
    *lines = part + 1;
    Some(format!("{verb}: {done} of {total}, {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_are_few_and_the_last_says_all() {
        let mut lines = 0;
        let shown: Vec<_> = (0..=1000)
            .filter_map(|done| plain_line(&mut lines, "importing", "layer", done, 1000))
            .collect();
        assert_eq!(shown.len(), 11);
        assert_eq!(shown[0], "importing: 0 of 1000, layer");
        assert_eq!(shown[10], "importing: 1000 of 1000, layer");
        assert_eq!(plain_line(&mut 0, "v", "w", 0, 0).unwrap(), "v: 0 of 0, w", "no division by 0");
    }
}
