"""Faults of the file system and kills while a run replaces the result of another: what was there stays whole, or the new one is."""

import os
import shutil
import signal
import subprocess
import time

from .common import TRAIN, Attack, digest, how_it_failed

OVERWRITE = [*TRAIN, "--overwrite"]
# System calls that change files, and what they may answer.
CALLS = {
    "write": ["ENOSPC", "EIO"],
    "pwrite64": ["ENOSPC"],
    "fsync": ["EIO"],
    "rename,renameat,renameat2": ["EACCES", "EIO", "ENOSPC"],
    "mkdir,mkdirat": ["ENOSPC"],
    "unlink,unlinkat": ["EACCES"],
    "fstatfs,statfs": ["EIO"],
    "flock": ["ENOLCK"],
    "ftruncate,fallocate": ["ENOSPC"],
    "mmap": ["ENOMEM"],
    "linkat,link": ["EPERM"],
}


def judge(place, reference, ended):
    """The folder holds the result of before or the new one, and a rerun succeeds and leaves nothing behind."""
    found = digest(place.path("out"))
    if found is None:
        # A kill between two moves of a complete result leaves no config; the next start finishes the moves.
        place.run(*TRAIN)
        found = digest(place.path("out"))
    if found not in (reference.other, reference.trained):
        return "lost", "neither the result of before nor the new one"
    failure = how_it_failed(ended)
    if failure is None and found != reference.trained:
        return "silent", "the result of before, with status 0"
    again = place.run(*OVERWRITE)
    if again.status != 0 or digest(place.path("out")) != reference.trained:
        return "lost", f"a rerun does not mend it:\n{again.text[-2000:]}"
    if place.left_over():
        return "lost", f"left over: {place.left_over()}"
    return failure or "same", ""


class Injected(Attack):
    """One system call answers with an error, or the process is killed at it."""

    call, what, when = "", "", 1

    def run(self, place, reference):
        place.reset()
        shutil.copytree(place.path("old"), place.path("out"))
        trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={self.call}", "-e", f"inject={self.call}:{self.what}:when={self.when}"]
        # mmap fails for everybody at the start; a run begins when its libraries are there.
        ended = place.wait(place.start(trace + place.command(*OVERWRITE)))
        killed = "signal=KILL" in self.what and ended.status in (-9, 137)
        outcome, text = judge(place, reference, ended)
        return ("refused" if killed and outcome == "crash" else outcome), f"{text}\n{ended.text[-2000:]}"


def injected(random):
    """Errors of the file system at a random place of the run."""
    if subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode != 0:
        raise SystemExit("error: strace cannot trace here; --only picks other attacks")
    for call, errors in CALLS.items():
        for i in range(7):
            kill = i % 3 == 2
            attack = Injected("", lambda place: None, {"refused", "same"})
            attack.call, attack.when = call, random.randrange(40, 120) if call == "mmap" else random.randrange(1, 40)
            attack.what = "signal=KILL" if kill else f"error={random.choice(errors)}"
            attack.name = f"{attack.what} at {call} number {attack.when}"
            yield attack


class Killed(Attack):
    """One of two ranks is killed after some time."""

    after_s = 0.0

    def run(self, place, reference):
        place.reset()
        shutil.copytree(place.path("old"), place.path("out"))
        process = place.start(place.command(*OVERWRITE, "--set", "training.global_batch_size=4", ranks=2))
        time.sleep(self.after_s)
        ranks = subprocess.run(["pgrep", "-f", f"^{place.program} "], capture_output=True, text=True).stdout.split()
        if ranks:
            try:
                os.kill(int(ranks[-1]), signal.SIGKILL)
            except ProcessLookupError:
                pass
        begin = time.monotonic()
        ended = place.wait(process)
        seconds = time.monotonic() - begin
        found = digest(place.path("out"))
        if found is None:
            return "lost", "no adapter"
        if ended.late or seconds > 25:
            return "hang", f"{seconds:.0f} s after the kill"
        again = place.run(*OVERWRITE)
        if again.status != 0 or digest(place.path("out")) != reference.trained or place.left_over():
            return "lost", f"a rerun does not mend it, left over: {place.left_over()}\n{again.text[-2000:]}"
        return "same" if ended.status == 0 else "refused", ended.text[-2000:]


def kills(random):
    """A rank that is killed at a random moment."""
    for _ in range(16):
        attack = Killed("", lambda place: None, {"refused", "same"})
        attack.after_s = random.uniform(0.02, 0.8)
        attack.name = f"a rank is killed after {attack.after_s:.2f} s"
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
        """Whatever was there is there afterwards."""

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
