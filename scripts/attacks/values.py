"""Odd values in the place of every number, word and path; rows and chat templates that ask for too much."""

import json
import re
import subprocess

from .common import EVAL, TRAIN, Attack, Place
from .damage import ADAPTED, ANY, REFUSED

ODD = [
    "null", "true", "-1", "0", "1", "0.5", "4.7", "1e300", "-1e300", "1e-300", ".nan", ".inf", "-.inf", "'nan'", "1e400",
    "9007199254740993", "18446744073709551615", "18446744073709551616", "'abc'", "''", "[]", "[1, 2]", "{}", "{a: 1}", "1000000000",
    "1000000000000", '"\\e[31m\\x07"', "~", "'~/x'", "'${HOME}'", "é", "1_000", "0x10", "1GiB", "1e308GiB",
]  # fmt: skip
ODD_JSON = [
    None, True, -1, 0, 1, 0.5, 4.7, 1e300, -1e300, 1e-300, 2**53 + 1, 2**64 - 1, 2**64, 10**9, 10**12, 10**30, "abc", "", "\x1b[31m\x07",
    [], [1, 2], {}, {"a": 1}, "7" * 5000, [[[[]]]],
]  # fmt: skip


def keys_of_a_recipe(place_program) -> list[str]:
    text = subprocess.run([place_program, "train", "--help-recipe"], capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"^\s*([a-z_]+(?:\.[a-z_0-9]+)?):? ", text, re.M)))


def recipe_values(random):
    """Every key of a recipe with some odd values."""

    class OddKey(Attack):
        # The keys come from the program itself, which is known when the attack runs.
        def run(self, place, reference):
            keys = keys_of_a_recipe(place.program)
            assert len(keys) > 40, keys
            key = keys[self.key % len(keys)]
            if key in ("training.max_steps", "training.num_train_epochs", "output_dir") and self.value not in ("-1", "0", "null", "'abc'"):
                # A run of a billion steps goes on as it was asked to, and a result elsewhere is not looked for.
                self.value = "-1"
            self.name += f" {key}"
            self.args = [*TRAIN, "--set", f"{key}={self.value}"]
            return super().run(place, reference)

    for i in range(150):
        value = random.choice(ODD)
        attack = OddKey(f"{value} for", lambda place: None, ANY)
        attack.key, attack.value = i, value
        yield attack


def model_configs(random):
    """Every key of config.json with some odd values."""
    keys = [
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "eos_token_id", "tie_word_embeddings", "attention_bias",
        "hidden_act", "model_type", "architectures", "quantization_config", "pretraining_tp", "attention_dropout", "unheard_of",
    ]  # fmt: skip
    for key in keys:
        for value in random.sample(ODD_JSON, 5):

            def prepare(place, key=key, value=value):
                place.edit_json("model/config.json", lambda config: config.update({key: value}))

            yield Attack(f"config.json {key} {str(value)[:40]!r}", prepare, ANY, EVAL)


def adapter_configs(random):
    """Every key of adapter_config.json with some odd values."""
    keys = [
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "init_lora_weights", "use_rslora", "use_dora", "bias",
        "peft_type", "modules_to_save", "rank_pattern", "layers_to_transform", "task_type", "unheard_of",
    ]  # fmt: skip
    for key in keys:
        for value in random.sample(ODD_JSON, 4):

            def prepare(place, key=key, value=value):
                place.edit_json("adapter/adapter_config.json", lambda config: config.update({key: value}))

            yield Attack(f"adapter_config.json {key} {str(value)[:40]!r}", prepare, ANY, ADAPTED)
    for value in ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]:
        prepare = lambda place, v=value: place.edit_json("adapter/adapter_config.json", lambda c: c.update(init_lora_weights=v))  # noqa: E731
        yield Attack(f"an adapter of {value}", prepare, REFUSED, ADAPTED)


def arguments(random):
    """Every number of the command line with odd values."""
    odd = ["-1", "0", "1", "0.5", "nan", "inf", "1e300", "4294967295", "18446744073709551615", "18446744073709551616", "abc", "", "\x1b[31m"]
    bench = ["bench", "step", "--shape", "model", "--steps", "1"]
    plan = ["plan", "--shape", "llama-3.1-8b", "--gpu", "rtx3090"]
    generate = ["generate", "--model", "model", "--prompt", "hello"]
    options = [
        (generate, ["--max-new-tokens", "--temperature", "--seed"]),
        (EVAL, ["--max-length", "--dataset", "--adapter"]),
        (["quantize", "--model", "model", "--output", "shards"], ["--world-size"]),
        (plan, ["--world-size", "--nodes", "--host-gib", "--micro-batch", "--seq", "--accum", "--layers"]),
        (bench, ["--layers", "--micro-batch", "--seq", "--accum"]),
    ]
    for args, names in options:
        for name in names:
            for value in random.sample(odd, 6):
                given = args if name not in args else [a for i, a in enumerate(args) if name not in (a, args[i - 1])]
                yield Attack(f"{args[0]} {name} {value!r}", lambda place: None, ANY, [*given, f"{name}={value}"])


