"""tests/golden/rows/: rows in Parquet files, as pyarrow writes them, and what TRL makes of the rows of docs/rows.json.

  prompts.parquet, prompts-zstd.parquet, prompts-gzip.parquet, prompts-plain.parquet
                      three rows of prompt, completion and n, compressed by Snappy and so on; a group of rows holds two
  messages.parquet    one row of messages, a list of structs with nulls
  tokenized.parquet   two rows of input_ids
  trl.json            {loss_on and a row as compact JSON: {input_ids, labels}} for the rows of which TRL trains the same
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, folder, write_json
from tokenizer import CHATML, TEMPLATES, prepare
from transformers import AutoTokenizer

PROMPTS = [
    {"prompt": 'a, "b"', "completion": "ü\nz", "n": 1},
    {"prompt": "p", "completion": "c", "n": None},
    {"prompt": "\\", "completion": "]},", "n": 3},
]
MESSAGES = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "t"}]}]
TOKENIZED = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]


def main():
    out = folder("rows")
    for name, compression in [("", "snappy"), ("-zstd", "zstd"), ("-gzip", "gzip"), ("-plain", "none")]:
        pq.write_table(pa.Table.from_pylist(PROMPTS), out / f"prompts{name}.parquet", compression=compression, row_group_size=2)
    pq.write_table(pa.Table.from_pylist(MESSAGES), out / "messages.parquet")
    pq.write_table(pa.Table.from_pylist(TOKENIZED), out / "tokenized.parquet")
    tokenizer, prepared = AutoTokenizer.from_pretrained(folder("tokenizer")), {}
    for entry in json.loads((ROOT.parents[1] / "docs" / "rows.json").read_text()):
        if entry["trl_1_16"] == "the same":
            tokenizer.chat_template = TEMPLATES.get(entry["template"], CHATML)
            ((input_ids, labels),) = prepare(tokenizer, entry["loss_on"], [entry["row"]])
            row = json.dumps(entry["row"], separators=(",", ":"), ensure_ascii=False)
            prepared[f"{entry['loss_on']} {row}"] = {"input_ids": input_ids, "labels": labels}
    write_json(out / "trl.json", prepared)


if __name__ == "__main__":
    main()
