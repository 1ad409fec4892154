"""Lightning strategies of this package; importing it registers them for ``trainer.strategy``."""

from ibro_lightning.strategies.fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
