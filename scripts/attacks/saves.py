"""Faults of the file system while a run saves checkpoints and its result, disks that fill up, and checkpoints that are damaged afterwards.

Training itself goes on where a checkpoint cannot be written. So each run ends well with the adapter of a run that nobody attacks, or it
names a file and ends with another status, and a restart brings it to that adapter.
"""

import collections
import re
import shlex
import shutil
import subprocess

from .common import TRAIN, Attack, Place, digest, how_it_failed
from .damage import damage
from .faults import LOCK, REASON, STRACE, of_a_kill

SAVING = [*TRAIN, "--set", "training.max_steps=4", "--set", "training.save_steps=1", "--set", "training.save_total_limit=2"]
# Fails in its last step, after checkpoints.
FAILING = {"FSDP_QLORA_FAULT": "error:0:4"}
# System calls on files that a save makes, and what they may answer.
CALLS = {
    "openat": ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EMFILE"],
    "write": ["ENOSPC", "EDQUOT", "EIO"],
    "ftruncate": ["ENOSPC", "EIO"],
    "fsync": ["EIO", "ENOSPC", "EDQUOT"],
    "rename": ["ENOSPC", "EIO", "EROFS", "EDQUOT"],
    "renameat": ["ENOSPC", "EIO", "EROFS", "EDQUOT"],
    "mkdir": ["ENOSPC", "EIO", "EROFS", "EDQUOT"],
    "unlink": ["EIO", "EROFS"],
    "unlinkat": ["EIO", "EROFS"],
    "rmdir": ["EIO", "EROFS"],
}
WHOLE: list[str] = []


def whole(place: Place) -> str:
    """Digest of the adapter of a run that nobody attacks."""
    with LOCK:
        if not WHOLE:
            place.reset()
            ended = place.run(*SAVING)
            assert ended.status == 0, ended.text
            WHOLE.append(digest(place.path("out")))
        return WHOLE[0]


def judge(place: Place, ended, expected: str, file: str | None) -> tuple[str, str]:
    """`file` is the name that an error must give."""
    failure = how_it_failed(ended)
    found = digest(place.path("out"))
    if failure is None and found != expected:
        return "silent", f"status 0, and {'another' if found else 'no'} adapter"
    if failure == "refused" and file and file not in ended.text:
        return "silent", f"{file} is not named"
    again = place.run(*SAVING)
    if again.status != 0 or digest(place.path("out")) != expected:
        # A run that failed before its first step leaves nothing to go on from, and one that has saved elsewhere begins anew.
        again = place.run(*SAVING, "--overwrite")
    if again.status != 0 or digest(place.path("out")) != expected:
        return "lost", f"a restart does not come to the same adapter:\n{again.text[-2000:]}"
    if place.left_over():
        return "lost", f"left over: {place.left_over()}"
    return failure or "same", ""


# Calls and paths of a run, those that have a name of their own in it.
NAMED: list[tuple[str, str]] = []


def named_accesses(place: Place) -> list[tuple[str, str]]:
    with LOCK:
        if not NAMED:
            place.reset()
            log = place.dir.parent / "trace"
            ended = place.wait(place.start([*STRACE, "-y", "-o", str(log), "-e", f"trace={','.join(CALLS)}", *place.command(*SAVING)]))
            assert ended.status == 0, ended.text
            found = collections.OrderedDict()
            for line in log.read_text().splitlines():
                match = re.match(r"\d+ +(\w+)\((.*)", line)
                path = match and path_of(match[2], str(place.dir))
                if path and not re.search(r"\.tmp|-tmp-|ENOENT", line) and re.match("(out|cache)/", path):
                    found[match[1], path] = None
            NAMED.extend(found)
        return NAMED


def path_of(arguments: str, folder: str) -> str | None:
    """The first path of a traced call, from the folder in which the program runs."""
    match = re.match(rf'(?:AT_FDCWD<[^>]*>, )?"(?:{re.escape(folder)}/)?([^"]*)"', arguments) or re.match(
        rf"\d+<{re.escape(folder)}/([^>]*)>", arguments
    )
    return match and match[1]


class Injected(Attack):
    """A system call on one file answers with an error, each time or once, or the process is killed at it."""

    share, what, when = 0.0, "", "1"

    def run(self, place, reference):
        if REASON:
            return "left out", REASON
        expected, accesses = whole(place), named_accesses(place)
        call, path = accesses[int(len(accesses) * self.share)]
        error = CALLS[call][int(self.share * 1000) % len(CALLS[call])]
        what = self.what or f"error={error}"
        self.name = f"{what} (when {self.when}) of {call} of {path}"
        paths = ["-P", path, "-P", str(place.path(path))]
        trace = [*STRACE, *paths, "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={self.when}"]
        place.reset()
        ended = place.wait(place.start(trace + place.command(*SAVING)))
        outcome, text = judge(place, ended, expected, None if self.what else path.split("/")[-1])
        outcome = of_a_kill(outcome, ended) if self.what else outcome
        return outcome, f"{text}\n{ended.text[-3000:]}"


