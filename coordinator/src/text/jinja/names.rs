//! What there is, by name; what there is not is refused when a template is parsed.

/// Filters: all of Jinja2's but those of [`UNSUPPORTED_FILTERS`], and `transformers`' `tojson`.
pub(super) const FILTERS: [&str; 48] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "wordcount",
];

/// Tests: all of Jinja2's.
pub(super) const TESTS: [&str; 39] = [
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// Jinja2's filters that there are not, which `is filter` must not deny. `striptags` would need
/// HTML's 2231 names of characters.
pub(super) const UNSUPPORTED_FILTERS: [&str; 6] =
    ["pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"];

/// Jinja2's functions that there are not.
pub(super) const UNSUPPORTED_GLOBALS: [&str; 1] = ["lipsum"];

/// Tags that would need other templates, blocks of them, or HTML.
pub(super) const UNSUPPORTED_TAGS: [&str; 6] =
    ["autoescape", "block", "extends", "from", "import", "include"];

/// Python's methods that there are not: of bytes, numbers and classes.
pub(super) const UNSUPPORTED_METHODS: [&str; 11] = [
    "as_integer_ratio",
    "bit_count",
    "bit_length",
    "conjugate",
    "encode",
    "fromhex",
    "fromkeys",
    "is_integer",
    "maketrans",
    "to_bytes",
    "translate",
];

/// Methods of texts.
pub(super) const TEXT_METHODS: [&str; 44] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];

/// Methods of lists that change nothing.
pub(super) const LIST_METHODS: [&str; 3] = ["copy", "count", "index"];

/// Methods of lists that the immutable sandbox refuses.
pub(super) const LIST_CHANGES: [&str; 8] =
    ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];

/// Methods of tuples and ranges.
pub(super) const TUPLE_METHODS: [&str; 2] = ["count", "index"];

/// Methods of dicts that change nothing.
pub(super) const DICT_METHODS: [&str; 5] = ["copy", "get", "items", "keys", "values"];

/// Methods of dicts that the immutable sandbox refuses.
pub(super) const DICT_CHANGES: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
