"""Ranks that were started with different things, which must be refused before anything is written."""

import json
import shutil

from .common import TRAIN, WATCHDOG_S, Attack, how_it_failed
from .damage import REFUSED


class Differing(Attack):
    """Rank 1 has its own overrides, folder of input or environment."""

    other: list[str] = []
    environment: dict[str, str] = {}

    def run(self, place, reference):
        place.reset()
        shutil.copytree(place.path("model"), place.path("model1"))
        shutil.copy(place.path("rows.jsonl"), place.path("rows1.jsonl"))
        self.prepare(place)
        env = [x for k, v in self.environment.items() for x in ("-x", f"{k}={v}")]
        program = place.command(*TRAIN, "--set", "training.max_steps=3")
        # Rank 0 never sees the environment of rank 1.
        command = ["mpirun", "-np", "1", *program, ":", "-np", "1", *env, *program, *self.other]
        ended = place.wait(place.start(command))
        failure = how_it_failed(ended)
        # Rows are compared as tokens, which are named by all that they are made of: a whole file of them is no one's result.
        harmless = lambda file: "lock" in file.name or file.suffix == ".tokens"
        written = [p for d in ["out", "cache"] for p in place.path(d).rglob("*") if p.is_file() and not harmless(p)]
        if failure == "refused" and written:
            return "lost", f"written: {written}\n{ended.text[-2000:]}"
        if failure == "refused" and not all(word in ended.text for word in ["rank 0", "rank 1"]):
            return "silent", f"no ranks are named\n{ended.text[-2000:]}"
        return failure or "silent", ended.text[-2000:]


def differing(name, prepare=lambda place: None, other=(), **environment):
    attack = Differing(name, prepare, REFUSED)
    attack.other, attack.environment = list(other), environment
    return attack


def recipes(_):
    """Each key that decides what is computed."""
    for key, value in {
        "training.learning_rate": "2.0e-2", "training.seed": "7", "lora.lora_dropout": "0.1", "lora.r": "4", "lora.lora_alpha": "32",
        "lora.target_modules": "[q_proj]", "lora.use_rslora": "true", "data.max_length": "32", "data.packing": "false",
        "data.loss_on": "all", "training.max_steps": "4", "training.global_batch_size": "6",
        "training.per_device_train_batch_size": "2", "training.weight_decay": "0.1", "training.adam_beta1": "0.5",
        "training.max_grad_norm": "0.1", "training.lr_scheduler_type": "linear", "training.warmup_steps": "1",
        "quantization.load_in_4bit": "false", "quantization.bnb_4bit_use_double_quant": "false", "fsdp.sharding_strategy": "no_shard",
        "fsdp.accumulation": "micro_batch", "data.eval": "0.5",
    }.items():  # fmt: skip
        yield differing(f"{key}={value} on one rank", other=["--set", f"{key}={value}"])


def inputs(random):
    """Models, rows, tokenizers and templates that differ in a byte."""

    def flip(file, share):
        def prepare(place):
            path = place.path(f"model1/{file}")
            data = bytearray(path.read_bytes())
            data[int(len(data) * share)] ^= 1
            path.write_bytes(data)

        return prepare

    for share in [0.3, 0.6, 0.9, 0.99]:
        yield differing(f"a model whose byte at {share} differs", flip("model.safetensors", share), ["--set", "model=model1"])

    def edit(file, change):
        return lambda place: place.edit_json(f"model1/{file}", change)

    model1 = ["--set", "model=model1"]
    yield differing("another rms_norm_eps", edit("config.json", lambda c: c.update(rms_norm_eps=1e-6)), model1)
    yield differing("another rope_theta", edit("config.json", lambda c: c.update(rope_theta=5e4)), model1)
    yield differing("another eos token", edit("tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>")), model1)
    yield differing("another template", edit("tokenizer_config.json", lambda c: c.update(chat_template="{{ messages[0].content }}")), model1)

    def rows(change):
        def prepare(place):
            lines = place.path("rows1.jsonl").read_text().splitlines()
            place.path("rows1.jsonl").write_text("".join(line + "\n" for line in change(lines)))

        return prepare

    rows1 = ["--set", "data.train=rows1.jsonl"]
    yield differing("a row less", rows(lambda lines: lines[:-1]), rows1)
    yield differing("rows in another order", rows(lambda lines: lines[::-1]), rows1)
    yield differing("another word", rows(lambda lines: [json.dumps({"text": "a quick brown fox"})] + lines[1:]), rows1)


def environments(_):
    """Variables that change what a run does."""
    yield differing("ranks of a node", FSDP_QLORA_RANKS_PER_NODE="1")
    yield differing("another timeout", FSDP_QLORA_TIMEOUT_S=str(int(WATCHDOG_S) + 1))


KINDS = [recipes, inputs, environments]
