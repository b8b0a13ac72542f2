#!/usr/bin/env python3
"""Compares the token ids that `fsdp-qlora data` makes of texts with those of transformers, for real tokenizers.

usage: real_tokenizers.py PROGRAM FOLDER...

A FOLDER has tokenizer.json and, where it is there, tokenizer_config.json. Prints a line of docs/templates.md's table of tokenizers for each.
The exit status is 1 if one differs.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import folder
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "Hello, world!", " two  spaces   three", "tabs\tand\nnew\n\n\nlines\r\n", "don't can't I'LL we've", "3.14159 1,000,000 2025-11-27 0x1F",
    "naïve café — “quotes” … ½ ²", "日本語の文章です。", "Привет, мир", "مرحبا بالعالم", "नमस्ते दुनिया", "🦊🦊 👩‍👩‍👧‍👦 🇸🇪", "e\u0301 vs é", "\ufb01 ligature",
    "def f(x):\n    return x**2  # comment\n", "<|im_start|>user\nHi<|im_end|>", "<s>[INST] Hi [/INST]</s>", "<start_of_turn>user\n",
    "<|begin_of_text|><|eot_id|>", "a" * 300, "ab" * 150, " " * 40, "\n" * 20, "\u200b\u00a0\u3000", "\x00\x01\x7f", "ﷺ ﷽", "😀" * 30,
    "SELECT * FROM t WHERE a = 'b' AND c <> 1;", "https://example.org/a?b=c&d=%20", "lorem ipsum dolor sit amet " * 20, "ÅÄÖ åäö ß ẞ", "ＦＵＬＬ　ｗｉｄｔｈ",
    "x²+y²=z² ∀ε>0 ∃δ>0", "{\"a\": [1, 2.5, null, true]}", "…\u2028\u2029", "١٢٣ ४५६ 七八九", "Ǆ ǆ ǅ", "İstanbul ıI", "\ud7ff\ue000\ufffd",
]


def texts():
    """TEXTS, and texts of random characters of many scripts."""
    rng = random.Random(7)
    ranges = [(32, 127), (32, 127), (0xA0, 0x250), (0x370, 0x500), (0x590, 0x700), (0x900, 0xA00), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    def character():
        low, high = rng.choice(ranges)
        return chr(rng.randrange(low, high))
    return TEXTS + ["".join(character() if rng.random() > 0.2 else " " for _ in range(rng.randrange(1, 120))) for _ in range(400)]


def found(program, place, rows):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "model").mkdir()
        for file in place.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, work / "model")
        config = json.loads((folder() / "tiny/config.json").read_text())
        (work / "model/config.json").write_text(json.dumps({**config, "vocab_size": 1 << 20}))
        (work / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        (work / "recipe.yaml").write_text("model: model\ndata: {train: rows.jsonl, max_length: 100000, packing: false, format: text}\n")
        done = subprocess.run([program, "data", "-c", "recipe.yaml", "--json", "--rows", "1000"], cwd=work, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{place}: {done.stderr}")
        shown = json.loads(done.stdout)["train"]["first_rows"]
        return [[token["id"] for token in row["documents"][0]["tokens"]] for row in shown]


def main():
    program, wrong = Path(sys.argv[1]).resolve(), 0
    for place in map(Path, sys.argv[2:]):
        tokenizer, rows = AutoTokenizer.from_pretrained(place), texts()
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        # As TRL does: every text ends with the end of sequence.
        ended = [row if row.endswith(tokenizer.eos_token) else row + tokenizer.eos_token for row in rows]
        expected = [tokenizer(row)["input_ids"] for row in ended]
        ids = found(program, place, rows)
        equal = sum(a == b for a, b in zip(ids, expected, strict=True))
        print(f"| {place.name} | {type(tokenizer).__name__} | {len(tokenizer)} | {len(rows)} | {equal} |", flush=True)
        for row, a, b in zip(rows, ids, expected):
            if a != b:
                print(f"{place.name}: {row!r}: {a} != {b}", file=sys.stderr)
        wrong += equal != len(rows)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
