#!/usr/bin/env python3
"""Runs the program on every tiny model of families.py, and compares with transformers, PEFT and bitsandbytes.

usage: run_program.py PROGRAM [MODEL...]

Prints a line `parity MODEL QUANTITY VALUE` for each comparison; scripts/families makes tables of them. The exit status is 1 if a token
differs, or a loss of a token by more than 1e-4. All runs are on the CPU in f32, and losses are those of `eval --per-token`.

  nf4, nf4-double   a checkpoint that bitsandbytes saved in 4 bit, without and with double quantization: losses against its own forward
  skipped           the same where llm_int8_skip_modules leaves a part of the modules in 16 bit
  tokens            tokens of `generate` that are those of transformers, of all cases, without and with PEFT's adapter: 1 is all
  to-peft           an adapter on all linear modules that `train` wrote: losses in PEFT. No tensor may be missing or left over there.
  to-peft-ragged    an adapter whose modules differ in rank and scale, and that leaves modules out: losses in PEFT
  to-peft-nf4       an adapter that `train` wrote of the 4-bit checkpoint with double quantization, in PEFT on bitsandbytes' model
  from-peft         an adapter that PEFT saved: losses here
  and-back          the same after more training here: losses in PEFT
  merged            base and PEFT's adapter, which `merge` wrote in f32, in several files: logits in transformers against PEFT's adapter
  merged-tensors    the same: its tensors against those of PEFT's merge_and_unload
  merged-bf16       the same in bf16: the share of weights that are those of merge_and_unload, rounded
  gguf              bytes of the adapter in GGUF that differ between `export` and llama.cpp's converter, in f32, f16 and bf16; general.name apart
  merged-nf4        the 4-bit checkpoint with double quantization and its adapter, which `merge` wrote in f32: losses in transformers against
                    PEFT's adapter on bitsandbytes' model
"""

import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from common import ROOT, folder
from converted import convert, llama_cpp, read
from families import token_rows
from family_table import MODELS, SIZES
from four_bit import load, load_in_4bit, place_of, save_in_4bit
from generated import PROMPTS, generated
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

TOLERANCE = 1e-4
# The least shares. Two sums in f32 may differ in their last bit, and about one in a hundred thousand then rounds to another number of bf16.
LEAST = {"tokens": 1.0, "merged-bf16": 0.999}
IN_16_BIT = ["quantization.load_in_4bit=false"]
RAGGED = ["lora.rank_pattern={down_proj: 7, '.*layers\\.0\\.self_attn\\..*': 2}", "lora.alpha_pattern={down_proj: 3}",
          "lora.exclude_modules=[layers.0.self_attn.o_proj]", "training.loraplus_lr_ratio=2"]
ROWS = [row[0].tolist() for row in token_rows()]


