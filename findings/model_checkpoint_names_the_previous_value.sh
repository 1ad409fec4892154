#!/usr/bin/env bash
# lightning 2.6.6: ModelCheckpoint(monitor=..., every_n_train_steps=N) where N steps are an epoch that ends in a validation.
# Guess: the checkpoint of a step goes under the value that validation measured for it, or waits for that value.
# What happens: it is written before that validation, and goes under the value of the one before; the first one, for which
# there is no value, is not written at all. `best_model_path` names the file after the best one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
"$work/venv/bin/python" -W ignore - "$work" 2>/dev/null <<'PY'
import sys
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

folder = Path(sys.argv[1]) / "checkpoints"


class Walk(pl.LightningModule):
    """Its weight is 1, 2, 3 after epoch 1, 2, 3, and validation says so."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.log("val", self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


keeps = ModelCheckpoint(folder, "{step}-{val:.2f}", monitor="val", mode="max", save_top_k=-1, every_n_train_steps=4)
data = torch.utils.data.DataLoader(torch.zeros(4, 1))
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[keeps], **quiet).fit(Walk(), data, data)
print(f"lightning {lightning.__version__}")
found = {}
for path in sorted(folder.iterdir()):
    found[path.name] = torch.load(path, weights_only=True)["state_dict"]["weight"].item()
    print(f"{path.name}: the weight, and so the metric, is {found[path.name]:.2f}")
assert found == {"step=8-val=1.00.ckpt": 2.0, "step=12-val=2.00.ckpt": 3.0}, found
PY
echo "still so"
