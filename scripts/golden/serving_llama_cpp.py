#!/usr/bin/env python3
"""Serves adapters that `fsdp-qlora export --gguf` wrote with llama.cpp itself, and compares with this program and with PEFT.

usage: serving_llama_cpp.py PROGRAM [MODEL...]

This script needs the packages of requirements.txt and `pip install llama-cpp-python==0.3.36`, which compiles llama.cpp for some minutes, so
nothing else calls it. The models are those whose adapters the converter knows (converted.py). llama.cpp's own classes write their bases as
GGUF files in float32, without a vocabulary. The script prints a line `parity MODEL QUANTITY VALUE` for each comparison:

  llama-losses   what the adapter adds to the loss of each token: ‖difference‖ / ‖ours‖, llama.cpp against `eval --per-token` (allowed: 0.02)
  llama-logits   what the adapter adds to all logits, compared in the same way with PEFT (allowed: 0.02)
  llama-argmax   the share of positions whose most likely token is PEFT's (allowed: 0.95 and more)
  llama-base     ‖difference‖ / ‖transformers'‖ of the logits without the adapter. Where llama.cpp computes the base itself otherwise (no
                 windows for Mistral, layers without RoPE by a rule of its own), the adapter is not judged.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import ROOT, folder
from converted import llama_cpp
from families import token_rows
from family_table import MODELS
from four_bit import load, place_of
from run_program import IN_16_BIT, Program, add_tokenizer, logits_of, with_adapter

TOLERANCE = 0.02
LEAST_EQUAL = 0.95

# Writes the base in the folder argv[2] to argv[3], with the scripts of llama.cpp in argv[1].
WRITE_BASE = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
base, out = map(Path, sys.argv[2:])
known = get_model_class(get_model_architecture(ModelBase.load_hparams(base, False), ModelType.TEXT))
class WithoutVocabulary(known):
    model_arch = known.model_arch
    def set_vocab(self):
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
with torch.inference_mode():
    WithoutVocabulary(base, gguf.LlamaFileType.ALL_F32, out).write()
"""


def logits_of_llama_cpp(base, adapter=None):
    """Returns the logits of all rows, one after the other."""
    from llama_cpp import GGML_TYPE_F32, Llama

    rows = []
    for row in token_rows():
        model = Llama(str(base), lora_path=adapter and str(adapter), n_ctx=64, logits_all=True, verbose=False, n_threads=1,
                      type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False)
        model.eval(row[0].tolist())
        rows.append(torch.tensor(model.scores[: row.shape[1]]).double())
    return torch.cat(rows)


def losses(logits):
    """Returns the loss of each target token of all rows."""
    targets = token_rows()
    parts = logits.split([row.shape[1] for row in targets])
    return torch.cat([torch.nn.functional.cross_entropy(part[:-1], row[0, 1:], reduction="none") for part, row in zip(parts, targets)])


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def compare(program, scripts, name, place):
    """Yields (quantity, value)."""
    plain, adapter = place_of(name, next(iter(MODELS[name].cases)), place / "plain"), folder(f"families/{name}") / "adapter"
    base, lora = place / "base.gguf", place / "lora.gguf"
    add_tokenizer(plain)
    subprocess.run([sys.executable, "-c", WRITE_BASE, scripts, plain, base], check=True, capture_output=True, text=True)
    program.run("export", "--model", plain, "--adapter", adapter, "--gguf", lora)
    without, having = logits_of_llama_cpp(base), logits_of_llama_cpp(base, lora)
    ours = program.losses(plain, adapter, IN_16_BIT) - program.losses(plain, None, IN_16_BIT)
    yield "llama-losses", relative(losses(having) - losses(without), ours)
    theirs = logits_of(load(name, plain).eval()).double()
    yield "llama-base", relative(without, theirs)
    with_it = logits_of(with_adapter(load(name, plain).eval(), adapter).eval()).double()
    yield "llama-logits", relative(having - without, with_it - theirs)
    yield "llama-argmax", (having.argmax(-1) == with_it.argmax(-1)).double().mean().item()


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = [name for name, digests in json.loads((ROOT / "gguf.json").read_text()).items() if digests]
    path, chosen = sys.argv[1], sys.argv[2:] or known
    failed = []
    with tempfile.TemporaryDirectory() as place:
        scripts, program = llama_cpp(place), Program(Path(path).resolve(), Path(place))
        for name in chosen:
            try:
                with tempfile.TemporaryDirectory() as files:
                    found = dict(compare(program, scripts, name, Path(files)))
            except (ValueError, subprocess.CalledProcessError) as error:
                # llama.cpp has this architecture, but not with these biases, for example.
                print(f"# {name}: {(getattr(error, 'stderr', None) or str(error)).splitlines()[-1]}", flush=True)
                continue
            for quantity, value in found.items():
                print(f"parity {name} {quantity} {value:e}", flush=True)
            if found["llama-base"] > TOLERANCE:
                print(f"# {name}: llama.cpp computes the base otherwise", flush=True)
            elif found.pop("llama-argmax") < LEAST_EQUAL or max(found.values()) > TOLERANCE:
                failed.append(name)
    if failed:
        sys.exit(f"error: beyond what is allowed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
