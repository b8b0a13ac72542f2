#!/usr/bin/env python3
"""What the usual stack does on this CPU: transformers + PEFT + bitsandbytes NF4 with double quantization, one process.

usage: peer_cpu.py --model DIR --adapter DIR --dataset FILE [--length 512] [--steps 7] [--threads 2] [--no-recompute]
                   [--dtype float32|bfloat16] [--learning-rate 1e-4]

Step i trains on row i of `--dataset` (tokenized rows: input_ids, labels), cut at --length: micro-batch 1, AdamW, clipping at
1.0. Gradient checkpointing is on unless --no-recompute. `--adapter` is the PEFT adapter to start from, so that both sides
start from the same numbers; without it LoRA r 16 on all seven projections is made new. Prints one JSON object: losses per
step, tokens_per_second (median of the last five steps), peak_host_bytes (VmHWM). The packages: scripts/golden/requirements.txt.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

MEASURED = 5


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=MEASURED + 2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-recompute", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


def load(args):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, args.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization, dtype=dtype, device_map="cpu")
    model.config.use_cache = False
    if not args.no_recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    else:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    return model.train()


def one_step(model, optimizer, row, length):
    """Loss of one optimizer step on one row."""
    import torch

    input_ids = torch.tensor([row["input_ids"][:length]])
    labels = torch.tensor([row["labels"][:length]])
    loss = model(input_ids=input_ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def peak_host_bytes():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main():
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    import torch

    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in Path(args.dataset).read_text().splitlines()]
    model = load(args)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    losses, rates = [], []
    for step in range(args.steps):
        row = rows[step % len(rows)]
        start = time.perf_counter()
        losses.append(one_step(model, optimizer, row, args.length))
        rates.append(min(len(row["input_ids"]), args.length) / (time.perf_counter() - start))
    print(json.dumps({
        "losses": losses,
        "tokens_per_second": statistics.median(rates[-MEASURED:]),
        "peak_host_bytes": peak_host_bytes(),
        "recompute": not args.no_recompute,
        "dtype": args.dtype,
        "threads": args.threads,
    }))


if __name__ == "__main__":
    main()
