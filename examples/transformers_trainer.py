"""Hugging Face's Trainer on a tiny GPT-2, made from its configuration: killed at any moment, it goes on by itself.

torchrun --nproc-per-node 2 examples/transformers_trainer.py --directory runs/gpt2 --steps 12
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from lastgood.integrations.transformers import LastGoodTrainer


def train(run: str, steps: int, every: int, callbacks: Any = ()) -> Any:
    """Train to step `steps` from wherever the run is; returns the trainer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    words = torch.randint(16, (20, 8), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=run,
        max_steps=steps,
        save_steps=every,
        save_total_limit=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row, "labels": row} for row in words]
    trainer = LastGoodTrainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3)
    options = parser.parse_args()
    trainer = train(options.directory, options.steps, options.every)
    total = sum(float(p.double().sum()) for p in trainer.model.parameters())
    print(f"done at step {trainer.state.global_step}: the weights add up to {total!r}")


if __name__ == "__main__":
    main()
