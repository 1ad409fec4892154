"""The policy update, without Lightning: scoring, loss, optimizer steps, diagnostics; see ``docs/update.md``."""

from ibro_lightning.update.correction import SamplerCorrection
from ibro_lightning.update.loop import Loop, PlainLoop
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.micro_batches import TokenBudget
from ibro_lightning.update.reference import ReferenceKL
from ibro_lightning.update.scoring import Scorer
from ibro_lightning.update.surrogates import CISPOLoss, DPPOLoss, GMPOLoss, GSPOLoss, SAPOLoss
from ibro_lightning.update.updater import Updater
from ibro_lightning.update.value_loss import ValueLoss

__all__ = [
    "CISPOLoss",
    "DPPOLoss",
    "GMPOLoss",
    "GSPOLoss",
    "Loop",
    "PlainLoop",
    "PolicyLoss",
    "ReferenceKL",
    "SAPOLoss",
    "SamplerCorrection",
    "Scorer",
    "TokenBudget",
    "Updater",
    "ValueLoss",
]
