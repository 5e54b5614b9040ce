//! Hostile templates: each is refused or ends, in little stack, time and memory.

use super::*;

fn compile(source: &str) -> Result<ChatTemplate, TemplateError> {
    ChatTemplate::compile(source, TemplateTexts::default())
}

fn render(source: &str) -> Result<String, TemplateError> {
    let message = ChatMessage { role: "user".into(), content: "x".into() };
    compile(source)?.render(&[message], &[], &Guard::default())
}

/// (before, repeated, middle, repeated after the middle, after).
const SHAPES: [(&str, &str, &str, &str, &str); 44] = [
    ("{{ ", "-", "1", "", " }}"),
    ("{{ ", "+", "1", "", " }}"),
    ("{{ ", "not ", "1", "", " }}"),
    ("{{ ", "(", "1", ")", " }}"),
    ("{{ ", "[", "1", "]", " }}"),
    ("{{ ", "{1:", "1", "}", " }}"),
    ("{{ ", "1+", "1", "", " }}"),
    ("{{ ", "1-", "1", "", " }}"),
    ("{{ ", "1*", "1", "", " }}"),
    ("{{ ", "1//", "1", "", " }}"),
    ("{{ ", "1**", "1", "", " }}"),
    ("{{ ", "1~", "1", "", " }}"),
    ("{{ ", "1<", "1", "", " }}"),
    ("{{ ", "1 in ", "[]", "", " }}"),
    ("{{ ", "1 and ", "1", "", " }}"),
    ("{{ ", "1 or ", "1", "", " }}"),
    ("{{ ", "1 if 0 else ", "1", "", " }}"),
    ("{{ 1", " if 1", "", "", " }}"),
    ("{{ a", ".b", "", "", " }}"),
    ("{{ a", "[0]", "", "", " }}"),
    ("{{ ", "a[", "0", "]", " }}"),
    ("{{ a", "()", "", "", " }}"),
    ("{{ ", "a(", "0", ")", " }}"),
    ("{{ a", "|upper", "", "", " }}"),
    ("{{ ", "a|default(", "0", ")", " }}"),
    ("{{ 1", " is odd", "", "", " }}"),
    ("{{ 1", " is eq(1)", "", "", " }}"),
    ("{{ 'a'", " 'a'", "", "", " }}"),
    ("{{ 1", ",1", "", "", " }}"),
    ("{{ a[", ":", "", "", "] }}"),
    ("", "{% if 1 %}", "x", "{% endif %}", ""),
    ("", "{% for a in [1] %}", "x", "{% endfor %}", ""),
    ("", "{% with %}", "x", "{% endwith %}", ""),
    ("", "{% macro a() %}", "x", "{% endmacro %}", ""),
    ("", "{% call a() %}", "x", "{% endcall %}", ""),
    ("", "{% filter upper %}", "x", "{% endfilter %}", ""),
    ("", "{% set a %}", "x", "{% endset %}", ""),
    ("", "{% generation %}", "x", "{% endgeneration %}", ""),
    ("{% if 0 %}", "{% elif 0 %}", "", "", "{% endif %}"),
    ("{% set ", "(", "a", ")", " = 1 %}"),
    ("{% for ", "(", "a", ")", " in [] %}{% endfor %}"),
    ("{% filter upper", "|upper", "", "", " %}x{% endfilter %}"),
    ("{% set a ", "|upper", "", "", " %}x{% endset %}"),
    ("", "{{ 1 }}", "", "", ""),
];

/// As many repetitions as the source may have.
fn longest(shape: &(&str, &str, &str, &str, &str)) -> String {
    let (before, each, middle, each_after, after) = shape;
    let room = MAX_SOURCE_BYTES - before.len() - middle.len() - after.len();
    let times = room / (each.len() + each_after.len());
    format!("{before}{}{middle}{}{after}", each.repeat(times), each_after.repeat(times))
}

