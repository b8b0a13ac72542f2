#!/usr/bin/env python3
"""Compare the losses of single tokens with those of transformers and PEFT, computed in f32, or in f64 to see rounding errors of one side.

usage: per_token.py LOSSES --model DIR [--adapter DIR] --dataset FILE [--base original|nf4|nf4-double] [--f64] [--tolerance T]

LOSSES is what `fsdp-qlora eval --per-token LOSSES` wrote for this model, adapter and dataset. Every row is tokenized by transformers and
computed by itself, without packing or padding, so that tokens, positions and losses are compared.

--base says which base `eval` had: `original` with `--set quantization.load_in_4bit=false`, `nf4` with `--set
quantization.bnb_4bit_use_double_quant=false`, `nf4-double` (the default of both programs) without either. The linear weights of the layers
are then what bitsandbytes makes of them on the CPU, in f32, but for three things: 8-bit scales are rounded to nearest and a block of zeros has code 0, as
in its GPU code, and the mean of scales is summed in f64, since one of the two roundings that the order of a sum can give moves about one
scale in 10,000.

Prints one object: the mean loss here and there, the number of target tokens, the largest and the mean difference of a token, and where the
largest is. The exit status is 1 if a token differs by more than --tolerance (1e-4). Rows must not have been split, nor hold several
documents.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from nf4 import BLOCK, SUPERBLOCK, dequantize, nearest_codes
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantized(weight, double):
    """f32 [out, in] -> the same through NF4."""
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    if double:
        # On a GPU a block of zeros gets code 0, which its inexact absmax makes a small number.
        codes = torch.where((state.absmax == 0).repeat_interleave(BLOCK // 2)[: codes.numel(), None], 0, codes)
    absmax = doubly_quantized(state.absmax) if double else state.absmax
    return dequantize(codes, absmax, state.code, weight.shape)


def doubly_quantized(absmax):
    """f32 [blocks] -> the same through 8 bits. bitsandbytes sums the mean in f32, whose last bit depends on the order of the sum."""
    offset = absmax.double().mean().float()
    dynamic_map = bnb.create_dynamic_map()
    nearest = torch.from_numpy(nearest_codes(absmax.numpy(), offset.numpy(), dynamic_map.numpy()))
    scales = torch.stack([(part - offset).abs().max() for part in absmax.split(SUPERBLOCK)])
    return dynamic_map[nearest.int()] * scales.repeat_interleave(SUPERBLOCK)[: absmax.numel()] + offset


@torch.no_grad()
def load(model_dir, adapter, base, f64):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if base != "original":
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(quantized(module.weight, base == "nf4-double"))
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return (model.double() if f64 else model).eval()


def token_ids(row, tokenizer):
    """The ids of a row in any of the forms that `eval` reads."""
    if "input_ids" in row:
        mask = row.get("attention_mask", [1] * len(row["input_ids"]))
        return [id for id, real in zip(row["input_ids"], mask, strict=True) if real]
    messages = row.get("messages")
    if "output" in row:
        question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    if messages:
        text = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = row["text"] if "text" in row else row["prompt"] + row["completion"]
    return tokenizer(text.removesuffix(tokenizer.eos_token) + tokenizer.eos_token)["input_ids"]


@torch.no_grad()
def compare(model, tokenizer, rows, lines):
    """Yields (loss here, line) of each line."""
    for row, of_row in groupby(lines, key=lambda line: line["row"]):
        of_row = list(of_row)
        ids = torch.tensor(token_ids(rows[row], tokenizer)[: of_row[-1]["position"] + 1])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        # In f64, since torch's own sum of 150,000 exponentials in f32 is off by 3e-5 on average.
        logits = logits.double()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        for line in of_row:
            if ids[line["position"]] != line["token"]:
                sys.exit(f"error: transformers has token {ids[line['position']]} at {line}")
            yield losses[line["position"] - 1].item(), line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--base", choices=["original", "nf4", "nf4-double"], default="nf4-double")
    parser.add_argument("--f64", action="store_true")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    rows, lines = ([json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()] for path in (args.dataset, args.losses))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args.model, args.adapter, args.base, args.f64)
    pairs = list(compare(model, tokenizer, rows, lines))
    differences = [abs(loss - line["loss"]) for loss, line in pairs]
    largest = max(range(len(pairs)), key=differences.__getitem__)
    print(json.dumps({
        "transformers": sum(loss for loss, _ in pairs) / len(pairs),
        "fsdp_qlora": sum(line["loss"] for _, line in pairs) / len(pairs),
        "num_target_tokens": len(pairs),
        "largest_difference": differences[largest],
        "mean_difference": sum(differences) / len(pairs),
        "at": pairs[largest][1],
    }))
    sys.exit(differences[largest] > args.tolerance)


if __name__ == "__main__":
    main()
