//! The language against Jinja2 itself: `tests/jinja` holds the cases and what Jinja2 3.1 makes of
//! them, written by `render.py` there.

use serde_json::Value;

use super::{CompileError, Failure, Json, Meter, Program};

/// 2025-11-22 11:30:00, the clock of `render.py`.
const NOW_UNIX_S: u64 = 1_763_811_000;

/// Errors are `None`, and so is what Jinja2 has and this has not, which must be named.
fn render(source: &str, context: &[(String, Json)]) -> Result<String, String> {
    let program = match Program::parse(source) {
        Ok(program) => program,
        Err(error @ CompileError::Unsupported { .. }) => {
            return Err(format!("unsupported: {error}"));
        }
        Err(error) => return Err(format!("compile: {error}")),
    };
    program.render(context, NOW_UNIX_S, &Meter::new(None)).map_err(|failure| match failure {
        Failure::Raised(words) => format!("raised: {words}"),
        Failure::Limit(words) => format!("limit: {words}"),
        Failure::Error(words) => format!("error: {words}"),
    })
}

fn entries(json: Json) -> Vec<(String, Json)> {
    let Json::Dict(entries) = json else { panic!("{json:?} is no object") };
    entries
}

fn check(name: &str, source: &str, context: &[(String, Json)], want: &Value) -> Option<String> {
    let found = render(source, context);
    let agrees = match (&found, want.as_str()) {
        (Ok(found), Some(want)) => found == want,
        (Err(_), None) => true,
        (Err(why), Some(_)) => why.starts_with("unsupported"),
        (Ok(_), None) => false,
    };
    (!agrees).then(|| format!("{name}\n   ours: {found:?}\n   want: {want}"))
}

#[test]
fn every_case_is_written_as_jinja2_writes_it() {
    let json = |text| Json::parse(text).unwrap();
    let context = entries(json(include_str!("../../../tests/jinja/context.json")));
    let expected: Value =
        serde_json::from_str(include_str!("../../../tests/jinja/expected.json")).unwrap();
    let Json::List(templates) = json(include_str!("../../../tests/jinja/templates.json")) else {
        panic!("templates.json holds a list");
    };
    let expressions = expected["expressions"].as_object().unwrap();
    let mut count = 0;
    let mut differences: Vec<String> = expressions
        .iter()
        .filter_map(|(text, want)| check(text, &format!("{{{{ {text} }}}}"), &context, want))
        .collect();
    for case in templates {
        let case = entries(case);
        let part = |name| case.iter().find(|(other, _)| other == name).map(|(_, json)| json);
        let (Some(Json::Text(name)), Some(Json::Text(source))) = (part("name"), part("template"))
        else {
            panic!("a case has a name and a template");
        };
        let own = part("context").map(|context| entries(context.clone()));
        let told = format!("{name}: {}", source.chars().take(300).collect::<String>());
        let context = own.as_ref().unwrap_or(&context);
        differences.extend(check(&told, source, context, &expected["templates"][name]));
        count += 1;
    }
    assert_eq!(count, expected["templates"].as_object().unwrap().len());
    assert!(expressions.len() >= 200 && count >= 200, "cases are missing");
    assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
}

/// What `source` writes with nothing given.
fn written(source: &str) -> Result<String, String> {
    render(source, &[])
}

/// The first letters of what went wrong.
fn refused(source: &str) -> String {
    let error = written(source).expect_err(source);
    assert!(error.len() < 300, "{source}: {}", &error[..300]);
    error
}

#[test]
fn many_equal_keys_are_walked_through_once() {
    let dict = format!("{{{}\"a\": 1}}", "\"a\": 0, ".repeat(60_000));
    let context = [("d".to_owned(), Json::parse(&dict).unwrap())];
    assert_eq!(render("{{ d }}", &context).unwrap(), "{'a': 1}");
    assert_eq!(written("{{ dict([('a', 1), ('b', 2)] * 90000) }}").unwrap(), "{'a': 1, 'b': 2}");
    assert!(refused("{{ dict([('a', 1)] * 1000000) }}").starts_with("limit: "));
}

