"""tests/golden/lora/: what PEFT makes of patterns, and steps with modules of several ranks and LoRA+.

  modules.json        {name, config, modules: {module: [r, lora_alpha, scaling]}, refused, warned}: keys of LoraConfig, the modules
                      of `tiny` that get an adapter with them, whether PEFT refuses them, whether it warns of a key that names nothing
  start/, final/      an adapter with patterns before the first step and after the last one, as PEFT saves it, of `tiny-bnb4-nested`
  grads.safetensors   the gradient of every matrix at the first step
  steps.json          per step loss, gradient norm, learning rates of A and of B, num_target_tokens; the rows are those of
                      `qlora_steps`, the optimizer is that of create_loraplus_optimizer over torch's AdamW
"""

import json
import warnings

import torch
from common import folder, normal, write_json, write_tensors
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from qlora_steps import MICRO_BATCHES, ROWS, TARGETS, loss_sum, micro_batch, num_targets, trainable
from transformers import AutoModelForCausalLM

STEPS = 3
RECIPE = {"learning_rate": 2e-3, "loraplus_lr_ratio": 5.0, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999,
          "adam_epsilon": 1e-8}
# Ranks from 1 to 24, and a module without an adapter. PEFT sorts the keys of what it saves, so they are sorted here: the first match counts.
RAGGED = {
    "r": 4, "lora_alpha": 8, "target_modules": TARGETS, "exclude_modules": ["layers.0.self_attn.o_proj"],
    "rank_pattern": {"down_proj": 24, "k_proj": 3, "layers.0.self_attn.v_proj": 1, r"layers\.1\.mlp\..*": 16},
    "alpha_pattern": {r".*\.1\.self_attn\.q_proj": 3.5, "gate_proj": 16},
}
CONFIGS = {
    "all": {"target_modules": "all-linear"},
    "ends": {"target_modules": ["q_proj", "v_proj"]},
    "long ends": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "a whole name": {"target_modules": ["model.layers.1.mlp.down_proj", "k_proj"]},
    "parts of names": {"target_modules": ["proj"]},
    "an expression": {"target_modules": r".*\.(q|v)_proj"},
    "a lookahead": {"target_modules": r"model\.layers\.(?!0\.)\d+\.mlp\.(gate|up)_proj"},
    "an expression without case": {"target_modules": r"(?i).*\.Q_PROJ"},
    "alternatives": {"target_modules": r"model.layers.0.self_attn.q_proj|.*down_proj"},
    "a part of a name as expression": {"target_modules": r"layers.0.self_attn.q_proj"},
    "an MLP": {"target_modules": ["mlp"]},
    "all of an MLP": {"target_modules": r".*\.mlp\..*"},
    "a name and a parent": {"target_modules": r".*mlp.*"},
    "excluded ends": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    "an excluded expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\.self_attn\..*"},
    "all excluded": {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    "nothing excluded": {"target_modules": ["q_proj"], "exclude_modules": ["qkv_proj"]},
    "a layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    "a list of layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "lists of layers": {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "an expression of layers": {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "lay.*s"},
    "another list": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
    "no such layer": {"target_modules": ["q_proj"], "layers_to_transform": [2]},
    "layers of an expression": {"target_modules": r".*\.q_proj", "layers_to_transform": [0]},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 8, "layers.0.mlp.up_proj": 2, ".*up_proj": 16}},
    "the first rank": {"target_modules": "all-linear", "rank_pattern": {".*proj": 7, "q_proj": 3}},
    "expressions of ranks": {"target_modules": "all-linear", "rank_pattern": {
        r"model\.layers\.0\.self_attn\.(q|k)_proj": 2, r"self_attn\..*": 6, r"^model\.layers\.1\..*": 9}},
    "alternatives of ranks": {"target_modules": "all-linear", "rank_pattern": {"k_proj|v_proj": 2, "0.mlp.*": 5}},
    "an unused rank": {"target_modules": ["q_proj"], "rank_pattern": {"down": 5, "q_proj": 2}},
    "alphas": {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 0.5}},
    "roots": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2, "down_proj": 64},
              "alpha_pattern": {"v_proj": 3}},
    "ragged": RAGGED,
}


def peft_modules(config):
    """An entry of modules.json."""
    entry = {"config": config, "modules": {}, "refused": False, "warned": False}
    model = AutoModelForCausalLM.from_pretrained(folder("tiny"), dtype=torch.float32)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config))
        except ValueError as error:
            return entry | {"refused": True, "error": str(error).splitlines()[0]}
    entry["warned"] = any("did not match" in str(w.message) or "no modules were excluded" in str(w.message) for w in warned)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            entry["modules"][name] = [module.r["default"], module.lora_alpha["default"], module.scaling["default"]]
    return entry


def save_adapter(model, name):
    out = folder(f"lora/{name}")
    model.peft_config["default"].base_model_name_or_path = "tiny-bnb4-nested"
    model.save_pretrained(out)
    (out / "README.md").unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set in PEFT: its order is another each time
    write_json(out / "adapter_config.json", config)


def steps(out):
    model = AutoModelForCausalLM.from_pretrained(folder("tiny-bnb4-nested"), dtype=torch.float32, device_map="cpu")
    model = get_peft_model(model, LoraConfig(lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **RAGGED))
    for idx, (name, parameter) in enumerate(sorted(trainable(model).items())):
        std = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
        parameter.data.copy_(normal(700 + idx, *parameter.shape, std=std))
    model.train()
    save_adapter(model, "start")
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RECIPE["learning_rate"], loraplus_lr_ratio=RECIPE["loraplus_lr_ratio"],
        loraplus_weight_decay=RECIPE["weight_decay"], betas=(RECIPE["adam_beta1"], RECIPE["adam_beta2"]),
        eps=RECIPE["adam_epsilon"], foreach=False)
    rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
    assert rates == {RECIPE["learning_rate"], RECIPE["learning_rate"] * RECIPE["loraplus_lr_ratio"]}
    generator = torch.Generator().manual_seed(1234)
    done = []
    for step in range(STEPS):
        batches = [micro_batch(generator) for _ in range(MICRO_BATCHES)]
        targets = sum(map(num_targets, batches))
        loss = 0.0
        for batch in batches:
            part = loss_sum(model, batch)
            (part / targets).backward()
            loss += part.double().item()
        if step == 0:
            grads = {name: parameter.grad for name, parameter in trainable(model).items()}
            write_tensors(out / "grads.safetensors", get_peft_model_state_dict(model, state_dict=grads))
        norm = torch.nn.utils.clip_grad_norm_(trainable(model).values(), float("inf"))
        done.append({"step": step + 1, "loss": loss / targets, "grad_norm": norm.item(), "num_target_tokens": targets})
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, "final")
    write_json(out / "steps.json", {"recipe": RECIPE, "rows_of_a_step": ROWS * MICRO_BATCHES, "steps": done})


def main():
    out = folder("lora")
    write_json(out / "modules.json", [{"name": name} | peft_modules(config) for name, config in CONFIGS.items()])
    steps(out)


if __name__ == "__main__":
    main()