#[test]
fn the_longest_chains_compile_or_are_refused_by_a_sentence() {
    for shape in &SHAPES {
        match compile(&longest(shape)) {
            Ok(template) => drop(template),
            Err(TemplateError::Compile(error)) => {
                assert!(error.to_string().starts_with("line 1: "), "{shape:?}: {error}");
            }
            Err(other) => panic!("{shape:?}: {other}"),
        }
        // As deep as is allowed: rendered, and let go of on this thread's stack.
        let (before, each, middle, each_after, after) = shape;
        let mut deepest = None;
        for times in [150, 120, 70, 30] {
            let source = format!(
                "{before}{}{middle}{}{after}",
                each.repeat(times),
                each_after.repeat(times)
            );
            if let Ok(template) = compile(&source) {
                deepest = Some(times);
                let _ = template.render(&[], &[], &Guard::default());
                break;
            }
        }
        let never = ["(1", "()", "[:"];
        let odd = matches!(*each, ":" | " is odd" | " is eq(1)");
        assert!(deepest.is_some() || odd || never.contains(each), "{shape:?}");
    }
}

#[test]
fn calls_that_call_themselves_end_in_the_stack_there_is() {
    for source in [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ 1 + (1 + (1 + [{'a': f()}][0].a|upper|length)) }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
        "{% macro f(x=f) %}{% filter upper %}{% for i in [1] if f(x) %}{% endfor %}{% endfilter %}{% endmacro %}{{ f() }}",
        "{% for i in [1] recursive %}{% if true %}{% with %}{{ loop([1]) }}{% endwith %}{% endif %}{% endfor %}",
        "{% macro f(x) %}{{ [1]|map('default', f(x))|list }}{% endmacro %}{{ f(1) }}",
    ] {
        assert!(matches!(render(source), Err(TemplateError::Limit(_))), "{source}");
    }
}

#[test]
fn too_many_variables_are_a_limit() {
    let names: Vec<String> = (0..250).map(|i| format!("a{i}")).collect();
    let source =
        format!("{{% macro f({}) %}}{{{{ f() }}}}{{% endmacro %}}{{{{ f() }}}}", names.join(","));
    let Err(TemplateError::Limit(words)) = render(&source) else { panic!("no limit") };
    assert_eq!(words, "it had more than 100000 variables");
}

#[test]
fn trying_a_template_finds_what_would_fail_later() {
    assert!(compile("{{ messages[0].content }}").unwrap().try_out().is_ok());
    let alternates = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}\
                      {% endif %}{{ messages[0].content }}";
    assert!(compile(alternates).unwrap().try_out().is_ok());
    for fails in ["{{ messages[0].text.strip() }}", "{{ 1/0 }}", "{{ raise_exception('never') }}"] {
        assert!(compile(fails).unwrap().try_out().is_err(), "{fails}");
    }
    let error = compile("{{ 'a'.encode() }}").err().unwrap();
    assert!(matches!(&error, TemplateError::Compile(source)
        if source.to_string() == "line 1: the method \"encode\" is not supported"));
}

/// What a hostile template may take, in all.
const BOMB_BYTES: u64 = 64 << 20;

fn many(body: &str) -> String {
    format!("{{% for i in range(99999) %}}{body}{{% endfor %}}")
}

fn grow(start: &str, step: &str, end: &str) -> String {
    let each = many(&format!("{{% set ns.x = {step} %}}"));
    format!("{{% set ns = namespace(x={start}) %}}{each}{end}")
}

/// Small in memory and endless to write: 60 levels of two equal halves.
fn halves(end: &str) -> String {
    let each = "{% set ns.x = [ns.x, ns.x] %}";
    format!("{{% set ns = namespace(x='x') %}}{{% for i in range(60) %}}{each}{{% endfor %}}{end}")
}

