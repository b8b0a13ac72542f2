#!/usr/bin/env python3
"""Loads adapters that `fsdp-qlora train` wrote with vLLM's own loader, on the CPU, and compares what they add with PEFT.

usage: serving_vllm.py PROGRAM [MODEL...]

It needs the packages of requirements.txt and vLLM (tried with 0.33.0: `pip install --no-deps vllm==0.33.0`, and the packages that its import
asks for); so nothing else calls it. vLLM checks the configuration, the names and the ranks as it does before it serves an adapter; no
kernel of it runs. For each model whose architecture vLLM knows, two adapters are loaded: one on all linear modules, and one whose modules
differ in rank and scale and that leaves modules out. Prints a line `parity MODEL QUANTITY VALUE` for each comparison:

  vllm, vllm-ragged   the largest ‖difference‖ / ‖PEFT's‖ over all modules of scale · B · A (allowed: 1e-6)
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from family_table import MODELS
from four_bit import load, place_of
from peft.tuners.lora import LoraLayer
from run_program import IN_16_BIT, RAGGED, Program, add_tokenizer, with_adapter
from vllm.config.lora import LoRAConfig
from vllm.lora import lora_model
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.registry import ModelRegistry

TOLERANCE = 1e-6
MAX_RANK = 16
# Memory can be pinned only where there is a GPU.
lora_model.PIN_MEMORY = False
# Modules that a class of vLLM's own serves as they are; those that it packs, and those that a model has fused, come from the class. A class
# that runs transformers' model packs none.
UNPACKED = {"o_proj", "down_proj"}
ALL = UNPACKED | {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def known_to_vllm(plain):
    """Returns vLLM's class of a model, or `None`."""
    [architecture] = json.loads((plain / "config.json").read_text())["architectures"]
    registered = ModelRegistry.models.get(architecture)
    return registered and registered.load_model_cls()


def renaming(known):
    """Returns what turns names of checkpoints into those of vLLM, or `None`, without the packing of modules."""
    mapper = getattr(known, "hf_to_vllm_mapper", None)
    return mapper and mapper.get_rename_mapper()


def deltas_of_vllm(known, adapter):
    """Returns scale · B · A of each module, by the name that vLLM gives it."""
    helper = PEFTHelper.from_local_dir(str(adapter), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=MAX_RANK))
    packed = {part for parts in known.packed_modules_mapping.values() for part in parts}
    expected = UNPACKED | packed if packed else ALL
    model = lora_model.LoRAModel.from_local_checkpoint(str(adapter), expected, helper, lora_model_id=1, device="cpu",
                                                       dtype=torch.float32, weights_mapper=renaming(known))
    return {name: weights.scaling * (weights.lora_b @ weights.lora_a) for name, weights in model.loras.items()}


def deltas_of_peft(peft):
    modules = peft.base_model.model.named_modules()
    return {name: module.get_delta_weight("default") for name, module in modules if isinstance(module, LoraLayer)}


def difference(known, ours, theirs):
    """Returns the largest relative difference of a module; both have the same modules under the names of vLLM."""
    mapper = renaming(known)
    expected = {(mapper and mapper._map_name(name)) or name: delta for name, delta in theirs.items()}
    assert ours.keys() == expected.keys(), sorted(ours.keys() ^ expected.keys())
    return max(((ours[name] - delta).norm() / delta.norm()).item() for name, delta in expected.items())


def compare(program, name, files):
    """Yields (quantity, difference), or nothing for an architecture that vLLM does not know."""
    plain = place_of(name, next(iter(MODELS[name].cases)), files / "plain")
    add_tokenizer(plain)
    known = known_to_vllm(plain)
    if known is None:
        return
    for quantity, settings in [("vllm", []), ("vllm-ragged", RAGGED)]:
        adapter = program.train(plain, files / quantity, settings=[*IN_16_BIT, *settings])
        yield quantity, difference(known, deltas_of_vllm(known, adapter), deltas_of_peft(with_adapter(load(name, plain), adapter)))


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    path, chosen = sys.argv[1], sys.argv[2:] or MODELS
    failed = []
    with tempfile.TemporaryDirectory() as place:
        program = Program(Path(path).resolve(), Path(place))
        for name in chosen:
            with tempfile.TemporaryDirectory() as files:
                found = dict(compare(program, name, Path(files)))
            for quantity, value in found.items():
                print(f"parity {name} {quantity} {value:e}", flush=True)
            if not found:
                print(f"# vLLM has no class for {name}", flush=True)
            if max(found.values(), default=0) > TOLERANCE:
                failed.append(name)
    if failed:
        sys.exit(f"error: beyond what is allowed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
