"""tests/golden/schedules.json: the learning rate of each step of transformers' schedulers.

`schedules`: {name, kwargs, learning_rate, warmup_steps, num_steps, rates [num_steps]}, f64, as `get_scheduler` sets them.
`warmups`: {warmup_steps, num_steps, is}: what `TrainingArguments.get_warmup_steps` makes of a number or a fraction.
"""

from types import SimpleNamespace

import torch
from common import ROOT, write_json
from transformers import TrainingArguments, get_scheduler

STEPS = 23
# scheduler, its arguments, and the numbers of warm-up steps
CASES = [
    ("constant", {}, [0]),
    ("constant_with_warmup", {}, [0, 5]),
    ("linear", {}, [0, 5, 22]),
    ("cosine", {}, [0, 5, 22]),
    ("cosine", {"num_cycles": 1.7}, [3]),
    ("cosine_with_restarts", {}, [0, 4]),
    ("cosine_with_restarts", {"num_cycles": 3}, [0, 4]),
    ("polynomial", {}, [0, 4]),
    ("polynomial", {"power": 2.5, "lr_end": 3e-5}, [0, 4]),
    ("polynomial", {"power": 0.5}, [1]),
    ("inverse_sqrt", {}, [0, 4]),
    ("inverse_sqrt", {"timescale": 7}, [0, 4]),
    ("inverse_sqrt", {"timescale": 3}, [6]),
    ("cosine_with_min_lr", {"min_lr": 1.3e-5}, [0, 4]),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.2}, [4]),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}, [0, 1, 4]),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-6, "warmup_lr_rate": 0.2}, [0, 1, 4]),
    ("warmup_stable_decay", {"num_decay_steps": 6}, [0, 4]),
    ("warmup_stable_decay", {"num_decay_steps": 6, "num_stable_steps": 5, "min_lr_ratio": 0.1}, [4]),
    ("warmup_stable_decay", {"num_decay_steps": 9, "warmup_type": "cosine", "decay_type": "linear"}, [4]),
    ("warmup_stable_decay", {"num_decay_steps": 9, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "min_lr_ratio": 0.05}, [4]),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_cycles": 0.8}, [4]),
    ("warmup_stable_decay", {"num_decay_steps": 0}, [4]),
]
WARMUPS = [(0, 10), (3, 10), (0.1, 10), (0.03, 1), (0.03, 100), (0.21, 10), (0.5, 7), (1, 10)]


def rates(name, kwargs, learning_rate, warmup_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = get_scheduler(name, optimizer, warmup_steps, STEPS, scheduler_specific_kwargs=kwargs)
    found = []
    for _ in range(STEPS):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def main():
    schedules = [
        {"name": name, "kwargs": kwargs, "learning_rate": 2.3e-4, "warmup_steps": warmup_steps, "num_steps": STEPS,
         "rates": rates(name, kwargs, 2.3e-4, warmup_steps)}
        for name, kwargs, warmups in CASES for warmup_steps in warmups
    ]
    warmups = [
        {"warmup_steps": given, "num_steps": steps,
         "is": TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=given), steps)}
        for given, steps in WARMUPS
    ]
    write_json(ROOT / "schedules.json", {"schedules": schedules, "warmups": warmups})


if __name__ == "__main__":
    main()
