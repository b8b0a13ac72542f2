"""tests/golden/tokenizer/: a byte-level BPE tokenizer of 320 tokens, and what TRL makes of rows with it.

  tokenizer.json, tokenizer_config.json  256 bytes, 61 merges, <|im_start|> <|im_end|> <|endoftext|>; a ChatML template
  generation_template.jinja              the same template with {% generation %} around what the assistant says
  variables_template.jinja               the same template, which also writes tools, tool calls and a date
  reasoning_template.jinja               the same template, which also writes reasoning
  tokenized.json                         {"texts": [{text, ids}], "rows": [{row, loss_on, template, input_ids, labels}]}

`texts` are encoded without special tokens added. Each of `rows` is what TRL's SFTTrainer prepares: `loss_on` is auto, all,
completion or assistant; `template` is "chatml", "generation", "variables", "reasoning", or null where the row has no conversation.
"""

import json
import tempfile

from common import folder, write_json
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
VOCAB_SIZE = 320
CORPUS = [
    "the quick brown fox jumps over the lazy dog while the other foxes wait for an answer",
    "What is the permit for? The permit is for building on the land that there is.",
    "You are a helpful assistant. user system assistant\nHow long does it take to train the model on the data?",
    "def train(model, data):\n    return model.fit(data)\n\nIt takes 10 weeks, 3 days and 25 hours.",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VARIABLES = (
    "{{ date_string | default('no date') }}{% if tools %}{{ tools | length }} tools: {{ tools[0].function.name }}{% endif %}\n"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.content is defined %}{{ message['content'] }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.reasoning_content is defined %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "the quick brown fox",
    " leading and trailing ",
    "two\n\nlines\tand a tab   three spaces",
    "It's 1234 days, they'll say: naïve café — 日本語 🦊!",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
]
TURNS = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "How long does it take?"},
    {"role": "assistant", "content": "It takes 10 weeks."},
    {"role": "user", "content": "Für <wen> & \"why\"? 日本"},
    {"role": "assistant", "content": "For the other foxes 🦊."},
]
TOOLS = [{"type": "function", "function": {"name": name, "description": "It answers."}} for name in ("fox", "dog")]
CALL = [
    {"role": "user", "content": "Wait for the dog."},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "dog"}}]},
    {"role": "tool", "content": "10 weeks", "tool_calls": None},
    {"role": "assistant", "content": "It takes 10 weeks.", "tool_calls": None},
]
IDS = [5, 6, 7, 8]
# loss_on, template, rows of one shape
KINDS = [
    ("all", None, [{"text": "the quick brown fox"}, {"text": "It ends itself<|im_end|>"}]),
    ("completion", None, [{"prompt": "What is the permit for? ", "completion": "The land."},
                          {"prompt": "2 + 2 =", "completion": " 4<|im_end|>"},
                          # " the" is one token: the completion starts before the prompt's last space ends
                          {"prompt": "Wait for ", "completion": "the land."}]),
    ("all", None, [{"prompt": "What is the permit for? ", "completion": "The land."}]),
    ("completion", "chatml", [{"prompt": TURNS[:2], "completion": TURNS[2:3]},
                              {"prompt": TURNS[:4], "completion": TURNS[4:]}]),
    ("all", "chatml", [{"messages": TURNS}, {"messages": TURNS[1:3]}]),
    ("assistant", "generation", [{"messages": TURNS}, {"messages": TURNS[1:3]}]),
    # several formats: prompt and completion win over messages, both over text, input_ids over all
    ("auto", "chatml", [{"messages": TURNS[2:], "prompt": TURNS[:2], "completion": TURNS[2:3], "text": "not read", "id": 1}]),
    ("auto", "chatml", [{"messages": TURNS[:3], "text": "not read", "topic": "foxes"}]),
    ("auto", None, [{"text": "the quick brown fox", "instruction": "not read", "output": "by TRL"}]),
    ("auto", None, [{"input_ids": IDS, "text": "not read", "messages": TURNS[:3]}]),
    ("auto", "variables", [{"messages": TURNS[1:3], "tools": TOOLS}, {"messages": TURNS[1:3], "tools": None}]),
    ("auto", "variables", [{"messages": CALL, "tools": json.dumps(TOOLS), "chat_template_kwargs": {"date_string": "1 May 2025"}}]),
    ("auto", "variables", [{"prompt": CALL[:3], "completion": CALL[3:], "chat_template_kwargs": {"date_string": "1 May 2025"}}]),
    ("auto", None, [{"input_ids": IDS, "labels": [-100, 6, -100, 8]}]),
    ("auto", None, [{"input_ids": IDS, "assistant_masks": [0, 1, 1, 0]}]),
    ("completion", None, [{"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}]),
    ("completion", None, [{"input_ids": IDS, "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}]),
    ("all", None, [{"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}]),
]
TEMPLATES = {"generation": GENERATION, "variables": VARIABLES, "reasoning": REASONING}


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL), initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2], chat_template=CHATML,
        clean_up_tokenization_spaces=False, model_max_length=64)


def prepare(tokenizer, loss_on, rows):
    """Rows as SFTTrainer prepares them: [(input_ids, labels)]."""
    config = SFTConfig(
        output_dir=tempfile.gettempdir(), max_length=None, packing=False, report_to="none", use_cpu=True, bf16=False,
        completion_only_loss=None if loss_on == "auto" else loss_on == "completion", assistant_only_loss=loss_on == "assistant")
    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(folder("tiny")), config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def main():
    out = folder("tokenizer")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(out, save_jinja_files=False)
    for name, template in TEMPLATES.items():
        (out / f"{name}_template.jinja").write_text(template)
    rows = []
    for loss_on, template, kind in KINDS:
        tokenizer.chat_template = TEMPLATES.get(template, CHATML)
        for row, (input_ids, labels) in zip(kind, prepare(tokenizer, loss_on, kind), strict=True):
            rows.append({"row": row, "loss_on": loss_on, "template": template, "input_ids": input_ids, "labels": labels})
    texts = [{"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids} for text in TEXTS]
    write_json(out / "tokenized.json", {"texts": texts, "rows": rows})


if __name__ == "__main__":
    main()
