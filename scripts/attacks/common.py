"""A folder to attack, runs of the program in it, and how a run is judged."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable

REPO = Path(__file__).resolve().parent.parent.parent
GOLDEN = REPO / "tests/golden"

# A run that takes longer hangs. One takes a second where nothing else runs, so that the limit holds on a busy machine too.
LIMIT_S = 300
# The program's watchdog ends a rank that waits for longer, and says so: the run would have hung without it.
WATCHDOG_S = "60"
WATCHDOG_SAYS = "did not end within"
# Address space of one process: whoever asks for more takes all memory.
MEMORY_BYTES = 12 << 30

MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}

RECIPE = """\
model: model
output_dir: out
data: {train: rows.jsonl, max_length: 64}
lora: {r: 2, lora_dropout: 0.0}
training: {global_batch_size: 4, max_steps: 2, learning_rate: 1.0e-2, warmup_steps: 0}
"""

ROWS = [
    {"text": "the quick brown fox"},
    {"text": "what is it? it is a fox"},
    {"text": "hello there"},
    {"text": "say a word"},
    {"text": "a lazy dog sleeps in the sun all day long"},
    {"text": "jumps over"},
]


@dataclasses.dataclass
class Ended:
    """How a run ended: its status (negative: a signal), what it said, and whether it was stopped because it took too long."""

    status: int
    text: str
    late: bool


class Place:
    """A copy of a template (a model, rows, a recipe, adapters), made afresh for each attack, and runs of the program in it."""

    def __init__(self, folder: Path, template: Path, program: Path):
        self.template, self.dir, self.program = template, folder / "work", program
        folder.mkdir()

    def reset(self):
        """Make the folder as it was in the beginning."""
        shutil.rmtree(self.dir, ignore_errors=True)
        shutil.copytree(self.template, self.dir, symlinks=True)

    def path(self, name: str) -> Path:
        return self.dir / name

    def edit_json(self, name: str, change: Callable[[dict], None]):
        value = json.loads(self.path(name).read_text())
        change(value)
        self.path(name).write_text(json.dumps(value))

    def command(self, *args: str, ranks: int = 1) -> list[str]:
        program = [str(self.program), "--device", "cpu"]
        return ([] if ranks == 1 else ["mpirun", "-np", str(ranks)]) + program + list(args)

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        """Starts a run whose output goes to a file of the folder."""
        base = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_QLORA_", "OMPI_", "PMIX_"))}
        env = {
            **base,
            **MPI,
            "FSDP_QLORA_CACHE": str(self.path("cache")),
            "FSDP_QLORA_TIMEOUT_S": WATCHDOG_S,
            "RAYON_NUM_THREADS": "1",
            # `~` in a path is a folder of this place.
            "HOME": str(self.dir),
            **environment,
        }
        output = open(self.dir.parent / "output", "wb")
        return subprocess.Popen(
            command,
            cwd=self.dir,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        return (self.dir.parent / "output").read_text(errors="replace")

    def ranks(self, process: subprocess.Popen) -> list[int]:
        """Processes of the program that are part of this run and have not ended, rank 0 first."""
        found = []
        for entry in Path("/proc").iterdir():
            # A process that has ended meanwhile can no longer be looked at.
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(bytes(self.program) + b"\0"):
                    session = (entry / "stat").read_text().rpartition(")")[2].split()[3]
                    found += [int(entry.name)] if int(session) == process.pid else []
        return sorted(found)

    def wait(self, process: subprocess.Popen) -> Ended:
        status, begin = None, time.monotonic()
        while status is None:
            try:
                status = process.wait(1)
            except subprocess.TimeoutExpired:
                # Open MPI 4's mpirun does not end where a rank is killed while it connects to it, though all ranks have ended.
                mpirun_hangs = "PMIX ERROR: UNREACHABLE" in self.output() and not self.ranks(process)
                if mpirun_hangs or time.monotonic() - begin > LIMIT_S:
                    os.killpg(process.pid, signal.SIGKILL)
                    for rank in self.ranks(process):
                        os.kill(rank, signal.SIGKILL)
                    process.wait()
                    return Ended(1 if mpirun_hangs else -signal.SIGKILL, self.output(), not mpirun_hangs)
        return Ended(status, self.output(), False)

    def run(self, *args: str, ranks: int = 1, **environment: str) -> Ended:
        return self.wait(self.start(self.command(*args, ranks=ranks), **environment))

    def left_over(self) -> list[str]:
        """Files whose names say that nobody finished them."""
        names = [p.name for d in ["out", "cache"] for p in self.path(d).rglob("*")] + [p.name for p in self.dir.iterdir()]
        return [name for name in names if name.startswith(".tmp") or name.endswith(".partial") or ".staging" in name]


def digest(folder: Path) -> str | None:
    """Digest of the two files that are an adapter, without the path of its base; `None` where one of them is not there."""
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not (config.is_file() and tensors.is_file()):
        return None
    settings = json.loads(config.read_text())
    del settings["base_model_name_or_path"]
    return hashlib.sha256(json.dumps(settings).encode() + tensors.read_bytes()).hexdigest()


def make_template(folder: Path):
    model = folder / "model"
    model.mkdir(parents=True)
    for file in ["tiny/config.json", "tiny/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]:
        shutil.copy(GOLDEN / file, model)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


TRAIN = ["train", "-c", "recipe.yaml"]
EVAL = ["eval", "--model", "model", "--dataset", "rows.jsonl", "--max-length", "64", "--json"]


class Reference:
    """Results of runs that nobody attacks. Two of them become folders of the template: `adapter`, and `old` of another recipe."""

    def __init__(self, place: Place):
        self.place = place
        make_template(place.template)
        place.reset()
        self.eval_text = self.of(*EVAL)
        self.of(*TRAIN)
        self.trained = digest(place.path("out"))
        shutil.copytree(place.path("out"), place.template / "adapter")
        place.reset()
        self.of(*TRAIN, "--set", "training.learning_rate=2.0e-2")
        self.other = digest(place.path("out"))
        shutil.copytree(place.path("out"), place.template / "old")
        assert self.trained and self.other and self.trained != self.other
        place.reset()
        self.adapted_text = self.of(*EVAL, "--adapter", "adapter")

    def of(self, *args: str) -> str:
        ended = self.place.run(*args)
        assert ended.status == 0, ended.text
        return result_line(ended)


def result_line(ended: Ended) -> str:
    lines = [line for line in ended.text.splitlines() if line.startswith('{"loss"')]
    return lines[-1] if lines else ""


@dataclasses.dataclass
class Attack:
    """An attack: the change before a run, the run, and the ways in which it may end."""

    name: str
    prepare: Callable[[Place], None]
    allowed: set[str]
    args: list[str] = dataclasses.field(default_factory=lambda: list(TRAIN))
    ranks: int = 1

    def run(self, place: Place, reference: Reference) -> tuple[str, str]:
        place.reset()
        self.prepare(place)
        ended = place.run(*self.args, ranks=self.ranks)
        return self.judge(place, reference, ended), ended.text[-2000:]

    def judge(self, place: Place, reference: Reference, ended: Ended) -> str:
        failure = how_it_failed(ended)
        if failure:
            return "lost" if failure == "refused" and digest(place.path("out")) else failure
        if self.args[0] == "train":
            found = digest(place.path("out"))
            if found is None:
                return "silent"
            return "same" if found == reference.trained else "accepted" if adapter_is_finite(place.path("out")) else "silent"
        if self.args[0] == "eval":
            line = result_line(ended)
            if line in (reference.eval_text, reference.adapted_text):
                return "same"
            return "accepted" if line and math.isfinite(json.loads(line)["loss"]) else "silent"
        return "accepted"


def how_it_failed(ended: Ended) -> str | None:
    """The way in which a run failed: hang, crash or refused. `None` if it ended well."""
    if ended.late or WATCHDOG_SAYS in ended.text:
        return "hang"
    if ended.status == 0:
        return None
    said = "error" in ended.text.lower()
    if ended.status < 0 or ended.status >= 128 or "panicked at" in ended.text or not said or len(ended.text) > 40_000:
        return "crash"
    # Whoever reads this in a terminal must not have it redrawn.
    if any(ord(c) < 32 and c not in "\n\t\r" or c == "\x7f" for c in ended.text):
        return "crash"
    return "refused"


def adapter_is_finite(folder: Path) -> bool:
    data = (folder / "adapter_model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    return all(math.isfinite(x) for x in memoryview(data[begin : begin + (len(data) - begin) // 4 * 4]).cast("f"))
