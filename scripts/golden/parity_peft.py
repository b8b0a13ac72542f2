#!/usr/bin/env python3
"""The held-out loss that transformers and PEFT see, to compare with `fsdp-qlora eval --json`.

usage: parity_peft.py --model DIR [--adapter DIR] --dataset FILE [--max-length N] [--plain]

The base is loaded in f32; every linear weight of its layers is replaced by what NF4 with double quantization (bitsandbytes,
on the CPU) makes of it, rounded to bf16 once. `--plain` leaves the weights as they are. `--dataset`: tokenized rows, JSONL
with input_ids, labels (-100: not a target) and an optional attention_mask; longer rows are cut at --max-length. Prints one
object: loss (mean over target tokens; the first token of a row is none) and num_target_tokens.
"""

import argparse
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

TILE = 64  # rows of other lengths are dequantized wrongly by bitsandbytes on AVX-512


def quantized(weight):
    """f32 [out, in] -> the same through NF4 with double quantization and bf16."""
    codes, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()
    values = state.code[nibbles.int()].reshape(-1, TILE) * absmax[:, None]
    return values.reshape(weight.shape).bfloat16().float()


@torch.no_grad()
def load(model_dir, adapter, plain):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if not plain:
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(quantized(module.weight))
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def read_rows(path, max_length):
    """[(input_ids, labels)], padding taken off."""
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        length = min(sum(row.get("attention_mask", [1] * len(row["input_ids"]))), max_length)
        yield torch.tensor(row["input_ids"][:length]), torch.tensor(row["labels"][:length])


@torch.no_grad()
def evaluate(model, rows):
    """One row at a time: no padding can disturb. Sums in f64."""
    loss, targets = 0.0, 0
    for input_ids, labels in rows:
        logits = model(input_ids=input_ids[None], use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="none")
        loss += losses.double().sum().item()
        targets += int((labels[1:] != -100).sum())
    return {"loss": loss / targets, "num_target_tokens": targets}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    model = load(args.model, args.adapter, args.plain)
    print(json.dumps(evaluate(model, read_rows(args.dataset, args.max_length))))


if __name__ == "__main__":
    main()
