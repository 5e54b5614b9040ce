//! What a body may cost: its own bytes and twice as much again, whatever it is made of. A process
//! of its own, for the allocator counts everything.

use coordinator::check_body;
use peak_alloc::PeakAlloc;

#[global_allocator]
static COUNTED: PeakAlloc = PeakAlloc;

const BODY_BYTES: usize = 4 << 20;

/// For short lists, names and messages, and for one list of token ids while it grows.
const SMALL_CHANGE_BYTES: usize = 1 << 20;

/// Of the model: no prompt is refused for its length.
const CONTEXT: usize = 262_144;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// `start`, as many of `item` as fit, `end`.
fn filled(start: &str, item: &str, end: &str) -> String {
    let items = (BODY_BYTES - start.len() - end.len()) / item.len();
    let list = item.repeat(items);
    format!("{start}{}{end}", list.trim_end_matches(','))
}

/// As many entries as fit, each with a name of its own.
fn named(start: &str, value: &str, end: &str) -> String {
    let mut body = String::from(start);
    for name in 0.. {
        let comma = if name == 0 { "" } else { "," };
        let entry = format!("{comma}\"{name}\":{value}");
        if body.len() + entry.len() + end.len() > BODY_BYTES {
            break;
        }
        body += &entry;
    }
    body + end
}

#[test]
fn no_body_costs_more_than_three_times_its_bytes() {
    let lists = format!("[{}],", vec!["1"; CONTEXT].join(","));
    let shapes: [(&str, &str, String); 32] = [
        ("stops", COMPLETIONS, filled("{\"prompt\":\"a\",\"stop\":[", "\"a\",", "]}")),
        ("empty stops", COMPLETIONS, filled("{\"stop\":[", "\"\",", "]}")),
        ("stop ids", COMPLETIONS, filled("{\"stop_token_ids\":[", "1,", "]}")),
        ("lists", COMPLETIONS, filled("{\"prompt\":[", "[],", "]}")),
        ("lists of one", COMPLETIONS, filled("{\"prompt\":[", "[1],", "]}")),
        ("texts", COMPLETIONS, filled("{\"prompt\":[", "\"\",", "]}")),
        ("ids", COMPLETIONS, filled("{\"prompt\":[", "1,", "]}")),
        ("lists of ids", COMPLETIONS, filled("{\"prompt\":[", &lists, "]}")),
        ("one text", COMPLETIONS, filled("{\"prompt\":\"", "a", "\"}")),
        ("one text, one escape", COMPLETIONS, filled("{\"prompt\":\"\\n", "a", "\"}")),
        ("escapes", COMPLETIONS, filled("{\"prompt\":\"", "\\n", "\"}")),
        ("wide escapes", COMPLETIONS, filled("{\"prompt\":\"", "\\u20ac", "\"}")),
        ("biases", COMPLETIONS, named("{\"logit_bias\":{", "1", "}}")),
        ("unknown list", COMPLETIONS, filled("{\"x\":[", "0,", "]}")),
        ("unknown objects", COMPLETIONS, filled("{\"x\":[", "{\"\":[]},", "]}")),
        ("unknown text", COMPLETIONS, filled("{\"x\":\"\\n", "a", "\"}")),
        ("unknown name", COMPLETIONS, filled("{\"", "a", "\":1}")),
        ("metadata", COMPLETIONS, named("{\"metadata\":{", "\"\"", "}}")),
        ("unknown fields", COMPLETIONS, named("{", "[]", ",\"n\":1}")),
        ("depth", COMPLETIONS, filled("{\"x\":", "[", "}")),
        ("guided", COMPLETIONS, named("{\"guided_json\":{", "{}", "}}")),
        ("messages", CHAT, filled("{\"messages\":[", "{\"role\":\"\"},", "]}")),
        ("empty messages", CHAT, filled("{\"messages\":[", "{},", "]}")),
        (
            "parts",
            CHAT,
            filled(
                "{\"messages\":[{\"role\":\"user\",\"content\":[",
                "{\"type\":\"text\",\"text\":\"a\"},",
                "]}]}",
            ),
        ),
        (
            "content",
            CHAT,
            filled("{\"messages\":[{\"role\":\"user\",\"content\":\"\\n", "a", "\"}]}"),
        ),
        ("arguments", CHAT, named("{\"chat_template_kwargs\":{", "{}", "}}")),
        ("argument lists", CHAT, filled("{\"chat_template_kwargs\":{\"a\":[", "[],", "]}}")),
        ("argument text", CHAT, filled("{\"chat_template_kwargs\":{\"a\":\"", "a", "\"}}")),
        ("tools", CHAT, filled("{\"tools\":[", "{\"a\":{}},", "]}")),
        ("modalities", CHAT, filled("{\"modalities\":[", "\"\",", "]}")),
        ("format", CHAT, named("{\"response_format\":{", "[0]", "}}")),
        ("role", CHAT, filled("{\"messages\":[{\"role\":\"", "a", "\"}]}")),
    ];
    for (name, path, body) in shapes {
        assert!(body.len() > BODY_BYTES / 2 && body.len() <= BODY_BYTES, "{name}: {}", body.len());
        let before = COUNTED.current_usage() - body.len();
        COUNTED.reset_peak_usage();
        // Both outcomes are fine: what it may not do is to cost.
        let outcome = check_body(path, body.as_bytes(), CONTEXT);
        let cost = COUNTED.peak_usage() - before;
        let limit = 3 * body.len() + SMALL_CHANGE_BYTES;
        assert!(cost <= limit, "{name}: {cost} bytes for {}, {outcome:?}", body.len());
    }
}
