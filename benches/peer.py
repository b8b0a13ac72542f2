#!/usr/bin/env python3
"""What the usual stack does: transformers + PEFT + bitsandbytes NF4 with double quantization, one process.

usage: peer.py --model DIR --adapter DIR --dataset FILE [--device cpu|cuda] [--dtype float32|bfloat16|float16] [--batch 1]
               [--steps 7] [--shuffle SEED] [--reverse] [--length 512] [--learning-rate 1e-4] [--scheduler constant|linear]
               [--warmup-steps 0] [--no-recompute] [--threads 2]

A step takes --batch rows of `--dataset` (tokenized rows: input_ids, labels), cut at --length, one micro-batch each, and the mean
loss over all their target tokens; AdamW, clipping at 1.0. Rows come in the order of the file, or with --shuffle in the order in
which `fsdp-qlora train` takes them with that training.seed. --reverse takes the rows of a step in the opposite order: the same
step but for the order of sums. Gradient checkpointing is on unless --no-recompute. `--adapter` is the PEFT adapter to start
from, so that both sides start from the same numbers; without it LoRA r 16 on all seven projections is made new. Prints one JSON
object: losses per step, tokens_per_second (median of the last five steps), peak_host_bytes (VmHWM). The packages:
scripts/golden/requirements.txt.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

MEASURED = 5
MASK = (1 << 64) - 1


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=MEASURED + 2)
    parser.add_argument("--shuffle", type=int)
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--scheduler", choices=["constant", "linear"], default="constant")
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-recompute", action="store_true")
    return parser.parse_args()


def permutation(n, seed, epoch):
    """The order of an epoch in `src/data/sampler.rs`: Fisher-Yates over SplitMix64."""
    state = (seed * 0x2545F4914F6CDD1D & MASK) ^ (epoch * 0xD6E8FEB86659FD93 & MASK)
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        j = ((z ^ z >> 31) * (i + 1)) >> 64
        order[i], order[j] = order[j], order[i]
    return order


def rows_of_steps(args, rows):
    """The rows of each step."""
    epochs = -(-args.steps * args.batch // len(rows))
    if args.shuffle is None:
        order = list(range(len(rows))) * epochs
    else:
        order = [i for epoch in range(epochs) for i in permutation(len(rows), args.shuffle, epoch)]
    for step in range(args.steps):
        chosen = [rows[i] for i in order[step * args.batch:(step + 1) * args.batch]]
        yield chosen[::-1] if args.reverse else chosen


def load(args):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, args.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization, dtype=dtype, device_map=args.device)
    model.config.use_cache = False
    if not args.no_recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    else:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    return model.train()


def one_step(model, optimizer, rows, args):
    """Loss of one optimizer step on some rows: the mean over all their target tokens."""
    import torch

    # The first token of a row is never predicted.
    targets = [sum(label != -100 for label in row["labels"][1:args.length]) for row in rows]
    total = 0.0
    for row, count in zip(rows, targets):
        input_ids = torch.tensor([row["input_ids"][:args.length]], device=args.device)
        labels = torch.tensor([row["labels"][:args.length]], device=args.device)
        loss = model(input_ids=input_ids, labels=labels).loss * (count / sum(targets))
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def peak_host_bytes():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def learning_rate(args, step):
    """As transformers.get_scheduler has it."""
    if args.scheduler == "constant":
        return args.learning_rate
    if step < args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    return args.learning_rate * (args.steps - step) / max(1, args.steps - args.warmup_steps)


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
    for step, chosen in enumerate(rows_of_steps(args, rows)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        start = time.perf_counter()
        losses.append(one_step(model, optimizer, chosen, args))
        tokens = sum(min(len(row["input_ids"]), args.length) for row in chosen)
        rates.append(tokens / (time.perf_counter() - start))
    print(json.dumps({
        "losses": losses,
        "tokens_per_second": statistics.median(rates[-MEASURED:]),
        "peak_host_bytes": peak_host_bytes(),
        "recompute": not args.no_recompute,
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
    }))


if __name__ == "__main__":
    main()
