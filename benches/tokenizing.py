#!/usr/bin/env python3
"""Measures how fast rows are tokenized, in how much memory, and how full sequences are, beside PyPI's tokenizers and TRL:
tokenizing.py PROGRAM ROWS.jsonl TOKENIZER.json... [--threads N] [--repeats K] [--short BYTES]

ROWS has a column `text`. For each tokenizer, the program (`data`, with an empty cache) and `Tokenizer.encode_batch` take turns on the
same rows with as many threads. The program's time is that of the whole command less that of the same command on one row, so that the
loading of the tokenizer counts on neither side; reading, checking, writing and packing of rows count on the program's side only.
encode_batch gets lists of 1,000 texts that are in memory already, and its result is dropped. Peak memory is that of the program's process
on all rows and on the first BYTES of them. Seconds of cores measure the work even where other programs use the same cores. Each line of
the output is a JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

MAX_LENGTH = 1024
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 200000,
    "max_position_embeddings": 131072, "hidden_act": "silu", "tie_word_embeddings": True,
}


def ours(program, folder, rows, threads, cache):
    """Runs `data` and returns its seconds, those of cores, the peak of its resident memory in bytes, and what it says of the rows."""
    (folder / "recipe.yaml").write_text(json.dumps({
        "model": str(folder), "output_dir": str(folder / "out"), "data": {"train": str(rows), "max_length": MAX_LENGTH, "format": "auto"},
    }))
    with open(folder / "shown.json", "w") as out:
        environment = dict(os.environ, FSDP_QLORA_CACHE=str(cache), RAYON_NUM_THREADS=str(threads))
        begun = time.perf_counter()
        process = subprocess.Popen([program, "data", "-c", "recipe.yaml", "--rows", "0", "--json"], cwd=folder, env=environment, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
    assert status == 0, f"the program ended with {status}"
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, json.loads((folder / "shown.json").read_text())["train"]


def theirs(tokenizer, texts):
    begun, cores, num_tokens = time.perf_counter(), time.process_time(), 0
    for at in range(0, len(texts), 1000):
        num_tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts[at:at + 1000]))
    return time.perf_counter() - begun, time.process_time() - cores, num_tokens


def head(rows, num_bytes, path):
    with open(rows, "rb") as file, open(path, "wb") as out:
        while out.tell() < num_bytes and (line := file.readline()):
            out.write(line)
    return path


def measure(args, source, folder):
    from tokenizers import Tokenizer, __version__

    (folder / "tokenizer.json").write_bytes(Path(source).read_bytes())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    one, short = head(args.rows, 1, folder / "one.jsonl"), head(args.rows, args.short, folder / "short.jsonl")
    texts = [json.loads(line)["text"] for line in open(args.rows)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.from_file(source)
    theirs(tokenizer, texts[:200])

    def run(rows, name):
        cache = folder / name
        shutil.rmtree(cache, ignore_errors=True)
        return ours(args.program, folder, rows, args.threads, cache)

    loads = [run(one, "cache-one") for _ in range(3)]
    loading, loading_cores = (statistics.median(load[i] for load in loads) for i in range(2))
    rates, peers, cores, peer_cores = [], [], [], []
    for _ in range(args.repeats):
        seconds, of_cores, peak, shown = run(args.rows, "cache")
        rates.append(megabytes / (seconds - loading))
        cores.append(of_cores - loading_cores)
        seconds, of_cores, num_tokens = theirs(tokenizer, texts)
        peers.append(megabytes / seconds)
        peer_cores.append(of_cores)
    _, _, short_peak, _ = run(short, "cache-short")
    hit, _, hit_peak, _ = ours(args.program, folder, args.rows, args.threads, folder / "cache")
    print(json.dumps({
        "tokenizer": source, "megabytes": round(megabytes, 1), "rows": len(texts), "tokens": num_tokens, "threads": args.threads,
        "ours_mb_per_s": [round(rate, 2) for rate in rates], f"tokenizers_{__version__}_mb_per_s": [round(rate, 2) for rate in peers],
        "ratio": round(statistics.median(rates) / statistics.median(peers), 3),
        "ours_core_s": [round(seconds, 2) for seconds in cores], "tokenizers_core_s": [round(seconds, 2) for seconds in peer_cores],
        "peak_mib": round(peak / 2**20, 1), "short_bytes": short.stat().st_size, "short_peak_mib": round(short_peak / 2**20, 1),
        "peak_ratio": round(peak / short_peak, 3), "loading_s": round(loading, 2), "cache_hit_s": round(hit, 2),
        "cache_hit_peak_mib": round(hit_peak / 2**20, 1), "filled": shown["filled"],
    }), flush=True)


def pack(args, source, folder):
    """Compares sequences packed from the same documents, cut at MAX_LENGTH tokens."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from trl import __version__
    from trl.data_utils import pack_dataset

    tokenizer = Tokenizer.from_file(source)
    texts = [json.loads(line)["text"] for line in open(head(args.rows, args.short, folder / "short.jsonl"))]
    ids = [encoding.ids[:MAX_LENGTH] for encoding in tokenizer.encode_batch(texts)]
    ids = [list(range(2, 2 + len(document))) for document in ids if len(document) > 1]
    (folder / "ids.jsonl").write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in ids))
    begun = time.perf_counter()
    packed = pack_dataset(Dataset.from_dict({"input_ids": ids}), MAX_LENGTH, strategy="bfd")
    seconds = time.perf_counter() - begun
    *_, shown = ours(args.program, folder, folder / "ids.jsonl", args.threads, folder / "cache-ids")
    tokens = sum(map(len, ids))
    assert tokens == shown["tokens"] == sum(map(len, packed["input_ids"]))
    print(json.dumps({
        "packing": f"{len(ids)} documents in sequences of {MAX_LENGTH}", "tokens": tokens,
        "ours": {"sequences": shown["sequences"], "filled": shown["filled"]},
        f"trl_{__version__}_bfd": {"sequences": len(packed), "filled": tokens / (len(packed) * MAX_LENGTH), "seconds": round(seconds, 2)},
        "fewest": -(-tokens // MAX_LENGTH),
    }), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=os.path.abspath)
    parser.add_argument("rows", type=os.path.abspath)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", type=int, default=10_000_000, help="bytes of the first rows, for memory and packing")
    args = parser.parse_args()
    # Before the library is loaded: its threads are rayon's, as the program's are.
    os.environ.update(RAYON_NUM_THREADS=str(args.threads), TOKENIZERS_PARALLELISM="true")
    for source in args.tokenizers:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, source, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        (Path(folder) / "tokenizer.json").write_bytes(Path(args.tokenizers[0]).read_bytes())
        pack(args, args.tokenizers[0], Path(folder))


if __name__ == "__main__":
    main()
