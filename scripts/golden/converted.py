#!/usr/bin/env python3
"""tests/golden/gguf.json: the adapters of families.py as llama.cpp's convert_lora_to_gguf.py writes them, in digests.

  MODEL -> null where the script converts no adapter of the architecture, or
           metadata: every pair but general.name, in order
           tensors: their number; infos and data: CRC-32 of their descriptions and of the data, which follow each other to the end
           f16: data, with --outtype f16

The script is that of the source distribution of llama-cpp-python, which pip fetches.
"""

import contextlib
import io
import logging
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

from common import ROOT, folder, write_json
from family_table import MODELS
from four_bit import place_of

VERSION = "0.3.36"
ALIGNMENT = 32
STRING, U32, F32 = 8, 4, 6


def llama_cpp(place):
    """Unpacks llama.cpp's scripts into `place` and returns their folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", place,
               f"llama-cpp-python=={VERSION}"]
    subprocess.run(command, check=True)
    name = f"llama_cpp_python-{VERSION}"
    with tarfile.open(Path(place) / f"{name}.tar.gz") as archive:
        archive.extractall(place, filter="data")
    return Path(place) / name / "vendor" / "llama.cpp"


def convert(scripts, base, adapter, out, outtype="f32"):
    """Returns whether the script wrote an adapter to `out`. It runs in this process, so that its imports are loaded once."""
    script = scripts / "convert_lora_to_gguf.py"
    before = sys.argv, sys.path[:]
    sys.argv = [str(word) for word in [script, "--base", base, "--outfile", out, "--outtype", outtype, adapter]]
    sys.path.insert(0, str(scripts))
    logging.disable()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(script), run_name="__main__")
    except (Exception, SystemExit) as error:
        print(f"{base.name}: not converted: {error}", flush=True)
        return False
    finally:
        logging.disable(logging.NOTSET)
        sys.argv, sys.path[:] = before
    # For some architectures it writes the base instead.
    return any(name.endswith(".lora_a") for name in read(out)["tensors"])


def read(path):
    """Returns the parts of a GGUF file: its pairs, the dims, type and bytes of each tensor by name, and the bytes of all descriptions and data."""
    file = path.read_bytes()
    at = 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, file, at)
        at += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    def text():
        return take(f"{take('Q')}s").decode()

    assert take("4s") == b"GGUF" and take("I") == 3
    num_tensors, num_pairs = take("QQ")
    pairs = {}
    for _ in range(num_pairs):
        key, kind = text(), take("I")
        pairs[key] = {STRING: text, U32: lambda: take("I"), F32: lambda: take("f")}[kind]()
    begin, infos = at, {}
    for _ in range(num_tensors):
        name, num_dims = text(), take("I")
        infos[name] = (list(struct.unpack_from(f"<{num_dims}Q", file, at)), *struct.unpack_from("<IQ", file, at + 8 * num_dims))
        at += 8 * num_dims + 12
    end, start = at, -(-at // ALIGNMENT) * ALIGNMENT
    offsets = [offset for _, _, offset in infos.values()] + [len(file) - start]
    tensors = {name: (dims, kind, file[start + offset : start + following])
               for (name, (dims, kind, offset)), following in zip(infos.items(), offsets[1:])}
    return {"pairs": pairs, "tensors": tensors, "infos": file[begin:end], "data": file[start:]}


def digest(scripts, name, place):
    """Returns the entry of a model in gguf.json."""
    base = place_of(name, next(iter(MODELS[name].cases)), place / name)
    adapter, outs = folder(f"families/{name}") / "adapter", [place / "f32.gguf", place / "f16.gguf"]
    for out, outtype in zip(outs, ["f32", "f16"]):
        if not convert(scripts, base, adapter, out, outtype):
            return None
    whole, halves = map(read, outs)
    shutil.rmtree(base)
    del whole["pairs"]["general.name"]
    return {"metadata": whole["pairs"], "tensors": len(whole["tensors"]), "infos": zlib.crc32(whole["infos"]),
            "data": zlib.crc32(whole["data"]), "f16": zlib.crc32(halves["data"])}


def main():
    with tempfile.TemporaryDirectory() as place:
        scripts = llama_cpp(place)
        digests = {name: digest(scripts, name, Path(place)) for name in MODELS}
    write_json(ROOT / "gguf.json", digests)


if __name__ == "__main__":
    main()