/// What one can think of to make a renderer run, grow or recurse without end.
fn bombs() -> Vec<String> {
    vec![
        format!("{}x{}", "{% if true %}".repeat(6000), "{% endif %}".repeat(6000)),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        many(&many("")),
        "{% for a in range(1000000000) %}x{% endfor %}".into(),
        "{{ 'a' * 1000000000 }}".into(),
        "{{ 'a' * 50000000 }}".into(),
        many("{{ 'aaaaaaaaaa' * 100 }}"),
        "{{ '%1000000000d' | format(1) }}".into(),
        "x".repeat(300 << 10),
        // Texts that double.
        grow("'x'", "ns.x ~ ns.x", ""),
        grow("'x'", "ns.x + ns.x", ""),
        grow("'x'", "ns.x * 2", ""),
        grow("'x'", "[ns.x, ns.x] | join", ""),
        grow("'x'", "ns.x | replace('x', 'xx')", ""),
        grow("'x'", "ns.x.replace('x', 'xx')", ""),
        grow("'x'", "ns.x.join([ns.x, ns.x, ns.x])", ""),
        grow("'x'", "'{}{}'.format(ns.x, ns.x)", ""),
        grow("'x'", "(ns.x ~ ns.x) | tojson", ""),
        grow("'%A'", "strftime_now(ns.x ~ ns.x)", ""),
        "{% set s = 'x' * 1000000 %}{{ s.replace('x', s) }}".into(),
        "{% set s = 'x' * 1000000 %}{{ s | replace('x', s) }}".into(),
        "{{ 'x'.join(['x'] * 90000000) }}".into(),
        "{{ '{:>1000000000}'.format('x') }}".into(),
        // Lists.
        grow("[]", "[[[[[[[[ns.x]]]]]]]]", ""),
        grow("[]", "[[[[[[[[ns.x]]]]]]]]", "{{ ns.x | tojson }}"),
        halves("{{ ns.x | tojson }}"),
        halves("{{ ns.x | tojson(sort_keys=true) }}"),
        halves("{{ ns.x }}"),
        halves("{{ ''.join(ns.x) }}"),
        halves("{{ '{}'.format(ns.x) }}"),
        // Memory that is taken before the outcome is there to be counted.
        "{% set d = dict([('a', 1)] * 1000000) %}".into(),
        "{{ [1]|sort(attribute=',' * 8000000) }}".into(),
        "{{ [1]|sort(attribute=',' * 100) }}".into(),
        "{{ [{}]|map(attribute='.' * 8000000)|list }}".into(),
        "{{ [{}]|map(attribute='.' * 100)|list }}".into(),
        "{{ ([1] * 400000)|unique|list }}".into(),
        "{{ ('1_' * 4000000 ~ '1')|int }}".into(),
        // Names that are kept, of the source and of keyword arguments.
        many(&format!("{{% set l = {} %}}", "a".repeat(200_000))),
        "{% set d = dict([('a' * 1000000, 1)]) %}{% macro f(x=f(**d)) %}{{ kwargs }}{% endmacro %}{{ f(**d) }}".into(),
        many("{% set n = namespace([('a' * 100000, 1)]) %}"),
    ]
}

/// What is much work or memory, and may be too much.
fn loads() -> Vec<String> {
    vec![
        "{% set d = dict([('a', 1)] * 200000) %}{{ d }}".into(),
        "{% set b = 'a' * 4000000 %}{% set l = ([{}] * 100)|map('attr', b)|list %}".into(),
        "{% set b = 'a' * 4000000 %}{% set l = (['x'] * 100)|map('attr', b)|list %}".into(),
        "{{ ('a ' * 2000000)|striptags|length }}".into(),
        halves("{{ [ns.x]|map('string')|list }}"),
        halves("{{ '%s' % [ns.x] }}"),
        // Lists that double, and what walks them.
        "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}".into(),
        grow("[1]", "ns.x * 2", ""),
        grow("(1,)", "ns.x + ns.x", ""),
        grow("[1]", "ns.x[:] + ns.x[::-1]", ""),
        grow("{}", "{i: ns.x, 'b': ns.x}", ""),
        grow("''", "namespace(y=ns.x)", ""),
        grow("''", "cycler(ns.x)", "{{ ns.x|list }}"),
        grow("[]", "[ns.x]|map('list')", "{{ ns.x|list }}"),
        grow("'&'", "ns.x|e|string", ""),
        grow("' '", "ns.x|urlencode", ""),
        grow("'a\nb'", "ns.x|indent(9)|replace('a', 'a\na')", ""),
        grow("'a'", "ns.x ~ [ns.x]", ""),
        grow("'a'", "'%s%s' % (ns.x, ns.x)", ""),
        grow("'a'", "ns.x.replace('', 'b')", ""),
        grow("'a'", "[ns.x]|join(ns.x) ~ ns.x.join('ab')", ""),
        many("{% if 'b' in 'a' * 1000000 %}{% endif %}"),
        many("{{ range(99999)|sort|sum }}"),
        many("{{ ('ab' * 100000).split('b')|unique|list|length }}"),
        many("{% set x = range(99999)|list %}"),
        many("{{ 99999 in range(99999)|list }}"),
        many("{{ ('a ' * 100000)|title|length }}"),
        "{% set x = ('a ' * 4000000).split() %}".into(),
        "{% set x = ('a' * 8000000)|list %}{{ x }}".into(),
        "{{ 'a'.center(10 ** 9) }}".into(),
        "{{ 'a'|center(10 ** 9) }}".into(),
        "{{ 'a'.zfill(10 ** 9) }}".into(),
        "{{ 'a\tb'.expandtabs(10 ** 9) }}".into(),
        "{{ 'a\nb'|indent(10 ** 9) }}".into(),
        "{{ '%1000000000d' % 1 }}".into(),
        "{{ '%*d' % (10 ** 9, 1) }}".into(),
        "{{ '%.1000000000f' % 1 }}".into(),
        "{{ '{:.1000000000f}'.format(1.0) }}".into(),
        "{{ 10 ** 10 ** 9 }}".into(),
        "{{ [1]|batch(10 ** 9, 'x')|list }}".into(),
        "{{ [1]|slice(10 ** 9)|list }}".into(),
        "{{ [1]|tojson(indent=10 ** 9) }}".into(),
        "{{ [1] * 10 ** 9 }}".into(),
        "{{ range(10 ** 9)|list }}".into(),
        "{{ strftime_now('%1000000000Y') }}".into(),
    ]
}