def calls_of_a_save(_):
    """Each call on each file of a save, and of the shards and records beside it: an error once, an error each time, a kill."""
    for i in range(240):
        attack = Injected("", lambda place: None, {"refused", "same", "left out"})
        attack.share = (i // 3 + 0.5) / 80
        attack.what, attack.when = [("", "1"), ("", "1+"), ("signal=KILL", "1")][i % 3]
        attack.name = f"call {i}"
        yield attack


# The disk of `out` gets full, but for some bytes, after the second step; the restart has room. What stands in `out` is copied before it
# goes with the disk.
FILL = """
mount -t tmpfs -o size=4m none out || exit 99
{program} 2>log & pid=$!
until grep -q 'step 2/' log || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
dd if=/dev/zero of=out/filler bs=4k 2>/dev/null
truncate -s -{free} out/filler
wait $pid; status=$?; cat log >&2
rm out/filler
cp -r out kept
exit $status
"""


def why_no_disk() -> str | None:
    """The reason why no small disk can be mounted here, or `None`."""
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no disk can be mounted: {' '.join(tried.stderr.split())}"


NO_DISK = why_no_disk()


class Filled(Attack):
    """The disk of the output folder fills up while the run trains; it has `free` bytes left."""

    free = 0

    def run(self, place, reference):
        if NO_DISK:
            return "left out", NO_DISK
        many = ["--set", "training.max_steps=30"]
        place.reset()
        assert place.run(*SAVING, *many).status == 0
        expected = digest(place.path("out"))
        shutil.rmtree(place.path("out"))
        place.path("out").mkdir()
        program = shlex.join(place.command(*SAVING, *many))
        script = FILL.format(program=program, free=self.free)
        ended = place.wait(place.start(["unshare", "-rm", "sh", "-c", script], PMIX_MCA_gds="hash", OMPI_MCA_btl="self"))
        if ended.status == 99:
            return "left out", ended.text
        shutil.rmtree(place.path("out"))
        place.path("kept").rename(place.path("out"))
        failure = how_it_failed(ended)
        if failure is None and digest(place.path("out")) != expected:
            return "silent", ended.text[-3000:]
        if failure == "refused" and "No space left on device" not in ended.text and "bytes are needed" not in ended.text:
            return "silent", f"the full disk is not named\n{ended.text[-3000:]}"
        again = place.run(*SAVING, *many)
        if again.status != 0 or digest(place.path("out")) != expected:
            return "lost", f"{again.text[-2000:]}\nbefore:\n{ended.text[-3000:]}"
        return failure or "same", ended.text[-3000:]


def full_disks(random):
    """Disks that fill up in mid-run, with less room than a checkpoint takes."""
    for i in range(24):
        attack = Filled("", lambda place: None, {"refused", "same", "left out"})
        attack.free = i * 8192 + random.randrange(8192)
        attack.name = f"{attack.free} bytes are left after step 2"
        yield attack


class Damaged(Attack):
    """A file of the newest checkpoint, or of the cache, is damaged between a run that failed and its restart."""

    def run(self, place, reference):
        expected = whole(place)
        place.reset()
        ended = place.run(*SAVING, **FAILING)
        assert ended.status == 1 and place.path("out/checkpoint-2/state.json").exists(), ended.text
        self.prepare(place)
        ended = place.run(*SAVING)
        failure = how_it_failed(ended)
        if failure is None and digest(place.path("out")) != expected:
            return "silent", f"another adapter\n{ended.text[-3000:]}"
        return failure or "same", ended.text[-3000:]


def damaged_files(random):
    """A flipped byte, a cut or an empty file anywhere in a checkpoint, the run's record, a shard, or the record of the base's digests."""
    files = ["out/checkpoint-*/" + name for name in ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"]]
    files += ["out/checkpoint-*/metrics.jsonl", "out/checkpoint-*/state.json", "out/run.json", "out/metrics.jsonl"]
    files += ["cache/**/*.safetensors", "cache/**/base-*.json"]
    for i in range(len(files) * 9):
        file, what, share = files[i % len(files)], ["byte", "byte", "cut", "empty"][i // len(files) % 4], random.random()
        # A record of the run that cannot be read, or is another's, is refused.
        allowed = {"refused", "same"} if file.endswith("run.json") else {"same"}

        def prepare(place, file=file, what=what, share=share):
            found = sorted(place.dir.glob(file))
            assert found, f"no {file}"
            damage(found[-1], what, share)

        yield Damaged(f"{file}, {what} at {share:.3f}", prepare, allowed)


KINDS = [calls_of_a_save, full_disks, damaged_files]
