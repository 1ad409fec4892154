"""Checkpoints as folders to which every rank adds its shards, for strategies whose weights are spread over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from ibro_lightning.checkpoints import load_shards, read_checkpoint, save_shards


class ShardedCheckpoints(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with checkpoints that any strategy reads.

    Lightning keys optimizer states by the parameter's name within the whole module; ours, and those of any other
    strategy, are keyed by its position in its own optimizer, so that two optimizers, and one without a state yet, work.
    """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards, not copied: they are written at once."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        if self._save_distributed_checkpoint:
            save_shards(Path(self.broadcast(filepath)), checkpoint, is_first=self.is_global_zero)
        elif self.is_global_zero:  # all is gathered there already
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a folder, weights and optimizers are loaded here and now; of a file, by the methods for them."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return read_checkpoint(path, mmap=True)
        assert self.lightning_module is not None
        optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in self.optimizers]
        return {**load_shards(path, self.lightning_module, optimizers), "optimizer_states": []}
