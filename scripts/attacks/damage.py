"""Damaged and strange files in the place of every input."""

import json
import os
import struct

from .common import EVAL, TRAIN, Attack

ADAPTED = [*EVAL, "--adapter", "adapter"]
ANY = {"refused", "same", "accepted"}
REFUSED = {"refused"}

# Input files, and the command that reads them.
INPUTS = {
    "model/config.json": EVAL,
    "model/model.safetensors": EVAL,
    "model/tokenizer.json": EVAL,
    "model/tokenizer_config.json": EVAL,
    "adapter/adapter_config.json": ADAPTED,
    "adapter/adapter_model.safetensors": ADAPTED,
    "rows.jsonl": EVAL,
    "recipe.yaml": TRAIN,
}


def write(name, content):
    return lambda place: place.path(name).write_bytes(content)


def replace(name, make):
    """Put something else in the place of a file."""

    def prepare(place):
        path = place.path(name)
        path.unlink()
        make(path)

    return prepare


def damage(path, what, share):
    """Changes a byte at a share of a file, cuts the file off there, or empties it."""
    data = bytearray(path.read_bytes())
    at = int(len(data) * share)
    if what == "byte":
        data[at] ^= 0x55
    path.write_bytes({"byte": data, "cut": data[:at], "empty": b""}[what])


def not_a_file(_):
    """A folder, a FIFO, a device, a link to itself or no file at all in the place of a file."""
    for name, args in INPUTS.items():
        # A tokenizer_config.json may be missing.
        gone = ANY if name.endswith("tokenizer_config.json") else REFUSED
        yield Attack(f"{name} is a folder", replace(name, os.mkdir), REFUSED, args)
        yield Attack(f"{name} is a FIFO", replace(name, os.mkfifo), REFUSED, args)
        yield Attack(f"{name} links to /dev/zero", replace(name, lambda p: os.symlink("/dev/zero", p)), REFUSED, args)
        yield Attack(f"{name} links to itself", replace(name, lambda p: os.symlink(p, p)), REFUSED, args)
        yield Attack(f"{name} is gone", lambda place, name=name: place.path(name).unlink(), gone, args)