#[test]
fn foreign_names_are_cut_or_refused() {
    let long = "a".repeat(200);
    let short = "a".repeat(64);
    for (source, want) in [
        (format!("{{{{ {long}.b }}}}"), format!("error: \"{short}\" is undefined")),
        (
            format!("{{{{ ({{}}|attr('{long}')).b }}}}"),
            format!("error: 'dict object' has no attribute \"{short}\""),
        ),
        (
            format!("{{% macro f({long}) %}}{{{{ {long}.b }}}}{{% endmacro %}}{{{{ f() }}}}"),
            format!("error: parameter \"{short}\" was not provided"),
        ),
    ] {
        assert_eq!(refused(&source), want);
    }
    let longer = "a".repeat(300);
    let too_long = "compile: line 1: a name of more than 256 bytes";
    assert_eq!(refused(&format!("{{{{ {longer} }}}}")), too_long);
    let too_long = "limit: a name had more than 256 bytes";
    assert_eq!(refused("{{ dict(**{'a' * 300: 1}) }}"), too_long);
    assert_eq!(refused("{{ namespace({'a' * 300: 1}) }}"), too_long);
}

#[test]
fn attributes_of_many_parts_are_refused() {
    assert_eq!(
        refused("{{ [1]|sort(attribute=',' * 8000000) }}"),
        "limit: an attribute had more than 4096 bytes"
    );
    for source in ["{{ [{}]|map(attribute='.' * 64)|list }}", "{{ [{}]|sort(attribute=',' * 64) }}"]
    {
        assert_eq!(refused(source), "limit: an attribute had more than 64 parts");
    }
    assert_eq!(written("{{ [{'a': {'b': 1}}]|map(attribute='a.b')|list }}").unwrap(), "[1]");
}

#[test]
fn integers_at_the_bounds_are_right_or_too_large() {
    const LEAST: &str = "(-170141183460469231731687303715884105727 - 1)";
    const MOST: &str = "170141183460469231731687303715884105727";
    for (text, want) in [
        (format!("{LEAST} in range(0, -5, -1)"), "False"),
        (format!("{LEAST} in range(5)"), "False"),
        (format!("{MOST} in range(-5, 0)"), "False"),
        (format!("{LEAST} in range({LEAST}, {LEAST} + 3)"), "True"),
        (
            "[3 in range(1, 6, 2), 4 in range(1, 6, 2), 5 in range(5, 0, -1)]".into(),
            "[True, False, True]",
        ),
        (format!("{LEAST} % -1"), "0"),
        (format!("range(5, 6, {MOST})[0]"), "5"),
    ] {
        assert_eq!(written(&format!("{{{{ {text} }}}}")).as_deref(), Ok(want), "{text}");
    }
    for text in [
        format!("{LEAST}|abs"),
        format!("{LEAST} // -1"),
        format!("range(5, 6, {MOST})[:]"),
        format!("range({MOST} - 1, {MOST}, 2)[:]"),
    ] {
        let error = refused(&format!("{{{{ {text} }}}}"));
        assert_eq!(error, "limit: an integer had more than 127 bits", "{text}");
    }
}

