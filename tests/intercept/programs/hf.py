"""A Hugging Face Trainer as the examples have it, on a tiny GPT-2 made from its configuration."""

import os

import torch
from notes import note, note_end
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class Loop(Trainer):
    def _save_checkpoint(self, *args, **kwargs):
        result = super()._save_checkpoint(*args, **kwargs)
        torch.distributed.barrier() if torch.distributed.is_initialized() else None
        note("ACK", self.state.global_step)
        return result


torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
)
data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
arguments = TrainingArguments(
    output_dir="out", max_steps=3, save_steps=1, save_total_limit=int(os.environ.get("LIMIT", "2")),
    per_device_train_batch_size=1, report_to=[],
    use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    ddp_backend="gloo" if "RANK" in os.environ else None,
)  # fmt: skip
trainer = Loop(model=model, args=arguments, train_dataset=data)
last = get_last_checkpoint("out") if os.path.isdir("out") else None
if "RESUME_ONLY" in os.environ:
    arguments.max_steps = 4
    arguments.save_strategy = "no"
trainer.train(resume_from_checkpoint=last)
step = int(last.rsplit("-", 1)[1]) if last else 0
assert not os.environ.get("RESUME_ONLY") or trainer.state.global_step == 4
note("RESUMED", step)
if os.environ.get("RANK", "0") == "0":
    note_end(model.state_dict())