/// The clock's limit here: processors are shared with other tests.
const SHORT: Duration = Duration::from_millis(200);

/// How late a rendering may end: the old renderer never did.
const LATE: Duration = Duration::from_secs(10);

#[test]
fn what_is_compared_is_paid_for() {
    let big = "{% set b = 'a' * 400000 %}";
    for repeated in [
        // A tuple of one text, as often as wanted.
        "{{ (b ~ 'c').startswith((b ~ 'b',) * 2000) }}",
        "{{ ('c' ~ b).endswith(('b' ~ b,) * 2000) }}",
        "{% for i in range(2000) %}{{ 'x'.split(sep=b) }}{% endfor %}",
    ] {
        let template = compile(&format!("{big}{repeated}")).unwrap();
        let message = ChatMessage { role: "user".into(), content: "x".into() };
        let error = template.render_within(LATE, &[message], &[], &Guard::default()).unwrap_err();
        assert!(error.to_string().contains("steps"), "{error}: {repeated}");
    }
    // Longer parts are never looked at.
    let few = "{{ 'ab'.startswith((b,) * 100000) }}{{ 'ab'.endswith(('b', b)) }}";
    assert_eq!(render(&format!("{big}{few}")).unwrap(), "FalseTrue");
}

/// A figure of this process, such as `VmHWM`, in bytes.
#[cfg(target_os = "linux")]
fn process_bytes(figure: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(figure)).unwrap();
    let kib: u64 = line.trim_matches([':', ' ', '\t', 'k', 'B']).parse().unwrap();
    kib << 10
}

/// Set for the process that the test below starts of itself.
#[cfg(target_os = "linux")]
const ALONE: &str = "BOMBS_ALONE";

/// In a process of its own, so that nothing else is measured and a crash is seen.
#[test]
#[cfg(target_os = "linux")]
fn hostile_templates_fail_in_little_memory() {
    if std::env::var_os(ALONE).is_some() {
        return each_bomb_fails();
    }
    let this_test = "text::template::tests::hostile_templates_fail_in_little_memory";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", this_test])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{}: {told}", output.status);
}

#[cfg(target_os = "linux")]
fn each_bomb_fails() {
    let before = process_bytes("VmRSS");
    let fails = bombs().into_iter().map(|bomb| (bomb, true));
    for (bomb, fails) in fails.chain(loads().into_iter().map(|load| (load, false))) {
        let bomb_starts = &bomb[..bomb.len().min(120)];
        let began = std::time::Instant::now();
        let message = ChatMessage { role: "user".into(), content: "x".into() };
        let rendered = compile(&bomb)
            .and_then(|template| template.render_within(SHORT, &[message], &[], &Guard::default()));
        assert!(rendered.is_err() || !fails, "{bomb_starts}");
        assert!(began.elapsed() < LATE, "{:?}: {bomb_starts}", began.elapsed());
        let taken = process_bytes("VmHWM").saturating_sub(before);
        assert!(taken < BOMB_BYTES, "{taken} bytes: {bomb_starts}");
    }
}
