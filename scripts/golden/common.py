"""Where the golden files go, and how they are written."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2] / "tests" / "golden"


def folder(name=""):
    """`tests/golden/NAME`, made when it is missing."""
    path = ROOT / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_tensors(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def normal(seed, *shape, std=1.0):
    """f32 [*shape], normal with mean 0, the same on every machine for one version of torch."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std
