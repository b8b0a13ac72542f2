#!/usr/bin/env python3
"""tests/golden/generated.json: the tokens that transformers' `generate` appends to a prompt, greedily, for each case of families.py.

  MODEL/CASE -> base, adapter: new tokens for each entry of PROMPTS, as text; nothing ends a text early

The prompts are beginnings of the last row of families.py. The arithmetic is f32 on the CPU, attention is eager, keys and values are kept.
"""

import tempfile
from pathlib import Path

import torch
from common import ROOT, folder, write_json
from families import token_rows
from family_table import MODELS
from four_bit import load, place_of
from peft import PeftModel

# (tokens of the prompt, new tokens). The first grows beyond windows (8) and lengths of RoPE scalings (16) but not of LongRoPE (24), where
# other factors would begin; the second prompt is longer than all of these.
PROMPTS = [(6, 19), (26, 30)]


@torch.no_grad()
def greedy(model, row, length, max_new_tokens):
    """The new tokens after the first ones of a row."""
    prompt = row[:, :length]
    tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False,
                            use_cache=True, eos_token_id=[], pad_token_id=0)[0, length:].tolist()
    assert len(tokens) == max_new_tokens
    return tokens


def generated(name, case, place):
    """The new tokens after each prompt, without and with the adapter."""
    model, row = load(name, place_of(name, case, place)).eval(), token_rows()[-1]
    base = [greedy(model, row, *prompt) for prompt in PROMPTS]
    model = PeftModel.from_pretrained(model, folder(f"families/{name}") / "adapter").eval()
    return {"base": base, "adapter": [greedy(model, row, *prompt) for prompt in PROMPTS]}


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    tokens = {}
    with tempfile.TemporaryDirectory() as place:
        for name, model in MODELS.items():
            for case in model.cases:
                found = generated(name, case, Path(place) / name / case)
                tokens[f"{name}/{case}"] = {key: [" ".join(map(str, one)) for one in each] for key, each in found.items()}
    write_json(ROOT / "generated.json", {"prompts": PROMPTS, "tokens": tokens})


if __name__ == "__main__":
    main()
