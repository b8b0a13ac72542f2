"""Faults of the file system and kills while a run replaces an old result: afterwards the old or the new result is whole."""

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time

from .common import TRAIN, Attack, Place, digest, how_it_failed

OVERWRITE = [*TRAIN, "--overwrite"]
# System calls on files, and what they may answer.
CALLS = {
    "write": ["ENOSPC", "EIO"],
    "pwrite64,ftruncate": ["ENOSPC", "EIO"],
    "fsync": ["EIO"],
    "rename,renameat,renameat2": ["EACCES", "EIO", "ENOSPC"],
    "mkdir,mkdirat": ["ENOSPC", "EACCES"],
    "unlink,unlinkat,rmdir": ["EACCES", "EIO"],
    "fstatfs,statfs": ["EIO"],
    "flock": ["ENOLCK"],
    "mmap": ["ENOMEM"],
    "openat": ["EMFILE", "EACCES", "EIO", "ENOSPC"],
    "read,pread64": ["EIO"],
    "getdents64": ["EIO"],
}
# Traces this process and its threads, but not the daemon that Open MPI starts.
STRACE = ["strace", "-f", "-b", "execve", "-qq"]
# The number of a call among those of its thread differs from run to run where MPI makes some of them.
TRIES = 3


def why_not_traced() -> str | None:
    """The reason why faults cannot be injected on this machine, or `None`."""
    try:
        tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no strace"
    return None if tried.returncode == 0 else f"strace cannot trace here: {' '.join(tried.stderr.split())}"


def begin(place: Place):
    place.reset()
    shutil.copytree(place.path("old"), place.path("out"))


LOCK = threading.Lock()
ACCESSES: dict[str, list[tuple[str, int, str]]] = {}


def accesses(place: Place, calls: str) -> list[tuple[str, int, str]]:
    """Accesses of these system calls to files of the place, in the order of a run that nothing disturbs: the call, its number among
    those of its thread with this name (strace counts so), and its text."""
    with LOCK:
        if not ACCESSES:
            begin(place)
            log = place.dir.parent / "trace"
            trace = [*STRACE, "-y", "-o", str(log), "-e", f"trace={','.join(CALLS)}"]
            ended = place.wait(place.start(trace + place.command(*OVERWRITE)))
            assert ended.status == 0, ended.text
            ACCESSES.update(read_trace(log.read_text(), str(place.dir)))
    return [access for call in calls.split(",") for access in ACCESSES.get(call, [])]


def read_trace(text: str, folder: str) -> dict[str, list[tuple[str, int, str]]]:
    numbers, found = collections.Counter(), collections.defaultdict(list)
    for line in text.splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if not match:
            continue
        thread, call, arguments = match.groups()
        numbers[thread, call] += 1
        if is_on_place(arguments, folder):
            found[call].append((call, numbers[thread, call], arguments.replace(folder, "")[:100]))
    return found


def is_on_place(arguments: str, folder: str) -> bool:
    """Whether a traced call accesses a file of the folder. Paths that do not begin with / are those of the folder in which the program
    runs."""
    arguments = re.sub(r"^AT_FDCWD(<.*?>)?, ", "", arguments)
    on_path = re.match(rf'"([^/]|{re.escape(folder)})', arguments)
    return bool(on_path or re.search(rf"\d<{re.escape(folder)}", arguments))


def missed(log: str, folder: str) -> bool:
    """Whether an error was injected into a call on something else than a file of the folder, which a thread of MPI made where the rehearsal
    had counted one of ours."""
    injected = re.findall(r"^\d+ +\w+\((.*)\(INJECTED\)$", log, re.MULTILINE)
    return any(not is_on_place(arguments, folder) for arguments in injected)


def judge(place, reference, ended, new):
    """The folder holds the result of before or the new one, and a rerun succeeds and leaves nothing behind."""
    found = digest(place.path("out"))
    if found is None:
        # A kill between two moves of a complete result leaves no config; the next start finishes the moves.
        place.run(*TRAIN)
        found = digest(place.path("out"))
    if found not in (reference.other, new):
        return "lost", "neither the result of before nor the new one"
    failure = how_it_failed(ended)
    if failure is None and found != new:
        return "silent", "the result of before, with status 0"
    again = place.run(*OVERWRITE)
    if again.status != 0 or digest(place.path("out")) != reference.trained:
        return "lost", f"a rerun does not mend it:\n{again.text[-2000:]}"
    if place.left_over():
        return "lost", f"left over: {place.left_over()}"
    return failure or "same", ""


def of_a_kill(outcome, ended):
    """A run that was killed ends by a signal; nobody else may crash."""
    return "refused" if outcome == "crash" and "panicked at" not in ended.text else outcome