def other_content(_):
    """Leftovers of failed downloads, and files that are no text."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
    page = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not Found</body></html>\n"
    contents = {
        "a Git LFS pointer": pointer,
        "an HTML page": page,
        "empty": b"",
        "one NUL": b"\0",
        "deep brackets": b"[" * 200_000,
        "deep objects": b'{"a":' * 100_000,
        "invalid UTF-8": b'{"text": "\xff\xfe"}\n',
        "escapes": b'{"\x1b[31m\x07": 1}\n',
        "a very long line": b'{"text": "' + b"x" * 3_000_000 + b'"}\n',
    }
    for name, args in INPUTS.items():
        for what, content in contents.items():
            # The line is an object: a row, and a tokenizer_config.json without a key that is known.
            is_whole = name in ("rows.jsonl", "model/tokenizer_config.json") and what == "a very long line"
            yield Attack(f"{name} is {what}", write(name, content), ANY if is_whole else REFUSED, args)


def truncated(random):
    """Files that end too early."""
    for name, args in INPUTS.items():
        for _ in range(4):
            share = random.random()

            def prepare(place, name=name, share=share):
                path = place.path(name)
                data = path.read_bytes()
                path.write_bytes(data[: int(len(data) * share)])

            # A recipe or rows cut between two lines are whole.
            allowed = ANY if name in ("rows.jsonl", "recipe.yaml") else REFUSED
            yield Attack(f"{name} ends after {share:.0%}", prepare, allowed, args)


def changed_bytes(random):
    """Text files with one byte changed: the run ends, whatever comes of the change."""
    for name, args in INPUTS.items():
        if name.endswith(".safetensors"):
            continue
        for i in range(5):
            place_share, byte = random.random(), random.randrange(256)

            def prepare(place, name=name, share=place_share, byte=byte):
                path = place.path(name)
                data = bytearray(path.read_bytes())
                data[int(len(data) * share)] = byte
                path.write_bytes(data)

            yield Attack(f"{name}, byte at {place_share:.3f} is {byte}", prepare, ANY, args)


def safetensors_headers(random):
    """Headers whose numbers, names and offsets do not fit."""

    def header(change, length=None):
        def prepare(place, name):
            path = place.path(name)
            data = path.read_bytes()
            size = struct.unpack("<Q", data[:8])[0]
            tensors = json.loads(data[8 : 8 + size])
            change(tensors)
            text = json.dumps(tensors).encode()
            path.write_bytes(struct.pack("<Q", len(text) if length is None else length(len(text))) + text + data[8 + size :])

        return prepare

    def first(tensors):
        return tensors[next(name for name in tensors if name != "__metadata__")]

    def rename(tensors, name):
        key = next(name for name in tensors if name != "__metadata__")
        tensors[name] = tensors.pop(key)

    changes = {
        "an offset behind the end": lambda t: first(t).update(data_offsets=[0, 1 << 60]),
        "offsets that go back": lambda t: first(t).update(data_offsets=[100, 0]),
        "negative offsets": lambda t: first(t).update(data_offsets=[-4, 0]),
        "a shape that overflows": lambda t: first(t).update(shape=[1 << 62, 1 << 62]),
        "a negative shape": lambda t: first(t).update(shape=[-1, 64]),
        "no shape": lambda t: first(t).pop("shape"),
        "an unknown dtype": lambda t: first(t).update(dtype="Q7"),
        "a complex dtype": lambda t: first(t).update(dtype="C64"),
        "a name of control characters": lambda t: rename(t, "\x1b]0;x\x07"),
        "an endless name": lambda t: rename(t, "x" * 300_000),
        "no tensor": lambda t: t.clear(),
        "metadata of numbers": lambda t: t.update(__metadata__={"format": 1}),
        "a list in the place of a tensor": lambda t: t.update(more=[1, 2]),
        "two tensors on the same bytes": lambda t: t.update(more=dict(first(t))),
    }
    for file, args in [("model/model.safetensors", EVAL), ("adapter/adapter_model.safetensors", ADAPTED)]:
        for what, change in changes.items():
            # Nothing reads the metadata of a model.
            allowed = {"refused", "same"} if what == "metadata of numbers" else REFUSED
            yield Attack(f"{file} has {what}", lambda place, c=change, f=file: header(c)(place, f), allowed, args)
        for what, length in [("too long", lambda n: n + 1_000_000), ("endless", lambda _: 1 << 63), ("0", lambda _: 0), ("short", lambda n: n // 2)]:
            prepare = lambda place, l=length, f=file: header(lambda t: None, l)(place, f)  # noqa: E731
            yield Attack(f"{file} says that its header is {what}", prepare, REFUSED, args)

        def spaces(place, f=file):
            path = place.path(f)
            data = path.read_bytes()
            size = struct.unpack("<Q", data[:8])[0]
            text = data[8 : 8 + size] + b" " * (95_000_000 - size)
            path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

        yield Attack(f"{file} has a header of 95 MB", spaces, {"refused", "same"}, args)


def shard_files(random):
    """Shard files of the cache that are damaged between two runs: they are made again."""
    for i in range(12):
        share, what = random.random(), ["byte", "cut", "empty"][i % 3]

        def prepare(place, share=share, what=what):
            assert place.run(*EVAL).status == 0
            shards = [p for p in place.path("cache").rglob("*.safetensors")]
            assert shards, "no shard was written"
            damage(shards[0], what, share)

        yield Attack(f"a shard, {what} at {share:.3f}", prepare, {"same"}, EVAL)


def index_files(_):
    """An index that names what it must not."""
    targets = {
        "an absolute path": "/etc/passwd",
        "a path upwards": "../model/model.safetensors",
        "a file that is not there": "model-00001-of-00002.safetensors",
        "a FIFO": "pipe.safetensors",
        "an empty name": "",
        "a number": 7,
        "a link that leads out": "link.safetensors",
    }
    for what, target in targets.items():

        def prepare(place, target=target):
            weights = place.path("model/model.safetensors")
            size = struct.unpack("<Q", weights.read_bytes()[:8])[0]
            names = [n for n in json.loads(weights.read_bytes()[8 : 8 + size]) if n != "__metadata__"]
            place.path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: target for n in names}}))
            os.mkfifo(place.path("model/pipe.safetensors"))
            os.rename(weights, place.path("elsewhere.safetensors"))
            os.symlink("../elsewhere.safetensors", place.path("model/link.safetensors"))

        yield Attack(f"the index names {what}", prepare, REFUSED, EVAL)


KINDS = [not_a_file, other_content, truncated, changed_bytes, safetensors_headers, shard_files, index_files]
