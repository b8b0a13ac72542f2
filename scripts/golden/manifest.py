"""tests/golden/manifest.json: per file its size, its sha256 and the script that made it, and the versions they ran with."""

import hashlib
import importlib.metadata
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
    "tokenizer": "tokenizer.py",
    "chat_templates.json": "chat_templates.py",
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
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    write_json(ROOT / "manifest.json", {"versions": versions, "files": files})


if __name__ == "__main__":
    main()
