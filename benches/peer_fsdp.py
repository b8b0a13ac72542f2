#!/usr/bin/env python3
"""What the usual stack does on several GPUs of one host: transformers + PEFT + bitsandbytes NF4 with double quantization under
accelerate's FSDP, on random weights.

usage: torchrun --nproc_per_node 2 peer_fsdp.py --fsdp 1|2 [--shape llama-3.1-8b|llama-3.1-70b|tiny] [--layers N]
                [--micro-batch 4] [--seq 2048] [--accum 1] [--steps 4] [--warmup 2] [--offload] [--autocast]
                [--wrap accelerate|torch] [--device cuda|cpu] [--seed 0]

Every rank makes the whole 4-bit model on its own GPU from the same seed, one projection at a time (bfloat16, then NF4 stored as
bfloat16, so that all parameters have one dtype), adds LoRA r 16, alpha 16, dropout 0.05 on all seven projections in bfloat16, and
shards it. --fsdp 1: full shard, wrapped by PEFT's policy (a unit for each decoder layer and each LoRA matrix), use_orig_params
off, backward prefetch before. --fsdp 2: fully_shard on each decoder layer, reshard after forward; by accelerate's prepare, or with
--wrap torch by calls of this file. Gradient checkpointing on (not reentrant), attention sdpa, AdamW, clipping at 1.0.

A step is --accum micro-batches on each rank of --micro-batch rows of --seq random tokens, each with a backward that reduces its
gradients (no no_sync). --warmup steps, then --steps timed by the wall clock with the device synchronized. --autocast is
accelerate's mixed_precision="bf16": what Trainer(bf16=True) does; with --fsdp 1 it keeps the LoRA shards in float32. Prints one
JSON object from rank 0: tokens_per_second (all ranks, median step), step_ms, losses (rank 0, warm-up steps too), and peaks of rank
0: peak_* while training, setup_peak_allocated_gib while making and sharding the model, peak_host_gib (VmHWM).
--device cpu --shape tiny is a smoke test over gloo.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256),
    "tiny": (256, 512, 2, 4, 2, 1024),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYER = "LlamaDecoderLayer"
GIB = 1 << 30


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", type=int, choices=[1, 2], required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--wrap", choices=["accelerate", "torch"], default="accelerate")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.wrap == "torch" and args.fsdp == 1:
        parser.error("--wrap torch goes with --fsdp 2")
    return args


def progress(text):
    if os.environ.get("RANK", "0") == "0":
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def config(args):
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    result = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=args.layers or layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, vocab_size=vocabulary, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_parameters=rope, tie_word_embeddings=False, use_cache=False,
        bos_token_id=vocabulary - 256, eos_token_id=vocabulary - 255)
    result._attn_implementation = "sdpa"
    return result


def base_model(args, device):
    """The frozen model: laid out on meta, then drawn and quantized one projection at a time on the device."""
    import bitsandbytes
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    bf16 = torch.bfloat16
    torch.set_default_dtype(bf16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config(args))
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device=device).manual_seed(args.seed)

    def draw(shape):
        return torch.empty(shape, dtype=bf16, device=device).normal_(0.0, 0.02, generator=generator)

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, old in list(parent.named_children()):
                if name not in TARGETS:
                    continue
                outputs, inputs = old.weight.shape
                new = bitsandbytes.nn.Linear4bit(
                    inputs, outputs, bias=False, compute_dtype=bf16, compress_statistics=True, quant_type="nf4", quant_storage=bf16,
                    device="meta")
                weight = bitsandbytes.nn.Params4bit(
                    draw((outputs, inputs)), requires_grad=False, compress_statistics=True, quant_type="nf4", quant_storage=bf16,
                    module=new)
                new.weight = weight.to(device)  # quantizes
                assert new.weight.dtype == bf16 and new.quant_state is not None and new.quant_state.nested
                setattr(parent, name, new)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:  # embedding, head, norms
                data = draw(parameter.shape) if parameter.dim() > 1 else torch.ones(parameter.shape, dtype=bf16, device=device)
                module._parameters[name] = torch.nn.Parameter(data, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.config.quantization_config = BitsAndBytesConfig(  # PEFT asks for these
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=bf16,
        bnb_4bit_quant_storage=bf16)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def build(args, device):
    import torch
    from peft import LoraConfig, get_peft_model

    model = base_model(args, device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(args.seed)
    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    return model.train()


def start(args):
    """The accelerator, with its FSDP plugin. Starts the process group."""
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    bf16 = torch.bfloat16
    common = {"fsdp_version": args.fsdp, "cpu_offload": args.offload, "auto_wrap_policy": "transformer_based_wrap",
              "transformer_cls_names_to_wrap": [LAYER], "cpu_ram_efficient_loading": False}
    if args.fsdp == 1:
        plugin = FullyShardedDataParallelPlugin(
            reshard_after_forward="FULL_SHARD", use_orig_params=False, sync_module_states=False, limit_all_gathers=True,
            backward_prefetch="BACKWARD_PRE",
            mixed_precision_policy=MixedPrecision(param_dtype=bf16, reduce_dtype=bf16, buffer_dtype=torch.float32), **common)
    else:
        plugin = FullyShardedDataParallelPlugin(
            reshard_after_forward=True, mixed_precision_policy=MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=bf16), **common)
    if args.offload:
        os.environ["FSDP_OFFLOAD_PARAMS"] = "true"  # makes accelerate start gloo beside NCCL: norms of host gradients
    accelerator = Accelerator(
        cpu=args.device == "cpu", fsdp_plugin=plugin, mixed_precision="bf16" if args.autocast else "no")
    if args.device == "cpu":  # accelerate has no FSDP on CPU, torch does
        PartialState._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
        accelerator.state.distributed_type, accelerator.state.device = DistributedType.FSDP, torch.device("cpu")
        accelerator.state.fsdp_plugin = plugin
        if args.autocast:
            plugin.set_mixed_precision("bf16")
    assert accelerator.distributed_type == DistributedType.FSDP, accelerator.distributed_type
    return accelerator


def adamw(model):
    import torch

    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)


def wrap(args, accelerator, model):
    """Sharded model, its optimizer, and who sharded it."""
    import torch
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if args.fsdp == 1:
        accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        model = accelerator.prepare(model)
        return model, accelerator.prepare(adamw(model)), "accelerate"  # the optimizer needs the flat parameters
    if args.wrap == "accelerate":
        return *accelerator.prepare(model, adamw(model)), "accelerate"
    options = {
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy() if args.offload else OffloadPolicy(),
    }
    for module in list(model.modules()):
        if type(module).__name__ == LAYER:
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model, adamw(model), "torch.distributed.fsdp.fully_shard"


def one_step(accelerator, model, optimizer, batches):
    """Mean loss of an optimizer step on some micro-batches."""
    total = 0.0
    for ids in batches:
        with accelerator.autocast():
            loss = model(input_ids=ids, labels=ids).loss / len(batches)
        accelerator.backward(loss)
        total = total + loss.detach()
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def peak_host_gib():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")) / GIB


def main():
    args = parse()
    import torch

    cuda = args.device == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    accelerator = start(args)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    if cuda:
        torch.cuda.set_device(device)
    progress(f"started: {world} ranks, {device}")
    model = build(args, device)
    synchronize()
    accelerator.wait_for_everyone()
    progress(f"built: {args.shape}, {model.config.num_hidden_layers} layers")
    model, optimizer, wrapped_by = wrap(args, accelerator, model)
    synchronize()
    setup_peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    progress(f"wrapped by {wrapped_by}" + (f": {torch.cuda.memory_allocated() / GIB:.2f} GiB allocated" if cuda else ""))

    torch.manual_seed(args.seed + rank)
    generator = torch.Generator().manual_seed(args.seed + rank)
    losses, seconds = [], []
    for step in range(args.warmup + args.steps):
        ids = torch.randint(model.config.vocab_size, (args.accum, args.micro_batch, args.seq), generator=generator).to(device)
        synchronize()
        begin = time.perf_counter()
        loss = one_step(accelerator, model, optimizer, ids)
        synchronize()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
        progress(f"step {step + 1} of {args.warmup + args.steps}: {seconds[-1] * 1e3:.0f} ms, loss {losses[-1]:.4f}")
    median = statistics.median(seconds[args.warmup:])
    if rank == 0:
        print(json.dumps({
            "tokens_per_second": world * args.accum * args.micro_batch * args.seq / median,
            "step_ms": median * 1e3,
            "steps_ms": [second * 1e3 for second in seconds[args.warmup:]],
            "losses": losses,
            "world_size": world,
            "fsdp": args.fsdp,
            "wrapped_by": wrapped_by,
            "shape": args.shape,
            "layers": model.config.num_hidden_layers,
            "micro_batch": args.micro_batch,
            "seq": args.seq,
            "accum": args.accum,
            "offload": args.offload,
            "autocast": args.autocast,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
            "setup_peak_allocated_gib": setup_peak,
            "peak_host_gib": peak_host_gib(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")},
        }), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not through the process group's destructors, which may wait for the other ranks
