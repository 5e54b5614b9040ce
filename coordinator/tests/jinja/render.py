"""Renders the cases of this folder with Jinja2 3.1 as `transformers` sets it up.

`render.py FOLDER` writes FOLDER/expected.json; `render.py FOLDER --check` compares it instead.
`null` stands for a case that raises an error.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, as transformers' AssistantTracker parses it."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_write")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _write(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


# Saturday, the 22nd; the same as the tests'.
NOW = datetime.datetime(2025, 11, 22, 11, 30, 0)


def environment():
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = NOW.strftime
    return made


def render(source, context):
    try:
        written = environment().from_string(source).render(**context)
    except Exception:
        return None
    # Addresses of objects are no text of a template's.
    return None if " object at 0x" in written or " at 0x" in written else written


def main():
    assert jinja2.__version__.startswith("3.1."), jinja2.__version__
    folder = pathlib.Path(sys.argv[1])
    context = json.loads((folder / "context.json").read_text("utf-8"))
    expressions = (folder / "expressions.txt").read_text("utf-8").replace("\\\n", "\\\0")
    expressions = [line.replace("\0", "\n") for line in expressions.splitlines() if line]
    templates = json.loads((folder / "templates.json").read_text("utf-8"))
    expected = {
        "expressions": {text: render("{{ " + text + " }}", context) for text in expressions},
        "templates": {
            case["name"]: render(case["template"], case.get("context", context))
            for case in templates
        },
    }
    path = folder / "expected.json"
    text = json.dumps(expected, ensure_ascii=True, indent=1) + "\n"
    if "--check" in sys.argv:
        committed = json.loads(path.read_text("utf-8"))
        for kind in expected:
            for name, want in expected[kind].items():
                found = committed[kind].get(name, "(not there)")
                assert found == want, f"{kind} {name!r}: {found!r} is committed, not {want!r}"
            assert len(committed[kind]) == len(expected[kind]), kind
        print(sum(len(cases) for cases in expected.values()), "cases agree")
    else:
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
