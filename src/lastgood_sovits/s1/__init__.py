"""Stage 1 of GPT-SoVITS: text to semantic codes."""

from lastgood_sovits.s1.batch import Batch, Codes, corrupt
from lastgood_sovits.s1.config import S1Config, read_config
from lastgood_sovits.s1.dataset import Clip, Dropped, S1Dataset, collate
from lastgood_sovits.s1.decode import generate
from lastgood_sovits.s1.model import Losses, Text2Semantic
from lastgood_sovits.s1.sampler import BucketBatchSampler
from lastgood_sovits.s1.scaled_adam import ScaledAdam
from lastgood_sovits.s1.schedule import LockedRate
from lastgood_sovits.s1.train import StepResult, TrainStep, make_optimizer

__all__ = [
    "Batch",
    "BucketBatchSampler",
    "Clip",
    "Codes",
    "Dropped",
    "LockedRate",
    "Losses",
    "S1Config",
    "S1Dataset",
    "ScaledAdam",
    "StepResult",
    "Text2Semantic",
    "TrainStep",
    "collate",
    "corrupt",
    "generate",
    "make_optimizer",
    "read_config",
]
