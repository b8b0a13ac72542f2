"""tests/golden/: tiny Llama models, their logits under every RoPE scaling, and the same model quantized by bitsandbytes.

  tiny/                    config.json and model.safetensors (f32): 2 layers, hidden 64, 4 query and 2 key-value heads
  tiny/rope/NAME.v4.json   the config with one RoPE scaling, keys as transformers 4 wrote them (rope_theta, rope_scaling)
  tiny/rope/NAME.v5.json   the same as transformers 5 writes it (rope_parameters)
  tiny/rope_logits.safetensors   input_ids i64 [1, 96]; positions i64 [16]; NAME f32 [16, 320]: the logits of those positions
  tiny-bias/               another model: attention_bias, mlp_bias, tied embeddings, head_dim 32 given, bf16 weights in two
                           files with an index; logits.safetensors: input_ids i64 [1, 32], logits f32 [32, 320]
  tiny-bnb4/, tiny-bnb4-nested/  `tiny` in NF4 as bitsandbytes saves it, without and with double quantization
"""

import json

import torch
from common import folder, normal, write_json, write_tensors
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

LENGTH = 96  # beyond max_position_embeddings, so that dynamic NTK scales
POSITIONS = torch.arange(5, LENGTH, 6)

SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 317,
    "eos_token_id": 318,
    "pad_token_id": 319,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

# NAME -> max_position_embeddings, rope_theta, scaling as transformers 4 wrote it
ROPE = {
    "default": (64, 10000.0, None),
    "linear": (64, 10000.0, {"type": "linear", "factor": 4.0}),
    "dynamic": (64, 10000.0, {"type": "dynamic", "factor": 2.0}),
    "yarn": (256, 10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn_mscale": (512, 500000.0, {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0,
        "mscale": 1.0, "mscale_all_dim": 0.5}),
    "llama3": (512, 500000.0, {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
}


def rope_configs(name):
    """(transformers 4, transformers 5) config of one RoPE scaling."""
    max_positions, theta, scaling = ROPE[name]
    sizes = SIZES | {"max_position_embeddings": max_positions}
    parameters = {"rope_theta": theta, "rope_type": "default"}
    for key, value in (scaling or {}).items():
        parameters["rope_type" if key == "type" else key] = value
    new_sizes = {("dtype" if key == "torch_dtype" else key): value for key, value in sizes.items()}
    return sizes | {"rope_theta": theta, "rope_scaling": scaling}, new_sizes | {"rope_parameters": parameters}


def randomize(model, seed):
    """Weights from which logits of a few units and uneven attention come."""
    gains = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 2.0}
    for idx, (name, parameter) in enumerate(sorted(model.named_parameters())):
        shape = parameter.shape
        if "norm" in name:
            value = 1.0 + normal(seed + idx, *shape, std=0.2)
        elif name.endswith("bias"):
            value = normal(seed + idx, *shape, std=0.3)
        elif "embed_tokens" in name:
            value = normal(seed + idx, *shape, std=0.25)
        else:
            value = normal(seed + idx, *shape, std=gains.get(name.split(".")[-2], 1.0) * shape[1] ** -0.5)
        parameter.data.copy_(value)


def tokens(seed, length):
    return torch.randint(0, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))


def build(config):
    return LlamaForCausalLM(LlamaConfig.from_dict(dict(config))).float().eval()


@torch.no_grad()
def write_tiny():
    out = folder("tiny")
    model = build(rope_configs("default")[0])
    randomize(model, seed=100)
    write_tensors(out / "model.safetensors", model.state_dict())
    write_json(out / "config.json", rope_configs("default")[0])
    input_ids = tokens(7, LENGTH)
    logits = {"input_ids": input_ids, "positions": POSITIONS}
    for name in ROPE:
        old, new = rope_configs(name)
        write_json(folder("tiny/rope") / f"{name}.v4.json", old)
        write_json(folder("tiny/rope") / f"{name}.v5.json", new)
        both = []
        for config in (old, new):
            scaled = build(config)
            scaled.load_state_dict(model.state_dict())
            both.append(scaled(input_ids, use_cache=False).logits[0, POSITIONS])
        assert torch.equal(*both), name
        logits[name] = both[0]
    write_tensors(out / "rope_logits.safetensors", logits)


@torch.no_grad()
def write_tiny_bias():
    out = folder("tiny-bias")
    changes = {"num_hidden_layers": 1, "head_dim": 32, "attention_bias": True, "mlp_bias": True,
               "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config = rope_configs("default")[0] | changes
    model = build(config)
    randomize(model, seed=500)
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        write_tensors(out / file, {name: weights[name] for name in part})
    write_json(out / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": {name: file for file, part in files.items() for name in part},
    })
    write_json(out / "config.json", config)
    input_ids = tokens(8, 32)
    logits = model(input_ids, use_cache=False).logits[0]
    write_tensors(out / "logits.safetensors", {"input_ids": input_ids, "logits": logits})


def write_tiny_bnb4(name, double_quant):
    """f32 throughout: with a bf16 quant_state, bitsandbytes on CPU would go forward in f32 and backward in bf16."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.uint8)
    model = AutoModelForCausalLM.from_pretrained(
        folder("tiny"), quantization_config=quantization, dtype=torch.float32, device_map="cpu")
    out = folder(name)
    model.save_pretrained(out)  # before any forward in eval mode, which repacks the codes
    (out / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]


def main():
    write_tiny()
    write_tiny_bias()
    write_tiny_bnb4("tiny-bnb4", double_quant=False)
    write_tiny_bnb4("tiny-bnb4-nested", double_quant=True)


if __name__ == "__main__":
    main()
