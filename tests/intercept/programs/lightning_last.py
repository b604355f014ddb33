"""Lightning with `ckpt_path="last"`."""

import logging
import os
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from notes import note, note_end

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def on_train_start(self):
        note("RESUMED", self.global_step)


class Notes(ModelCheckpoint):
    def _save_last_checkpoint(self, trainer, monitor_candidates):
        super()._save_last_checkpoint(trainer, monitor_candidates)
        note("ACK", trainer.global_step)


torch.manual_seed(0)
epochs = 4 if "RESUME_ONLY" in os.environ else 3
trainer = lightning.Trainer(
    max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[Notes(dirpath="ckpt", save_last=True, save_top_k=1, every_n_epochs=1)],
)  # fmt: skip
model = Model()
trainer.fit(model, torch.utils.data.DataLoader(torch.randn(4, 8), batch_size=4), ckpt_path="last")
note_end(model.state_dict())
