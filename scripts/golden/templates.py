#!/usr/bin/env python3
"""Compares what `fsdp-qlora data` makes of conversations with transformers' `apply_chat_template`, for every template that TRL and
llama.cpp carry, and writes the counts to docs/templates.md.

usage: templates.py PROGRAM LLAMA_CPP

LLAMA_CPP is a folder of llama.cpp's source (vendor/llama.cpp in the source of llama-cpp-python). A pair of a template and a conversation is
equal, byte by byte; or refused by both; or refused here by name, though transformers renders it; or accepted here, though transformers
refuses it; or different. Every pair of the last three kinds is listed. The exit status is 1 if one is different.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import transformers
import trl
from common import ROOT, folder
from transformers import AutoTokenizer

PAGE = ROOT.parents[1] / "docs" / "templates.md"
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Finds <a> \"thing\" & more — äö.", "parameters": {
    "type": "object", "required": ["x"],
    "properties": {"x": {"type": "number", "minimum": 1e-07, "description": "a number"}, "y": {"type": "array", "items": {"type": "string"}}}}}}
TOOLS = [TOOL, {"type": "function", "function": {"name": "now", "description": "Tells the time.", "parameters": {
    "type": "object", "properties": {}}}}]


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def calls(*arguments, content=None, **more):
    return message("assistant", content, **more, tool_calls=[
        {"type": "function", "id": f"call0000{i}", "function": {"name": "lookup", "arguments": a}} for i, a in enumerate(arguments)])


# name -> messages, further columns of the row
CONVERSATIONS = {
    "two turns and a system message": ([
        message("system", "  You answer briefly.\n"), message("user", "What is a permit?"), message("assistant", "A decision."),
        message("user", "By whom?\n\nTell me. "), message("assistant", " The municipality. ")], {}),
    "special characters": ([
        message("user", "Är <b>\"det\"</b> & 'så' — 日本語 🦊?"), message("assistant", "Ja: <|x|> {{ no template }} \\n &amp; {% if %}")], {}),
    "a tool call, its result, and an answer": ([
        message("user", "Look it up."), calls({"x": 3, "y": ["a", "b"]}, content=""),
        message("tool", "{\"found\": 1}", name="lookup", tool_call_id="call00000"), message("assistant", "It is there.")], {"tools": TOOLS}),
    "numbers in arguments": ([
        message("user", "Numbers."),
        calls({"x": 1e-05, "n": 12345678901234567890123, "é": [True, None, 1e16, -0.5, 1.0, 1e22, 5e-324]}, content=""),
        message("tool", "ok", name="lookup", tool_call_id="call00000"), message("assistant", "Done.")], {"tools": [TOOL]}),
    "reasoning": ([
        message("user", "Why?"), message("assistant", "So.", reasoning_content="Let me think.\nYes."),
        message("user", "And then?"), message("assistant", "Therefore.", reasoning_content="Again.")], {}),
    "nulls": ([
        message("user", "Call.", name=None), calls({"x": 1}, reasoning_content=None),
        message("tool", "1", name="lookup", tool_call_id="call00000"), message("assistant", "One.", tool_calls=None)], {"tools": [TOOL]}),
    "a system message in an odd place": ([
        message("user", "Hi."), message("assistant", "Hello."), message("system", "Be formal."), message("user", "Hi."),
        message("assistant", "Good evening.")], {}),
    "two users in a row": ([message("user", "One."), message("user", "Two."), message("assistant", "Three.")], {}),
    "a variable of the template, and no answer": ([
        message("system", "s"), message("user", "Think or do not.")],
        {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low", "date_string": "1 May 2025"}}),
    "two calls at once, and two results": ([
        message("system", "Use tools."), message("user", "Both."), calls({"x": 1}, {"x": 2, "y": []}, content="I look."),
        message("tool", "a", name="lookup", tool_call_id="call00000"), message("tool", "b", name="lookup", tool_call_id="call00001"),
        message("assistant", "Both are there.")], {"tools": TOOLS}),
    # Content in parts is read as the text of its parts.
    "content in parts": ([
        message("user", [{"type": "text", "text": "First. "}, {"type": "text", "text": "Second."}]),
        message("assistant", [{"type": "text", "text": "Third."}])], {}),
}


def of_parts(messages):
    text = lambda content: "".join(part["text"] for part in content) if isinstance(content, list) else content
    return [{**m, "content": text(m["content"])} for m in messages]


def reference(tokenizer, template, messages, columns):
    """The text by transformers, or `None` where the template refuses the conversation."""
    variables = columns.get("chat_template_kwargs", {})
    try:
        return tokenizer.apply_chat_template(
            of_parts(messages), tools=columns.get("tools"), chat_template=template, tokenize=False, **variables), None
    except Exception as error:  # raise_exception, but also a template that calls what is not there
        return None, str(error).split("\n")[0]


def rendered(program, template, messages, columns):
    """The text by the program, or `None` with the last line of its error."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "model").mkdir()
        for file in ["tiny/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]:
            shutil.copy(folder() / file, place / "model" / Path(file).name)
        (place / "model/chat_template.jinja").write_text(template, encoding="utf-8")
        (place / "rows.jsonl").write_text(json.dumps({"messages": messages, **columns}) + "\n", encoding="utf-8")
        (place / "recipe.yaml").write_text(
            "model: model\ndata: {train: rows.jsonl, max_length: 1000000, packing: false, loss_on: all, format: messages}\n")
        done = subprocess.run([program, "data", "-c", "recipe.yaml", "--json"], cwd=place, capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr.strip().replace("\n", " ")
        return json.loads(done.stdout)["train"]["first_rows"][0]["documents"][0]["text"], None


def compare(program, tokenizer, template, conversation):
    messages, columns = CONVERSATIONS[conversation]
    (expected, why), (found, why_here) = reference(tokenizer, template, messages, columns), rendered(program, template, messages, columns)
    if expected == found:
        return ("equal", None) if found is not None else ("refused by both", None)
    if found is None:
        return "refused here", why_here
    return ("accepted here", why) if expected is None else ("different", f"{expected!r} != {found!r}")


def main():
    program, llama_cpp = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    carried = {"TRL": Path(trl.__file__).parent / "chat_templates", "llama.cpp": llama_cpp / "models" / "templates"}
    tokenizer = AutoTokenizer.from_pretrained(folder("tokenizer"))
    kinds = ["equal", "refused by both", "refused here", "accepted here", "different"]
    lines, listed, wrong = [], [], 0
    for origin, place in carried.items():
        files = sorted(file for file in place.iterdir() if file.suffix == ".jinja")
        if not files:
            sys.exit(f"error: {place} has no template")
        jobs = [(file, name) for file in files for name in CONVERSATIONS]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda job: compare(program, tokenizer, job[0].read_text(encoding="utf-8"), job[1]), jobs))
        counts = [sum(result == kind for result, _ in results) for kind in kinds]
        wrong += counts[4]
        lines.append(f"| {origin} | {len(files)} | {len(CONVERSATIONS)} | " + " | ".join(map(str, counts)) + " |")
        for (file, name), (kind, why) in zip(jobs, results):
            if kind not in ("equal", "refused by both"):
                print(f"{origin}: {file.name}: {name}: {kind}: {why}", file=sys.stderr)
            if kind in kinds[2:]:
                listed.append(f"| {file.stem} | {name} | {kind} | {'' if kind == 'different' else why.split(': ')[-1]} |")
    head = f"| carried by | templates | conversations | {' | '.join(kinds)} |"
    table = "\n".join([head, "|---" * (3 + len(kinds)) + "|", *lines])
    more = "\n".join(["| template | conversation | | why |", "|---|---|---|---|", *listed])
    before, start, rest = PAGE.read_text().partition("<!-- counts -->\n")
    _, end, after = rest.partition("<!-- end of counts -->")
    PAGE.write_text(f"{before}{start}With transformers {transformers.__version__} and TRL {trl.__version__}:\n\n{table}\n\n{more}\n{end}{after}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
