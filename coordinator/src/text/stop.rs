//! Texts that end an answer, found wherever tokens cut them.

/// Looks for stop strings in text that comes in pieces, and holds back what may begin one.
///
/// The match is the one that ends first, and of those that end together the longest: a function
/// of the whole text, not of how it was cut.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    include_stop: bool,
    /// The longest end of the text so far that is a proper beginning of a stop string.
    held: String,
}

/// A stop string was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StopMatch {
    /// Which one.
    pub(crate) stop: String,
}

impl StopMatcher {
    /// Looks for `stops`, none of them empty; `include_stop` keeps the one found in the text.
    pub(crate) fn new(stops: Vec<String>, include_stop: bool) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()), "checked with the request");
        Self { stops, include_stop, held: String::new() }
    }

    /// Takes more text; gives the text that no stop string can begin in any more, and the match
    /// that ends the answer. Nothing may be pushed after a match.
    pub(crate) fn push(&mut self, text: &str) -> (String, Option<StopMatch>) {
        if self.stops.is_empty() {
            return (text.to_owned(), None);
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start, stop)))
            .min_by_key(|(start, stop)| (start + stop.len(), *start));
        if let Some((start, stop)) = found {
            let end = if self.include_stop { start + stop.len() } else { start };
            let matched = StopMatch { stop: stop.clone() };
            let mut text = std::mem::take(&mut self.held);
            text.truncate(end);
            return (text, Some(matched));
        }
        let held = self.held.split_off(self.held.len() - self.held_back_bytes());
        (std::mem::replace(&mut self.held, held), None)
    }

    /// What was held back: the answer ended for another reason.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of `held` that is a proper beginning of a stop string.
    fn held_back_bytes(&self) -> usize {
        let held = self.held.as_str();
        let beginnings = self.stops.iter().flat_map(|stop| {
            (1..stop.len())
                .filter(|&bytes| stop.is_char_boundary(bytes))
                .map(|bytes| &stop[..bytes])
        });
        beginnings.filter(|beginning| held.ends_with(beginning)).map(str::len).max().unwrap_or(0)
    }
}