def rows(_):
    """Rows that are no rows, say two things, or ask for too much."""
    refused = [
        '{"text": 1}', '{"text": ["a"]}', '["text"]', '"text"', "1", "{", '{"text": "a"} x', '{"messages": "a"}', '{"messages": [1]}',
        '{"messages": [{"role": 1, "content": "a"}]}', '{"messages": [{"content": "a"}]}', '{"prompt": "a"}', '{"completion": "a"}',
        '{"input_ids": "a"}', '{"input_ids": [1.5, 2]}', '{"input_ids": [-1, 2]}', '{"input_ids": [1e30, 2]}', '{"input_ids": [320, 2]}',
        '{"input_ids": [[1, 2]]}', '{"input_ids": [1, 2], "labels": [1]}', '{"input_ids": [1, 2], "labels": [1, 3]}',
        '{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}', '{"input_ids": [1, 2], "attention_mask": [1]}',
        '{"input_ids": [1, 2, 3], "attention_mask": [1, 2, 1]}', '{"images": ["a.png"], "text": "a"}',
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]}',
        '{"chosen": "a", "rejected": "b"}', "{}",
    ]  # fmt: skip
    any_end = [
        '{"text": ""}', '{"text": null}', '{"text": "a", "messages": null}', '{"text": "a", "topic": "b"}', '{"text": "\\u0000"}',
        '{"text": "\\ufdd0"}', '{"text": "\\ud800"}', '{"input_ids": []}', '{"input_ids": [1]}', '{"input_ids": [1, 2], "labels": [-100, -100]}',
        '{"messages": []}', '{"messages": [{"role": "assistant", "content": "b"}]}', '{"messages": [{"role": "martian", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}',
        '{"text": "' + "a " * 400_000 + '"}', '{"input_ids": [' + "1," * 500_000 + "1]}", '{"text": "a", "text": "b"}',
        '{"instruction": "a", "output": "b", "system": "c", "history": [["d", "e"]]}', '{"input_ids": [1, 2, 3], "position_ids": [0, 0, 1]}',
        '{"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}', '{"messages": [{"role": "user", "content": "a"}], "tools": []}',
        "[" * 5000, '{"a":' * 5000,
    ]  # fmt: skip
    for allowed, texts in [(REFUSED, refused), (ANY, any_end)]:
        for text in texts:

            def prepare(place: Place, text=text):
                place.path("rows.jsonl").write_text(text + "\n", encoding="utf-8")

            yield Attack(f"the row {text[:60]}", prepare, allowed, EVAL)


def templates(_):
    """Chat templates that never end, take all memory, or go too deep."""
    refused = {
        "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}x",
        "a long text": "{{ 'a' * 10**10 }}",
        "a text that doubles": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "a list that doubles": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "a long range": "{{ range(10**12) | list | length }}",
        "a wide format": "{{ '%999999999d' % 1 }}",
        "a deep expression": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "many negations": "{{ " + "not " * 100_000 + "1 }}",
        "deep blocks": "{% if 1 %}" * 20_000 + "x" + "{% endif %}" * 20_000,
        "an endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "a long join": "{{ ['a' * 10**6] * 10**6 | join }}",
        "a wide indent": "{{ 'a\\nb' | indent(10**10) }}",
        "a replacement that grows": "{% set ns = namespace(x='a') %}{% for i in range(20) %}{% set ns.x = ns.x | replace('a', 'aaaaaaaaaa') %}{% endfor %}{{ ns.x }}",
        "an include": "{% include '/etc/passwd' %}",
        "an import": "{% import 'os' as os %}{{ os }}",
        "broken syntax": "{% for %}",
        "an endless loop over itself": "{% set x = [1] %}{% for i in x %}{{ x.append(i) }}{% endfor %}{% for i in range(10**9) %}{% endfor %}",
    }
    for what, source in refused.items():
        row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})

        def prepare(place, source=source, row=row):
            place.path("model/chat_template.jinja").write_text(source)
            place.path("rows.jsonl").write_text(row + "\n")

        yield Attack(f"a template of {what}", prepare, REFUSED, EVAL)


KINDS = [recipe_values, model_configs, adapter_configs, arguments, rows, templates]
