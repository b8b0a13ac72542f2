"""tests/golden/qlora_steps/: six QLoRA steps of PEFT on `tiny-bnb4-nested`, in f32.

  start/                    the adapter before the first step, as PEFT saves it; its B is not zero
  final/                    the adapter after the last step
  grads.safetensors         the gradient of every LoRA matrix at the first step, before clipping, names as in the adapter
  steps.json                the recipe; per step loss, gradient norm before clipping, learning rate, num_target_tokens
  rows.jsonl                the rows in order, ROWS per micro-batch, padded on the right to the longest of their micro-batch

A step's loss is the sum over its target tokens (labels that are not -100, the first of a row left out: nothing predicts it)
divided by their number, over both micro-batches. Weight decay acts on every LoRA matrix.
"""

import json

import torch
from common import folder, normal, write_json, write_tensors
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

STEPS, MICRO_BATCHES, ROWS = 6, 2, 2
RECIPE = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": STEPS, "weight_decay": 0.1,
          "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
          "max_grad_norm": 4.5,  # some steps are clipped, some are not
         
          "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": MICRO_BATCHES}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB_SIZE, PAD = 320, 319


def micro_batch(generator):
    """Dict of i64 [ROWS, longest]: rows of unequal length, a masked prompt in some, one masked gap."""
    lengths = torch.randint(9, 41, (ROWS,), generator=generator).tolist()
    shape = (ROWS, max(lengths))
    batch = {"input_ids": torch.full(shape, PAD), "labels": torch.full(shape, -100),
             "attention_mask": torch.zeros(shape, dtype=torch.int64)}
    for row, length in enumerate(lengths):
        ids = torch.randint(0, 256, (length,), generator=generator)
        prompt = int(torch.randint(0, length // 2, (1,), generator=generator)) * (row % 2)
        batch["input_ids"][row, :length] = ids
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, prompt:length] = ids[prompt:]
        batch["labels"][row, length // 2 + 1] = -100
    return batch


def load_model():
    model = AutoModelForCausalLM.from_pretrained(folder("tiny-bnb4-nested"), dtype=torch.float32, device_map="cpu")
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM",
                        base_model_name_or_path="tiny-bnb4-nested")
    model = get_peft_model(model, config)
    # Random A as well: what PEFT's initialization draws depends on its version.
    for idx, (name, parameter) in enumerate(sorted(trainable(model).items())):
        std = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
        parameter.data.copy_(normal(900 + idx, *parameter.shape, std=std))
    # Eval mode would repack the codes for AVX512_BF16 and round absmax to bf16.
    return model.train()


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model, name):
    out = folder(f"qlora_steps/{name}")
    model.peft_config["default"].base_model_name_or_path = "tiny-bnb4-nested"
    model.save_pretrained(out)
    (out / "README.md").unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set in PEFT: its order is another each time
    write_json(out / "adapter_config.json", config)


def num_targets(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def loss_sum(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB_SIZE), batch["labels"][:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def main():
    out = folder("qlora_steps")
    model = load_model()
    save_adapter(model, "start")
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=RECIPE["learning_rate"], betas=(RECIPE["adam_beta1"], RECIPE["adam_beta2"]),
        eps=RECIPE["adam_epsilon"], weight_decay=RECIPE["weight_decay"], foreach=False)
    scheduler = get_linear_schedule_with_warmup(optimizer, RECIPE["warmup_steps"], STEPS)
    generator = torch.Generator().manual_seed(1234)
    rows, steps = [], []
    for step in range(STEPS):
        batches = [micro_batch(generator) for _ in range(MICRO_BATCHES)]
        rows += [{key: batch[key][row].tolist() for key in batch} for batch in batches for row in range(ROWS)]
        targets = sum(map(num_targets, batches))
        loss = 0.0
        for batch in batches:
            part = loss_sum(model, batch)
            (part / targets).backward()
            loss += part.double().item()
        if step == 0:
            # get_peft_model_state_dict gives the names that PEFT writes to disk.
            grads = {name: parameter.grad for name, parameter in trainable(model).items()}
            write_tensors(out / "grads.safetensors", get_peft_model_state_dict(model, state_dict=grads))
        norm = torch.nn.utils.clip_grad_norm_(parameters, RECIPE["max_grad_norm"])
        steps.append({"step": step + 1, "loss": loss / targets, "grad_norm": norm.item(),
                      "learning_rate": scheduler.get_last_lr()[0], "num_target_tokens": targets})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert any(step["grad_norm"] > RECIPE["max_grad_norm"] for step in steps)
    assert any(step["grad_norm"] < RECIPE["max_grad_norm"] for step in steps)
    save_adapter(model, "final")
    write_json(out / "steps.json", {"recipe": RECIPE, "steps": steps})
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