def add_tokenizer(place, eos=SIZES["eos_token_id"]):
    """Writes a tokenizer in which the text of token 5 is `t05`. Tokenizer and config.json get this eos token."""
    tokenizer = Tokenizer(WordLevel({f"t{i:02}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"t{eos:02}"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((place / "config.json").read_text())
    for part in [config, config.get("text_config", {})]:
        part["eos_token_id"] = eos
    (place / "config.json").write_text(json.dumps(config))


class Program:
    """The program, and a folder in which its runs write."""

    def __init__(self, path, place):
        self.path, self.place = path, place
        self.rows = place / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))

    def llama_cpp(self):
        """Returns the folder of llama.cpp's scripts, which are fetched once."""
        place = self.place / "llama_cpp"
        if not place.exists():
            place.mkdir()
            llama_cpp(place)
        return next(place.glob("*/vendor/llama.cpp"))

    def run(self, *arguments, settings=()):
        device = [] if arguments[0] in ("merge", "export") else ["--device", "cpu"]
        command = [*map(str, [self.path, *device, *arguments]), *(word for key in settings for word in ("--set", key))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return done.stdout

    def losses(self, model, adapter=None, settings=()):
        """Returns the loss of each target token of ROWS, one after the other."""
        out = self.place / "losses.jsonl"
        named = ["--adapter", adapter] if adapter else []
        self.run("eval", "--model", model, *named, "--dataset", self.rows, "--per-token", out, "--overwrite", settings=settings)
        return torch.tensor([json.loads(line)["loss"] for line in out.read_text().splitlines()], dtype=torch.float64)

    def tokens(self, model, length, max_new_tokens, adapter=None):
        """Returns the tokens that `generate` appends to the first tokens of the last of ROWS."""
        prompt = " ".join(f"t{token:02}" for token in ROWS[-1][:length])
        named = ["--adapter", adapter] if adapter else []
        text = self.run("generate", "--model", model, *named, "--raw", "--prompt", prompt, "--max-new-tokens", max_new_tokens,
                        settings=IN_16_BIT)
        return [int(word.removeprefix("t")) for word in text.split()]

    def merge(self, model, adapter, base, dtype):
        """Merges into several files and returns the folder."""
        out = self.place / f"merged-{base}-{dtype}"
        shutil.rmtree(out, ignore_errors=True)
        self.run("merge", "--model", model, "--adapter", adapter, "--output", out, "--base", base, "--dtype", dtype, "--max-shard-size", "20KB")
        assert (out / "model.safetensors.index.json").exists() and "quantization_config" not in (out / "config.json").read_text()
        return out

    def train(self, model, out, adapter=None, settings=()):
        """Trains three steps, far enough that losses change by much more than what is tolerated."""
        recipe = self.place / "recipe.yaml"
        recipe.write_text(json.dumps({
            "model": str(model), "output_dir": str(out), "data": {"train": str(self.rows), "max_length": 64},
            "lora": {"adapter": str(adapter)} if adapter else {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
            "training": {"max_steps": 3, "learning_rate": 0.02, "gradient_accumulation_steps": 1, "warmup_steps": 0}}))
        self.run("train", "-c", recipe, settings=settings)
        return out


@torch.no_grad()
def losses_of(model):
    """Returns the loss of each target token of ROWS, computed by transformers."""
    losses = []
    for row in token_rows():
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"))
    return torch.cat(losses)


def with_adapter(model, adapter):
    """Returns the model with an adapter, which must have exactly the tensors that PEFT expects there."""
    with warnings.catch_warnings(action="error", category=UserWarning):
        peft = PeftModel.from_pretrained(model, adapter)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        found, expected = set(file.keys()), set(get_peft_model_state_dict(peft))
    assert found == expected, f"missing: {sorted(expected - found)}, left over: {sorted(found - expected)}"
    loaded = peft.load_adapter(adapter, "again")
    assert not loaded.unexpected_keys and not any("lora_" in key for key in loaded.missing_keys), loaded
    return peft


def difference(found, expected):
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return (found - expected).abs().max().item()


def moved(with_it, without):
    """Checks that an adapter changes the losses at all, and returns them."""
    assert difference(with_it, without) > 100 * TOLERANCE
    return with_it


def skipped(name):
    """Returns a module of each kind that llm_int8_skip_modules can name: the head (which would be in 4 bit if the list did not name it), a part of
    a layer, and the end of a name. `mlp` alone leaves nothing in 16 bit, since it neither begins nor ends the path of a linear module."""
    layers = "model.language_model.layers" if MODELS[name].language_model else "model.layers"
    return ["lm_head", f"{layers}.0.self_attn", "down_proj", "mlp"]


def compare_4bit(program, name, plain):
    """Yields (quantity, difference). Leaves the checkpoint with double quantization in `nested`."""
    for quantity, double, dtype, skip in [("nf4", False, torch.float32, None), ("skipped", False, torch.bfloat16, skipped(name)),
                                          ("nf4-double", True, torch.bfloat16, None)]:
        out = plain.parent / quantity
        save_in_4bit(name, plain, out, double, dtype, skip)
        add_tokenizer(out)
        yield quantity, difference(program.losses(out), losses_of(load_in_4bit(name, out)))
    trained = program.train(out, plain.parent / "trained-nf4")
    base = losses_of(load_in_4bit(name, out))
    expected = moved(losses_of(with_adapter(load_in_4bit(name, out), trained).train()), base)
    yield "to-peft-nf4", difference(program.losses(out, trained), expected)
    merged = program.merge(out, trained, "dequantized", "float32")
    yield "merged-nf4", difference(losses_of(load(name, merged).eval()), expected)


def compare_adapters(program, name, plain):
    """Yields (quantity, difference)."""
    def in_peft(adapter):
        return moved(losses_of(with_adapter(load(name, plain).eval(), adapter).eval()), base)

    base = losses_of(load(name, plain).eval())
    for quantity, settings in [("to-peft", []), ("to-peft-ragged", RAGGED)]:
        trained = program.train(plain, plain.parent / quantity, settings=[*IN_16_BIT, *settings])
        yield quantity, difference(program.losses(plain, trained, IN_16_BIT), in_peft(trained))
    peft = folder(f"families/{name}") / "adapter"
    before = in_peft(peft)
    yield "from-peft", difference(program.losses(plain, peft, IN_16_BIT), before)
    trained = program.train(plain, plain.parent / "trained-on", adapter=peft, settings=IN_16_BIT)
    yield "and-back", difference(program.losses(plain, trained, IN_16_BIT), moved(in_peft(trained), before))


@torch.no_grad()
def logits_of(model):
    return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in token_rows()])


def compare_merged(program, name, plain):
    """Yields (quantity, difference or share)."""
    adapter = folder(f"families/{name}") / "adapter"
    peft = with_adapter(load(name, plain).eval(), adapter).eval()
    merged = load(name, program.merge(plain, adapter, "original", "float32")).eval()
    yield "merged", difference(logits_of(merged), logits_of(peft))
    peft.delete_adapter("again")
    ours, theirs = merged.state_dict(), peft.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    yield "merged-tensors", max(difference(ours[key], theirs[key]) for key in ours)
    halves = load(name, program.merge(plain, adapter, "original", "bfloat16"), dtype=torch.bfloat16).state_dict()
    same = sum((halves[key] == theirs[key].bfloat16()).sum().item() for key in halves)
    yield "merged-bf16", same / sum(tensor.numel() for tensor in halves.values())


def compare_gguf(program, name, plain):
    """Yields the number of bytes that differ, for families whose adapters the converter knows."""
    if not json.loads((ROOT / "gguf.json").read_text())[name]:
        return
    adapter, ours, theirs = folder(f"families/{name}") / "adapter", program.place / "ours.gguf", program.place / "theirs.gguf"
    differing = 0
    for outtype in ["f32", "f16", "bf16"]:
        program.run("export", "--model", plain, "--adapter", adapter, "--gguf", ours, "--outtype", outtype, "--overwrite")
        assert convert(program.llama_cpp(), plain, adapter, theirs, outtype)
        left, right = read(ours), read(theirs)
        for parts in [left, right]:
            parts["pairs"].pop("general.name")
        assert list(left["pairs"].items()) == list(right["pairs"].items()), (left["pairs"], right["pairs"])
        assert list(left["tensors"]) == list(right["tensors"]) and left["infos"] == right["infos"]
        assert len(left["data"]) == len(right["data"])
        differing += sum(a != b for a, b in zip(left["data"], right["data"]))
    yield "gguf", differing


def compare_tokens(program, name, place):
    """Yields, for each text, the share of tokens up to the first that differs."""
    adapters = {"base": None, "adapter": folder(f"families/{name}") / "adapter"}
    for case in MODELS[name].cases:
        files = place / "tokens" / case
        expected = generated(name, case, files)
        # The eos token becomes one that no text has.
        add_tokenizer(files, min(set(range(SIZES["vocab_size"])) - {token for texts in expected.values() for text in texts for token in text}))
        for key, adapter in adapters.items():
            for prompt, theirs in zip(PROMPTS, expected[key], strict=True):
                ours = program.tokens(files, *prompt, adapter)
                same = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
                yield same / len(theirs)


def compare(program, name):
    """Prints the comparisons of a model; returns whether all are within their bounds."""
    with tempfile.TemporaryDirectory() as place:
        plain = place_of(name, next(iter(MODELS[name].cases)), Path(place) / "plain")
        add_tokenizer(plain)
        found = dict([*compare_4bit(program, name, plain), *compare_adapters(program, name, plain), *compare_merged(program, name, plain)])
        found |= compare_gguf(program, name, plain)
        found["tokens"] = min(compare_tokens(program, name, Path(place)))
    for quantity, value in found.items():
        print(f"parity {name} {quantity} {value:e}", flush=True)
    return all(value >= LEAST[quantity] if quantity in LEAST else value <= TOLERANCE for quantity, value in found.items())


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path, chosen = sys.argv[1], sys.argv[2:] or list(MODELS)
    with tempfile.TemporaryDirectory() as place:
        program = Program(Path(path).resolve(), Path(place))
        failed = [name for name in chosen if not compare(program, name)]
    if failed:
        sys.exit(f"error: beyond what is allowed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
