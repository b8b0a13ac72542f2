#!/usr/bin/env python3
"""The demo's questions and answers in the tokenized format: rows.py MODEL FAQ OUT [--each].

Without --each: one row of 512 tokens, 16 times, every token a target; whoever takes one or two of them a step computes the same
losses. With --each: a row for each question, its answer the target.
"""

import json
import sys

from transformers import AutoTokenizer

LENGTH, ROWS = 512, 16

model, faq, out = sys.argv[1:4]
each = sys.argv[4:] == ["--each"]
tokenizer = AutoTokenizer.from_pretrained(model)


def encode(messages, **kwargs):
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))["input_ids"]


all_ids, rows = [], []
for row in map(json.loads, open(faq)):
    question = {"role": "user", "content": row["instruction"]}
    answer = {"role": "assistant", "content": row["output"]}
    prompt, ids = encode([question], add_generation_prompt=True), encode([question, answer])
    all_ids += ids
    rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]})
if not each:
    rows = [{"input_ids": all_ids[:LENGTH], "labels": all_ids[:LENGTH]}] * ROWS
with open(out, "w") as file:
    for row in rows:
        file.write(json.dumps(row) + "\n")
