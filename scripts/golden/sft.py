"""tests/golden/sft/: steps of TRL's SFTTrainer from raw rows in each form, in f32 on the model `tiny`.

  NAME.jsonl    the rows of one form
  losses.json   {"recipe": the keys of the runs, "forms": {NAME: {loss_on, template, losses}}}

Every run starts from the adapter of `qlora_steps/start`, takes the rows in their order, and has steps of four rows, so that the
last step of an epoch has two. `template` names a chat template of `tokenizer/`, or is null for the one of the tokenizer. A loss
is the mean over the target tokens of a step.
"""

import json
import shutil
import tempfile

import torch
from common import folder, write_json
from datasets import Dataset
from peft import PeftModel
from tokenizer import CALL, CHATML, TEMPLATES, TOOLS
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

STEPS, ROWS_OF_A_STEP, ROWS = 100, 4, 10
RECIPE = {"learning_rate": 2e-3, "lr_scheduler_type": "linear", "warmup_steps": 10, "max_steps": STEPS, "weight_decay": 0.0,
          "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
          "per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_OF_A_STEP}
WORDS = ("the quick brown fox jumps over the lazy dog while the other foxes wait for an answer and the permit is for building on "
         "the land that there is").split()


def words(row, n):
    """Some words, other ones for each row."""
    return " ".join(WORDS[(7 * row + i) % len(WORDS)] for i in range(n))


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def turns(row, names=("role", "content")):
    role, content = names
    said = [("system", "You are helpful."), ("user", words(row, 3 + row)), ("assistant", words(row + 1, 5)),
            ("user", words(row + 2, 2)), ("assistant", words(row + 3, 2 + row % 4))]
    return [{role: who, content: what} for who, what in said[row % 2:]]


def call(row):
    return [message("user", words(row, 4)), CALL[1] | {"content": ""}, message("tool", f"{row} weeks"),
            message("assistant", words(row, 3 + row))]


def thought(row):
    return [message("user", words(row, 4)), message("assistant", words(row, 3), reasoning_content=words(row + 5, 2 + row))]


def ids(row):
    return [(11 * row + 5 * i) % 250 for i in range(6 + row)]


# rows of each form, what counts, and the template
FORMS = {
    "text": (lambda row: {"text": words(row, 5 + row)}, "auto", None),
    "prompt_completion": (lambda row: {"prompt": words(row, 3) + " ", "completion": words(row + 1, 3 + row)}, "auto", None),
    "messages": (lambda row: {"messages": turns(row)}, "auto", None),
    "conversational_prompt": (lambda row: {"prompt": turns(row)[:-1], "completion": turns(row)[-1:]}, "auto", None),
    "sharegpt": (lambda row: {"conversations": turns(row, ("from", "value"))}, "auto", None),
    "assistant": (lambda row: {"messages": turns(row)}, "assistant", "generation"),
    "tools": (lambda row: {"messages": call(row), "tools": json.dumps(TOOLS)}, "auto", "variables"),
    "reasoning": (lambda row: {"prompt": thought(row)[:1], "completion": thought(row)[1:]}, "auto", "reasoning"),
    "variables": (lambda row: {"messages": turns(row), "chat_template_kwargs": {"date_string": f"{row + 1} May 2025"}}, "auto",
                  "variables"),
    "labels": (lambda row: {"input_ids": ids(row), "labels": [-100] * (2 + row % 3) + ids(row)[2 + row % 3:]}, "auto", None),
    "assistant_masks": (lambda row: {"input_ids": ids(row), "assistant_masks": [i % 3 % 2 for i in range(len(ids(row)))]},
                        "auto", None),
    "completion_mask": (lambda row: {"input_ids": ids(row), "completion_mask": [int(i > 2) for i in range(len(ids(row)))]},
                        "completion", None),
}


class Losses(TrainerCallback):
    """Adds up the losses of the micro-batches of each step."""

    def __init__(self):
        self.steps, self.sum = [], 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.sum)
        self.sum = 0.0


class Trainer(SFTTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.sum += loss.double().item()
        return loss


def train(tokenizer, loss_on, rows):
    """The loss of each step."""
    base = LlamaForCausalLM.from_pretrained(folder("tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder("qlora_steps/start"), is_trainable=True)
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, max_length=None, packing=False, report_to="none", use_cpu=True, bf16=False, fp16=False,
            completion_only_loss=None if loss_on in ("auto", "assistant") else loss_on == "completion",
            assistant_only_loss=loss_on == "assistant", train_sampling_strategy="sequential", gradient_checkpointing=False,
            save_strategy="no", logging_steps=STEPS, optim="adamw_torch", **RECIPE)
        losses = Losses()
        trainer = Trainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[losses])
        trainer.losses = losses
        trainer.train()
    assert len(losses.steps) == STEPS, len(losses.steps)
    return losses.steps


def main():
    out = folder("sft")
    shutil.rmtree(out)
    out.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(folder("tokenizer"))
    forms = {}
    for name, (form, loss_on, template) in FORMS.items():
        rows = [form(row) for row in range(ROWS)]
        tokenizer.chat_template = TEMPLATES.get(template, CHATML)
        forms[name] = {"loss_on": loss_on, "template": template, "losses": train(tokenizer, loss_on, rows)}
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write_json(out / "losses.json", {"recipe": RECIPE, "forms": forms})


if __name__ == "__main__":
    main()
