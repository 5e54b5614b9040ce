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
