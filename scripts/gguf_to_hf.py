#!/usr/bin/env python3
"""Convert a GGUF file to a Hugging Face directory, whose weights are bf16.

usage: gguf_to_hf.py FILE.gguf FOLDER

FOLDER must not exist; it is complete or absent (written beside, then renamed). Needs the packages of requirements-demo.txt.
Architectures: llama (without scaled RoPE) and qwen2. Tokenizers: byte-level BPE whose pre-tokenizer is smollm or qwen2.
Quantized tensors of every kind that the package gguf can dequantize are read; what quantization has lost stays lost.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors import TensorSpec, serialize_file

# The keys of config.json that do not come from the file.
CONFIGS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "tokenizer_class": "GPT2Tokenizer",
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "tokenizer_class": "Qwen2Tokenizer",
    },
}

# llama.cpp interleaves the two halves of each rotary head of these architectures; Hugging Face keeps them one after the other.
INTERLEAVED = {"llama"}

# GGUF's tensor names to Hugging Face's; those of a layer get its index in between.
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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

# GGUF's types of tokens: <|im_start|> and the like; tokens that are added but not special; rows without a token.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**options):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **options}


# The parts of tokenizer.json by `tokenizer.ggml.pre`.
TOKENIZERS = {
    "smollm": {
        "normalizer": None,
        "pre_tokenizer": [{"type": "Digits", "individual_digits": True}, byte_level()],
        "decoder": byte_level(add_prefix_space=True),
    },
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": [
            {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
            byte_level(trim_offsets=False, use_regex=False),
        ],
        "decoder": byte_level(trim_offsets=False, use_regex=False),
    },
}


def pick(table, name, what):
    """The entry of a table; ends the program if there is none."""
    if name not in table:
        sys.exit(f"error: {what}: found {name}; allowed: {', '.join(table)}")
    return table[name]


def hf_name(gguf_name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *place, name, kind = gguf_name.split(".")
    if not place:
        return f"{pick(NAMES, name, 'a tensor')}.{kind}"
    return f"model.layers.{place[1]}.{pick(LAYER_NAMES, name, 'a tensor of a layer')}.{kind}"


def to_bf16(x):
    """f32 array -> the uint16 bits of bf16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_weights(tensors, interleaved_heads, path):
    """Dequantize every tensor to bf16. `interleaved_heads`: number of heads by GGUF's tensor name."""
    arrays = {}
    for tensor in tensors:
        x = dequantize(tensor.data, tensor.tensor_type)
        heads = interleaved_heads.get(tensor.name.split(".")[-2])
        if heads:
            x = x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        arrays[hf_name(tensor.name)] = to_bf16(x)
    # A spec holds a bare address: `arrays` keeps what it points at alive.
    specs = {
        name: TensorSpec(dtype="bfloat16", shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes)
        for name, x in arrays.items()
    }
    serialize_file(specs, path, {"format": "pt"})


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def special_ids(fields):
    """Ids of the special tokens that the file names, by Hugging Face's names without `_token`."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in names.items()}
    return {name: id for name, id in ids.items() if id is not None}


def write_tokenizer(fields, tokenizer_class, context_length, folder):
    parts = pick(TOKENIZERS, fields["tokenizer.ggml.pre"], "tokenizer.ggml.pre")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": tokens[i], **flags, "special": kind == CONTROL}
             for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": parts["normalizer"],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts["pre_tokenizer"]},
        "post_processor": None,
        "decoder": parts["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED},
            "merges": fields["tokenizer.ggml.merges"],
        },
    })
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "tokenizer_class": tokenizer_class,
        **{f"{name}_token": tokens[id] for name, id in special_ids(fields).items()},
    })


def convert(gguf_path, folder):
    """Write config.json, generation_config.json, the tokenizer and the weights into a folder that is there."""
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    config = dict(pick(CONFIGS, architecture, "general.architecture"))
    of_model = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
    if any(name.startswith("rope.scaling.") for name in of_model):
        sys.exit(f"error: {gguf_path}: scaled RoPE is not converted")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    num_heads, num_kv_heads = of_model["attention.head_count"], of_model["attention.head_count_kv"]
    interleaved = {"attn_q": num_heads, "attn_k": num_kv_heads} if architecture in INTERLEAVED else {}
    write_weights(reader.tensors, interleaved, folder / "model.safetensors")
    write_tokenizer(fields, config.pop("tokenizer_class"), of_model["context_length"], folder)
    ids = {f"{name}_token_id": id for name, id in special_ids(fields).items() if name != "unk"}
    write_json(folder / "config.json", {
        **config,
        **ids,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": of_model["embedding_length"],
        "intermediate_size": of_model["feed_forward_length"],
        "max_position_embeddings": of_model["context_length"],
        "num_attention_heads": num_heads,
        "num_hidden_layers": of_model["block_count"],
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": float(f"{of_model['attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_scaling": None,
        "rope_theta": of_model["rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "bfloat16",
        "vocab_size": int(shapes["token_embd.weight"][1]),
    })
    write_json(folder / "generation_config.json", ids)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    gguf_path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if folder.exists():
        sys.exit(f"error: {folder} is there already")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as beside:
        converted = Path(beside) / "model"
        converted.mkdir()
        convert(gguf_path, converted)
        converted.rename(folder)


if __name__ == "__main__":
    main()
