#!/usr/bin/env python3
"""tests/golden/families-4bit/: models of families.py as bitsandbytes saves them in NF4, with its losses. `four_bit.py` writes them all.

  MODEL/config.json, MODEL/model.safetensors   what save_pretrained writes
  MODEL/logits.safetensors                     base, f32 [lengths, vocab_size]: as in tests/golden/families

The logits are of bitsandbytes' own forward on the CPU. Its modules are in train mode, because eval mode would repack the codes and round
absmax to bf16 on some processors; nothing is dropped out. Weights are dequantized to f32 (`QuantState.dtype`) for a checkpoint of any
dtype, which is what the program does on CPU ranks; bitsandbytes would round those of a bf16 checkpoint to bf16.
"""

import shutil

import bitsandbytes as bnb
import torch
import transformers
from common import folder, write_tensors
from families import prefix_logits, token_rows
from family_table import MODELS
from transformers import BitsAndBytesConfig

# The models whose files are kept: fused modules; prefixed names and a vision tower. tiny.py has a head of its own in 16 bit.
KEPT = {"phi3-tied": {"double_quant": False, "dtype": torch.bfloat16}, "mistral3": {"double_quant": True, "dtype": torch.bfloat16}}


def place_of(name, case, place):
    """A folder `place` that is a model of families.py with the config.json of a case."""
    place.mkdir(parents=True)
    files = folder(f"families/{name}")
    shutil.copy(files / "model.safetensors", place)
    shutil.copy(files / case / "config.v5.json", place / "config.json")
    return place


def load(name, place, **arguments):
    """The model in `place`, f32, attention `eager`."""
    cls = getattr(transformers, MODELS[name].architecture)
    return cls.from_pretrained(place, attn_implementation="eager", device_map="cpu", **{"dtype": torch.float32} | arguments)


def save_in_4bit(name, place, out, double_quant, dtype, skip_modules=None):
    """Writes the model in `place` to `out` in 4 bit, with modules in 16 bit that skip_modules names."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8, llm_int8_skip_modules=skip_modules)
    model = load(name, place, quantization_config=quantization, dtype=dtype)
    model.save_pretrained(out)  # before any forward in eval mode, which repacks the codes
    (out / "generation_config.json").unlink(missing_ok=True)


def load_in_4bit(name, place):
    """A model that `save_in_4bit` wrote, ready for bitsandbytes' own forward in f32; nothing is dropped out."""
    model = load(name, place).train()
    for module in model.modules():
        module.attention_dropout = module.residual_dropout = 0.0
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.dtype = module.compute_dtype = torch.float32
            module.compute_type_is_set = True
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()  # transformers keeps the dtype of the file
    return model


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for name, arguments in KEPT.items():
        out, plain = folder(f"families-4bit/{name}"), folder("families-4bit/plain")
        shutil.rmtree(out)
        shutil.rmtree(plain)
        place_of(name, next(iter(MODELS[name].cases)), plain)
        save_in_4bit(name, plain, out, **arguments)
        shutil.rmtree(plain)
        write_tensors(out / "logits.safetensors", {"base": prefix_logits(load_in_4bit(name, out), token_rows()[-1])})


if __name__ == "__main__":
    main()
