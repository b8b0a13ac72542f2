#!/usr/bin/env python3
"""One row of 512 tokens of the demo's questions and answers, 16 times, in the tokenized format: rows.py MODEL FAQ OUT.

The same row in every place: whoever takes one or two of them a step computes the same losses.
"""

import json
import sys

from transformers import AutoTokenizer

LENGTH, ROWS = 512, 16

model, faq, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
ids = []
for row in map(json.loads, open(faq)):
    question = {"role": "user", "content": row["instruction"]}
    answer = {"role": "assistant", "content": row["output"]}
    ids += tokenizer(tokenizer.apply_chat_template([question, answer], tokenize=False))["input_ids"]
with open(out, "w") as file:
    for _ in range(ROWS):
        row = ids[:LENGTH]
        file.write(json.dumps({"input_ids": row, "labels": row}) + "\n")