class Injected(Attack):
    """One system call on a file answers with an error, or the process is killed at it."""

    calls, what, share = "", "", 0.0

    def run(self, place, reference):
        if REASON:
            return "left out", REASON
        found = accesses(place, self.calls)
        call, number, text = found[int(len(found) * self.share)]
        self.name += f": {call} number {number}: {text}"
        log = place.dir.parent / "injected"
        trace = [*STRACE, "-y", "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:{self.what}:when={number}"]
        for _ in range(TRIES):
            begin(place)
            ended = place.wait(place.start(trace + place.command(*OVERWRITE)))
            if not missed(log.read_text(), str(place.dir)):
                break
        else:
            return "left out", "the error came to a call on no file of the attacked folder each time"
        outcome, text = judge(place, reference, ended, reference.trained)
        if "signal=KILL" in self.what:
            outcome = of_a_kill(outcome, ended)
        return outcome, f"{text}\n{ended.text[-2000:]}"


REASON = why_not_traced()


def injected(random):
    """Errors of the file system at a random place of the run."""
    for calls, errors in CALLS.items():
        for i in range(9):
            attack = Injected("", lambda place: None, {"refused", "same", "left out"})
            attack.calls, attack.share = calls, random.random()
            attack.what = "signal=KILL" if i % 3 == 2 else f"error={random.choice(errors)}"
            attack.name = f"{attack.what} after {attack.share:.0%} of {calls}"
            yield attack


def two_ranks(place: Place) -> list[str]:
    return place.command(*OVERWRITE, "--set", "training.global_batch_size=4", ranks=2)


class Killed(Attack):
    """One of two ranks is killed when the run has said a share of what it says, so that the speed of the machine does not matter."""

    share, later_s, rank = 0.0, 0.0, 0

    def run(self, place, reference):
        num_lines, new = lines_and_result(place)
        num_lines = int(self.share * num_lines)
        begin(place)
        process = place.start(two_ranks(place))
        ranks = []
        while process.poll() is None and not (len(ranks) == 2 and place.output().count("\n") >= num_lines):
            ranks = ranks if len(ranks) == 2 else place.ranks(process)
            time.sleep(0.001)
        time.sleep(self.later_s)
        if len(ranks) == 2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(ranks[self.rank], signal.SIGKILL)
        ended = place.wait(process)
        outcome, text = judge(place, reference, ended, new)
        return of_a_kill(outcome, ended), f"{text}\n{ended.text[-2000:]}"


ON_TWO_RANKS: list[tuple[int, str | None]] = []


def lines_and_result(place: Place) -> tuple[int, str | None]:
    """Number of lines that a run on two ranks prints if nobody kills it, and the digest of its result."""
    with LOCK:
        if not ON_TWO_RANKS:
            begin(place)
            ended = place.wait(place.start(two_ranks(place)))
            assert ended.status == 0, ended.text
            ON_TWO_RANKS.append((ended.text.count("\n"), digest(place.path("out"))))
    return ON_TWO_RANKS[0]


def kills(random):
    """A rank that is killed at a random moment."""
    for _ in range(32):
        attack = Killed("", lambda place: None, {"refused", "same"})
        attack.share, attack.later_s = random.uniform(0.0, 1.0), random.choice([0.0, random.uniform(0.0, 0.1)])
        attack.rank = random.randrange(2)
        attack.name = f"rank {attack.rank} is killed {attack.later_s:.3f} s after {attack.share:.0%} of the messages"
        yield attack


def places(_):
    """Result folders that are something else."""

    def file(place):
        place.path("out").write_text("mine")

    def folder_in_the_place(place):
        place.path("out/adapter_model.safetensors").mkdir(parents=True)

    def read_only(place):
        place.path("out").mkdir(mode=0o555)

    def broken_link(place):
        place.path("out").symlink_to("nowhere/at/all")

    def other_run(place):
        shutil.copytree(place.path("old"), place.path("out"))

    def adapter_without_a_run(place):
        shutil.copytree(place.path("adapter"), place.path("out"))
        place.path("out/run.json").unlink(missing_ok=True)

    class Kept(Attack):
        """Everything that was in the folder is there afterwards."""

        def run(self, place, reference):
            place.reset()
            self.prepare(place)
            before = sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in place.path("out").rglob("*"))
            ended = place.run(*self.args)
            failure = how_it_failed(ended)
            after = sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in place.path("out").rglob("*"))
            if failure == "refused" and before != [x for x in after if "lock" not in x[0]]:
                return "lost", f"{[x[0] for x in after]}\n{ended.text[-2000:]}"
            if failure is None and digest(place.path("out")) is None:
                return "silent", ended.text[-2000:]
            return failure or "same", ended.text[-2000:]

    for name, prepare, allowed in [
        ("is a file", file, {"refused"}),
        ("has a folder in the place of the tensors", folder_in_the_place, {"refused"}),
        ("is read-only", read_only, {"refused", "same"}),
        ("is a link that leads nowhere", broken_link, {"refused", "same"}),
        ("holds another run", other_run, {"refused"}),
        ("holds an adapter of nobody", adapter_without_a_run, {"refused"}),
    ]:
        yield Kept(f"output_dir {name}", prepare, allowed)


KINDS = [injected, kills, places]
