"""tests/golden/manifest.json: per file its size, its sha256 and the script that made it; per script the versions it ran with.

A script none of whose files changed keeps the versions that stand there.
"""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

from common import ROOT, write_json

# what made a file, by the first part of its path
MADE_BY = {
    "nf4.safetensors": "nf4.py",
    "nf4_cuda.safetensors": "nf4.py",
    "tiny": "tiny.py",
    "tiny-bias": "tiny.py",
    "tiny-bnb4": "tiny.py",
    "tiny-bnb4-nested": "tiny.py",
    "qlora_steps": "qlora_steps.py",
    "lora": "lora.py",
    "schedules.json": "schedules.py",
    "tokenizer": "tokenizer.py",
    "chat_templates.json": "chat_templates.py",
    "rows": "rows.py",
    "sft": "sft.py",
    "families": "families.py",
    "families-4bit": "four_bit.py",
    "generated.json": "generated.py",
    "gguf.json": "converted.py",
}


def main():
    requirements = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    packages = [line.split("==")[0] for line in requirements if "==" in line]
    files = {}
    for path in sorted(path for path in ROOT.rglob("*") if path.is_file() and path.name != "manifest.json"):
        name = path.relative_to(ROOT)
        path.chmod(0o644)
        files[str(name)] = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "made_by": f"scripts/golden/{MADE_BY[name.parts[0]]}",
        }
    now = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    before = json.loads((ROOT / "manifest.json").read_text())

    def made(script, entries):
        return {name: entry for name, entry in entries.items() if entry["made_by"] == script}

    scripts = sorted({entry["made_by"] for entry in files.values()})
    versions = {script: before["versions"][script] if made(script, files) == made(script, before["files"]) else now
                for script in scripts}
    write_json(ROOT / "manifest.json", {"versions": versions, "files": files})


if __name__ == "__main__":
    main()