#[test]
fn sorting_is_stable_and_ends_without_an_order() {
    for (text, want) in [
        ("[]|sort", "[]"),
        ("[1]|sort", "[1]"),
        ("[3, 1, 2]|sort", "[1, 2, 3]"),
        ("[5, 4, 3, 2, 1, 0]|sort", "[0, 1, 2, 3, 4, 5]"),
        ("['b', 'A', 'a', 'B', 'c', 'C']|sort", "['A', 'a', 'b', 'B', 'c', 'C']"),
        ("['b', 'A', 'a', 'B', 'c']|sort(reverse=true)", "['c', 'b', 'B', 'A', 'a']"),
        ("{'b': 1, 'a': 2, 'c': 0}|dictsort", "[('a', 2), ('b', 1), ('c', 0)]"),
        ("{'b': 1, 'a': 2, 'c': 0}|tojson(sort_keys=true)", r#"{"a": 2, "b": 1, "c": 0}"#),
        ("[[2, 'x'], [1, 'y'], [2, 'z']]|groupby(0)|map('first')|list", "[1, 2]"),
    ] {
        assert_eq!(written(&format!("{{{{ {text} }}}}")).as_deref(), Ok(want), "{text}");
    }
    // Every length up to a few runs, in an order that is not simple.
    for len in 0..70 {
        let sorted = written(&format!(
            "{{% set ns = namespace(l=[]) %}}{{% for i in range({len}) %}}\
             {{% set ns.l = ns.l + [i * 37 % 71] %}}{{% endfor %}}{{{{ ns.l|sort|join(' ') }}}}"
        ));
        let mut want: Vec<u32> = (0..len).map(|i| i * 37 % 71).collect();
        want.sort_unstable();
        let want: Vec<String> = want.iter().map(u32::to_string).collect();
        assert_eq!(sorted.unwrap(), want.join(" "));
    }
    let count = "{% set n = 'nan'|float %}{{ ([3, n, 1, 2, n] * 20)|sort|length }}";
    assert_eq!(written(count).unwrap(), "100");
    let error = refused("{{ ([3, 1, 2] * 20 + ['a'] + [3, 1, 2] * 20)|sort }}");
    assert!(error.starts_with("error: ") && error.ends_with("have no order"), "{error}");
}

#[test]
fn more_arguments_than_any_template_has_are_refused_at_compile() {
    let named = |count: usize| (0..count).map(|i| format!("a{i}=1,")).collect::<String>();
    let source = |count| format!("{{{{ dict({})|length }}}}", named(count));
    assert_eq!(written(&source(256)).unwrap(), "256");
    assert_eq!(refused(&source(20_000)), "compile: line 1: more than 256 named arguments");
    let parameters = |count: usize| {
        let names: Vec<String> = (0..count).map(|i| format!("a{i}")).collect();
        format!("{{% macro f({}) %}}x{{% endmacro %}}{{{{ f() }}}}", names.join(","))
    };
    assert_eq!(written(&parameters(256)).unwrap(), "x");
    assert_eq!(refused(&parameters(30_000)), "compile: line 1: more than 256 parameters");
}

#[test]
fn tables_and_texts_are_paid_for_before_they_are_made() {
    assert_eq!(written("{{ ([1, 2] * 50000)|unique|list }}").unwrap(), "[1, 2]");
    assert!(refused("{{ ([1] * 400000)|unique|list }}").starts_with("limit: it held"));
    assert_eq!(written("{{ ' 1_0 '|int }} {{ '1_'|int(7) }}").unwrap(), "10 7");
    for filter in ["int", "float", "filesizeformat"] {
        let error = refused(&format!("{{{{ ('1_' * 4000 ~ '1')|{filter} }}}}"));
        assert_eq!(error, "limit: a number had more than 4096 bytes");
    }
}

#[test]
fn what_depends_on_values_is_refused_by_name() {
    let striptags = "unsupported: line 1: the filter \"striptags\" is not supported";
    assert_eq!(refused("{{ 'a &lt; b'|striptags }}"), striptags);
    assert_eq!(refused("{{ ['a']|map('striptags')|list }}"), striptags);
    let named = "{% set f = 'striptags' %}{{ ['a']|map(f)|list }}";
    assert_eq!(refused(named), "error: the filter \"striptags\" is not supported");
    assert_eq!(refused("{{ 2 ** 127 }}"), "limit: an integer had more than 127 bits");
}

#[test]
fn numbers_of_requests_are_read_as_python_reads_them_or_refused() {
    for (json, want) in [
        (
            "[18446744073709551615, -9223372036854775808]",
            "[18446744073709551615, -9223372036854775808]",
        ),
        ("[1e20, -0.0, 1.5E3, 0]", "[1e+20, -0.0, 1500.0, 0]"),
        (r#"["18446744073709551616 \"-0", "\\", 1]"#, r#"['18446744073709551616 "-0', '\\', 1]"#),
    ] {
        let context = [("v".to_owned(), Json::parse(json).unwrap())];
        assert_eq!(render("{{ v }}", &context).as_deref(), Ok(want), "{json}");
    }
    for json in ["18446744073709551616", "[-9223372036854775809]", r#"{"a\"": -0}"#, "1e400"] {
        assert!(Json::parse(json).is_err(), "{json}");
    }
    let error = Json::parse("[18446744073709551616]").unwrap_err().to_string();
    assert_eq!(error, "the integer 18446744073709551616 is not supported, it has over 64 bits");
}

#[test]
fn the_first_and_last_letter_of_a_long_text_are_found() {
    let source = "{% set t = 'ä' ~ 'x' * 3000000 ~ 'ß' %}{{ t|first }}{{ t|last }}";
    assert_eq!(written(source).unwrap(), "äß");
    assert_eq!(written("{{ ''|first is defined }}{{ 'a'|last }}").unwrap(), "Falsea");
    assert_eq!(written("{{ ('ab' * 600000)[::-2]|length }}").unwrap(), "600000");
}
