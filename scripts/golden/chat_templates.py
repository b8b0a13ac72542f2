"""tests/golden/chat_templates.json: conversations rendered by transformers through templates of real models.

A list of {name, template, messages, variables, add_generation_prompt, bos_token, eos_token, rendered}; `rendered` is null where
the template refuses the conversation (raise_exception). Llama's and Qwen's templates are those that TRL carries.
"""

from pathlib import Path

import jinja2
import trl
from common import folder, write_json
from transformers import AutoTokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# name -> template (None: NAME.jinja of trl/chat_templates), bos, eos
TEMPLATES = {
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>"),
    "llama3_1": (None, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2_5": (None, "<|endoftext|>", "<|im_end|>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "llama3_training": (None, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2_5_training": (None, "<|endoftext|>", "<|im_end|>"),
    "qwen3": (None, "<|endoftext|>", "<|im_end|>"),
}
# the templates that write tool calls and reasoning
WITH_TOOLS = ("llama3_1", "qwen2_5", "qwen3")
TOOL = {"type": "function", "function": {"name": "f", "description": "Does <f>.", "parameters": {
    "type": "object", "properties": {"x": {"type": "number", "minimum": 1e-07}}, "required": ["x"]}}}


def call(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": arguments}}]}


# messages, variables of the template
WITH_VARIABLES = [
    ([{"role": "user", "content": "a"}, call({"lr": 1e-05, "n": 12345678901234567890123, "é": [True, None, 1e16, -0.5]}),
      {"role": "tool", "name": "f", "content": "{\"r\": 1}"}, {"role": "assistant", "content": "b", "tool_calls": None}],
     {"tools": [TOOL], "date_string": "1 May 2025"}),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "because"}],
     {"date_string": "1 May 2025"}),
    ([{"role": "user", "content": "a"}], {"enable_thinking": False, "date_string": "1 May 2025"}),
]
CONVERSATIONS = [
    [{"role": "system", "content": "  You answer briefly.\n"}, {"role": "user", "content": "What is a permit?"},
     {"role": "assistant", "content": "A decision."}, {"role": "user", "content": "By whom?\n\nTell me. "},
     {"role": "assistant", "content": " The municipality. "}],
    [{"role": "user", "content": "Är <b>\"det\"</b> & 'så' — 日本語 🦊?"},
     {"role": "assistant", "content": "Ja: <|x|> {{ not a template }} \\n &amp;"}],
    [{"role": "user", "content": "Hi"}],
]


def main():
    tokenizer = AutoTokenizer.from_pretrained(folder("tokenizer"))
    from_trl = Path(trl.__file__).parent / "chat_templates"
    rendered = []
    for name, (template, bos, eos) in TEMPLATES.items():
        template = template or (from_trl / f"{name}.jinja").read_text()
        tokenizer.bos_token, tokenizer.eos_token = bos, eos
        more = WITH_VARIABLES if name in WITH_TOOLS else []
        for messages, variables in [(messages, {}) for messages in CONVERSATIONS] + more:
            prompt = messages[-1]["role"] == "user"
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **variables)
            except jinja2.TemplateError:
                text = None
            rendered.append({"name": name, "template": template, "messages": messages, "variables": variables,
                             "add_generation_prompt": prompt, "bos_token": bos, "eos_token": eos, "rendered": text})
    write_json(folder() / "chat_templates.json", rendered)


if __name__ == "__main__":
    main()
