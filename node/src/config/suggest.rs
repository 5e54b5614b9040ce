//! What was probably meant by a name that nobody knows.

/// How much two names must have in common (0 to 1, by Jaro and Winkler) for one to be a slip of the
/// other: the measure and the bound by which the command line suggests flags.
const LIKENESS_MIN: f64 = 0.8;

/// The one of `known` that is most like `name`, if one is like it.
pub fn closest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |known: &'a str| (strsim::jaro_winkler(name, known), known);
    let best = known.into_iter().map(likeness).max_by(|a, b| a.0.total_cmp(&b.0));
    best.filter(|&(likeness, _)| likeness >= LIKENESS_MIN).map(|(_, known)| known)
}

/// As the end of a sentence.
pub(super) fn hint(meant: Option<&str>) -> String {
    meant.map(|meant| format!(", did you mean {meant}?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_a_stranger_is_not() {
        let known = ["TERCET_ENDPOINT", "TERCET_CLUSTER", "TERCET_ETCD__USER"];
        assert_eq!(closest("TERCET_ENDPONT", known), Some("TERCET_ENDPOINT"));
        assert_eq!(closest("threds", ["threads", "store"]), Some("threads"));
        assert_eq!(closest("colour", ["threads", "store"]), None);
        assert_eq!(closest("x", []), None);
        assert_eq!(hint(Some("a")), ", did you mean a?");
    }
}
