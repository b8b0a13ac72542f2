#!/usr/bin/env python3
"""tests/golden/families/: a tiny random model of every family, with logits, loss and LoRA gradients by transformers and PEFT.

usage: families.py [MODEL...]

  families.json                 rows: token ids; lengths: prefixes of the last row; per case its loss, num_target_tokens,
                                features: the largest change of a logit without each
  MODEL/model.safetensors       weights of all cases of a model, bf16; names as in the files of the Hub
  MODEL/adapter/                LoRA on all linear modules (r 4, alpha 8), bf16, as PEFT saves it; A and B are random
  MODEL/CASE/config.v4.json     the config as transformers 4 spelled it, config.v5.json the same as transformers 5 writes it
  MODEL/CASE/logits.safetensors base and adapter, f32 [lengths, vocab_size]: logits of the last token of each prefix of one row
  MODEL/CASE/grads.safetensors  f32, names as in the adapter: d loss / d of every LoRA matrix
  bfloat16 of a case            relative errors of transformers' bf16 against that: logits (all of the adapter's), and of each gradient

The arithmetic is f32 on the CPU, attention is eager, nothing is dropped out. A row is a forward pass of its own; loss is the mean
over the targets of all rows, which are all tokens but the first of a row. Every feature of a case is taken away once: a logit
must change by MEASURABLE at least, so that a program without the feature cannot pass.
"""

import argparse
import copy
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import torch
import transformers
from common import folder, normal, write_json, write_tensors
from family_table import MODELS, SIZES
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

TOLERANCE = 1e-4
MEASURABLE = 100 * TOLERANCE
ROWS = [7, 20, 40]  # lengths: shorter and longer than windows (8) and original lengths (16, 24)
LENGTHS = [1, 6, 9, 17, 24, 25, 33, 40]  # prefixes of the last row whose last logits are kept
ZERO_CENTERED = {"gemma2", "gemma3_text", "gemma3"}  # norms that multiply by 1 + weight
TEXT_LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

VISION = {
    "gemma3": {"mm_tokens_per_image": 4, "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4}},
    "mistral3": {"vision_config": {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 8, "patch_size": 4}},
}


def token_rows():
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(3, SIZES["vocab_size"], (1, length), generator=draw) for length in ROWS]


def config_dict(model, changes):
    """The config.json of a case, spelled as the table spells it."""
    written = copy.deepcopy(model.config | changes)
    outer = {"architectures": [model.architecture], "model_type": model.model_type}
    if model.language_model:
        return outer | model.outer | {"text_config": written} | copy.deepcopy(VISION[model.model_type]) | {"torch_dtype": "bfloat16"}
    return outer | written | {"torch_dtype": "bfloat16"}


def build(config):
    """The model of a config.json, f32, with the weights it was made with."""
    read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    model = getattr(transformers, config["architectures"][0])._from_config(read, attn_implementation="eager")
    return model.float().eval()


def randomize(model, seed, zero_centered):
    """bf16 weights with logits of a few units and uneven attention; norms and biases far from neutral."""
    gains = {"q_proj": 1.5, "k_proj": 1.5, "qkv_proj": 1.3, "lm_head": 2.0}
    for idx, (name, parameter) in enumerate(sorted(model.named_parameters())):
        shape = parameter.shape
        if "norm" in name:
            value = (0.0 if zero_centered else 1.0) + normal(seed + idx, *shape, std=0.3)
        elif name.endswith("bias"):
            value = normal(seed + idx, *shape, std=0.3)
        elif "embed_tokens" in name:
            value = normal(seed + idx, *shape, std=0.25)
        else:
            std = gains.get(name.split(".")[-2], 1.0) * shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            value = normal(seed + idx, *shape, std=std)
        parameter.data.copy_(value.bfloat16())


def saved_weights(model, new_names):
    """bf16 tensors as save_pretrained names them, or with the names of memory."""
    if new_names:
        return {name: tensor.bfloat16() for name, tensor in sorted(model.state_dict().items())}
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out)
        return {name: tensor.bfloat16() for name, tensor in sorted(load_file(Path(out) / "model.safetensors").items())}


def with_weights(config, weights):
    """The model of a config with the weights of another, as far as it has a place for them."""
    model = build(config)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


@torch.no_grad()
def prefix_logits(model, row):
    return torch.stack([model(row[:, :length], use_cache=False).logits[0, -1] for length in LENGTHS])


def with_adapter(model, name, language_model):
    targets = TEXT_LINEARS if language_model else "all-linear"
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, bias="none",
                                            task_type="CAUSAL_LM", base_model_name_or_path=name))
    for idx, (key, parameter) in enumerate(sorted(trainable(peft).items())):
        std = 0.1 if "lora_B" in key else parameter.shape[1] ** -0.5
        parameter.data.copy_(normal(9000 + idx, *parameter.shape, std=std).bfloat16())
    return peft.eval()


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(peft, name, out):
    peft.peft_config["default"].base_model_name_or_path = name
    for parameter in trainable(peft).values():
        parameter.data = parameter.data.bfloat16()
    peft.save_pretrained(out)
    for parameter in trainable(peft).values():
        parameter.data = parameter.data.float()
    (out / "README.md").unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set in PEFT: its order is another each time
    write_json(out / "adapter_config.json", config)


