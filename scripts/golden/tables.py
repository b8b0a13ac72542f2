#!/usr/bin/env python3
"""Writes a table of docs/families.md from lines `parity MODEL QUANTITY VALUE` on standard input: the worst value of each model.

usage: tables.py TABLE < LINES
"""

import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"

# table -> columns: quantity, head, which of its values is the worst, how it is written
TABLES = {
    "table": [("logits", "logits, largest difference", max, "{:.1e}"), ("gradients", "LoRA gradients, relative", max, "{:.1e}")],
    "table of GPUs": [("bf16-logits", "logits", max, "{:.2f}"), ("bf16-gradients", "LoRA gradients, largest", max, "{:.2f}")],
    "table of checkpoints": [
        ("nf4", "NF4", max, "{:.1e}"), ("nf4-double", "double quantization", max, "{:.1e}"), ("skipped", "in part", max, "{:.1e}"),
        ("to-peft-nf4", "and an adapter trained here", max, "{:.1e}")],
    "table of adapters": [
        ("to-peft", "trained here, in PEFT", max, "{:.1e}"), ("from-peft", "saved by PEFT, here", max, "{:.1e}"),
        ("and-back", "trained further here, in PEFT", max, "{:.1e}"), ("tokens", "tokens of `generate`", min, "{:.0%}")],
    "table of merged models": [
        ("merged", "logits", max, "{:.1e}"), ("merged-tensors", "tensors in float32", max, "{:.1e}"),
        ("merged-bf16", "equal weights in bfloat16", min, "{:.3%}"), ("merged-nf4", "after NF4", max, "{:.1e}")],
    "table of llama.cpp": [
        ("llama-base", "the base", max, "{:.1e}"), ("llama-losses", "losses", max, "{:.1e}"), ("llama-logits", "logits", max, "{:.1e}"),
        ("llama-argmax", "equal tokens", min, "{:.0%}")],
}


def table(columns, lines):
    values = {}
    for line in lines:
        words = line[line.find("parity ") :].split() if "parity " in line else []
        if len(words) == 4:
            values.setdefault(words[1], {}).setdefault(words[2], []).append(float(words[3]))
    rows = [
        "| " + " | ".join([model, *(form.format(worst(found[quantity])) for quantity, _, worst, form in columns)]) + " |"
        for model, found in sorted(values.items()) if columns[0][0] in found
    ]
    heads = ["model", *(head for _, head, _, _ in columns)]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *rows])


def main():
    name = sys.argv[1]
    before, start, rest = PAGE.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        sys.exit(f"error: {PAGE} has no place for {name}")
    PAGE.write_text(f"{before}{start}{table(TABLES[name], sys.stdin)}\n{end}{after}")


if __name__ == "__main__":
    main()
