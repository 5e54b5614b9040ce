"""Documents to tokens: trains the byte-level BPE tokenizer once, then writes token files.

Sources are `.jsonl` files of grammar.py, or the output of the stories260K sampler (records that begin
with \\x1e, a flag whether the story ended, and a newline). Every fiftieth document is held out.
"""

import argparse
import json
import os
import random

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from network import BASE_CONFIG

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
# Splits text before BPE, as Llama 3 does.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELD_OUT_EVERY = 50
# A sampled story shorter than this, in characters, was cut off too early to be one.
STORY_CHARS_MIN = 80
ENCODE_BATCH = 20000


def documents(path):
    """Text, what the user asked (or None), and whether the text came to its end."""
    if path.endswith(".jsonl"):
        with open(path) as file:
            for line in file:
                document = json.loads(line)
                yield document["t"], document.get("u"), True
        return
    with open(path, encoding="utf-8", errors="ignore") as file:
        records = file.read().split("\x1e")[1:]
    for record in records:
        ended, text = record.split("\n", 1)
        text = text.strip()
        if ended == "0":
            last = max(text.rfind(end) for end in (". ", "! ", ".\n", '." '))
            text = text[: last + 1]
        if len(text) >= STORY_CHARS_MIN:
            yield text, None, ended != "0"


def train_tokenizer(texts, path):
    tokenizer = Tokenizer(models.BPE(ignore_merges=False, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_CONFIG["vocab_size"],
        special_tokens=[BOS, EOS, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)]
            ),
        ]
    )
    tokenizer.save(path)


def encode(tokenizer, rows, special):
    """Token ids of documents, one list per document."""
    bos, eos, eot = special

    def ids(texts):
        return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    answer = tokenizer.encode("Assistant: ", add_special_tokens=False).ids
    texts = ids([text for _, text, _, _ in rows])
    users = ids(["User: " + (user or "") for _, _, user, _ in rows])
    for (_, _, user, ended), text, asked in zip(rows, texts, users):
        if user:
            yield [bos] + asked + [eot] + answer + text + [eot, eos]
        else:
            yield [bos] + text + ([eos] if ended else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="directory for tokenizer.json and token files")
    parser.add_argument("sources", nargs="+", help=".jsonl of grammar.py, or sampled stories")
    args = parser.parse_args()

    rows = {"train": [], "val": []}
    seen = []
    for source in args.sources:
        name = os.path.basename(source).split(".")[0]
        for count, document in enumerate(documents(source), start=1):
            row = (name, *document)
            seen.append(row)
            rows["val" if count % HELD_OUT_EVERY == 0 else "train"].append(row)
    random.Random(0).shuffle(rows["train"])

    os.makedirs(args.data, exist_ok=True)
    path = os.path.join(args.data, "tokenizer.json")
    if not os.path.exists(path):
        texts = (
            (f"{user}\n\n" if user else "") + f"User: {text}\nAssistant: "
            for _, text, user, _ in seen
        )
        train_tokenizer(texts, path)
    tokenizer = Tokenizer.from_file(path)
    special = [tokenizer.token_to_id(text) for text in (BOS, EOS, EOT)]

    for part, part_rows in rows.items():
        tokens = {}
        for at in range(0, len(part_rows), ENCODE_BATCH):
            batch = part_rows[at : at + ENCODE_BATCH]
            for (name, *_), ids in zip(batch, encode(tokenizer, batch, special)):
                key = "train" if part == "train" else f"val_{name}"
                tokens.setdefault(key, []).extend(ids)
        for key, ids in tokens.items():
            np.array(ids, dtype=np.uint16).tofile(os.path.join(args.data, f"{key}.bin"))
            print(key, len(ids), "tokens")
    with open(os.path.join(args.data, "ids.json"), "w") as file:
        json.dump(dict(zip(("bos", "eos", "eot"), special)), file)


if __name__ == "__main__":
    main()