def loss_and_grads(peft, rows):
    """(mean loss, number of targets, gradients under the names of the adapter)."""
    num_targets = sum(row.shape[1] - 1 for row in rows)
    loss = 0.0
    peft.zero_grad()
    for row in rows:
        logits = peft(row, use_cache=False).logits[0, :-1].float()
        part = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum") / num_targets
        part.backward()
        loss += part.double().item()
    grads = {name: parameter.grad for name, parameter in trainable(peft).items()}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    return loss, num_targets, get_peft_model_state_dict(peft, state_dict=grads)


def relative_error(found, expected):
    return float(f"{((found.double() - expected.double()).norm() / expected.double().norm()).item():.3g}")


def bfloat16_errors(peft, rows, logits, grads):
    """Errors of a model in bf16 under autocast with LoRA in f32, which is how Trainer and PEFT run with bf16=True."""
    peft.bfloat16()
    for parameter in trainable(peft).values():
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = prefix_logits(peft, rows[-1]).float()
        found_grads = loss_and_grads(peft, rows)[2]
    return {"logits": relative_error(found, logits),
            "gradients": {name: relative_error(found_grads[name], grad) for name, grad in sorted(grads.items())}}


def new_spelling(config):
    """The config.json that transformers 5 writes."""
    read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with tempfile.TemporaryDirectory() as out:
        read.save_pretrained(out)
        written = json.loads((Path(out) / "config.json").read_text())
    return {"architectures": config["architectures"]} | written


def feature_changes(model, case, weights, row, logits):
    """Feature -> largest change of a logit without it."""
    changes = {}
    neutral = 0.0 if model.model_type in ZERO_CENTERED else 1.0
    for feature, change in case.features.items():
        if isinstance(change, str):
            reset = {name: torch.full_like(tensor, 0.0 if change.endswith("bias") else neutral)
                     for name, tensor in weights.items() if name.endswith(change) and "vision" not in name}
            assert reset, f"no tensor ends with {change}"
            without = with_weights(config_dict(model, case.changes), weights | reset)
        else:
            without = with_weights(config_dict(model, case.changes | change), weights)
        changes[feature] = (prefix_logits(without, row) - logits).abs().max().item()
        assert changes[feature] >= MEASURABLE, f"{feature}: a logit changes by {changes[feature]:.1e} only"
    if case.same:
        same = with_weights(config_dict(model, case.changes | case.same), weights)
        assert torch.equal(prefix_logits(same, row), logits), f"{case.same} are not to matter"
    return {feature: float(f"{change:.2g}") for feature, change in changes.items()}


def read_back(out, case_out, config, rows):
    """Logits of the adapter, from the files alone."""
    with tempfile.TemporaryDirectory() as place:
        os.link(out / "model.safetensors", Path(place) / "model.safetensors")
        os.link(case_out / "config.v5.json", Path(place) / "config.json")
        cls = getattr(transformers, config["architectures"][0])
        model = cls.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
        return prefix_logits(PeftModel.from_pretrained(model, out / "adapter").eval(), rows[-1])


def write_case(name, model, case_name, out, weights, rows):
    case, case_out = model.cases[case_name], folder(f"families/{name}/{case_name}")
    old = config_dict(model, case.changes)
    base = with_weights(old, weights)
    logits = {"base": prefix_logits(base, rows[-1])}
    features = feature_changes(model, case, weights, rows[-1], logits["base"])
    new = new_spelling(old)
    assert torch.equal(prefix_logits(with_weights(new, weights), rows[-1]), logits["base"]), "the two spellings differ"
    if "rope_parameters" not in model.config:
        write_json(case_out / "config.v4.json", old)
    write_json(case_out / "config.v5.json", new)
    peft = with_adapter(base, name, model.language_model)
    if not (out / "adapter").exists():
        save_adapter(peft, name, out / "adapter")
    logits["adapter"] = prefix_logits(peft, rows[-1])
    assert (logits["adapter"] - logits["base"]).abs().max() >= MEASURABLE
    assert torch.equal(read_back(out, case_out, new, rows), logits["adapter"]), "the files give other logits"
    loss, num_targets, grads = loss_and_grads(peft, rows)
    write_tensors(case_out / "logits.safetensors", logits)
    write_tensors(case_out / "grads.safetensors", grads)
    written = {"loss": loss, "num_target_tokens": num_targets, "features": features}
    if model.bfloat16:
        written["bfloat16"] = bfloat16_errors(peft, rows, logits["adapter"], {k: g.clone() for k, g in grads.items()})
    return written


def write_model(name, rows):
    model = MODELS[name]
    shutil.rmtree(folder(f"families/{name}"))
    out = folder(f"families/{name}")
    first = build(config_dict(model, next(iter(model.cases.values())).changes))
    # The seed depends on the name alone: another model changes no file of this one.
    randomize(first, zlib.crc32(name.encode()), model.model_type in ZERO_CENTERED)
    write_tensors(out / "model.safetensors", saved_weights(first, model.new_names))
    weights = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    cases = {case: write_case(name, model, case, out, weights, rows) for case in model.cases}
    return {"family": model.model_type, "cases": cases}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", metavar="MODEL", choices=[[], *MODELS])
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    chosen = args.models or list(MODELS)
    rows, written = token_rows(), {}
    for name in chosen:
        written[name] = write_model(name, rows)
        print(name, *written[name]["cases"], flush=True)
    if not args.models:
        write_json(folder("families") / "families.json", {
            "rows": [row[0].tolist() for row in rows], "lengths": LENGTHS, "models": written})


if __name__ == "__main__":
    main()
