"""Batch Renormalization (S. Ioffe, 2017) for PyTorch: exact, drop-in for `torch.nn.BatchNorm`."""

from . import reference
from .calibrate import average_sigma, recalibrate
from .convert import convert_batchnorm, to_batchnorm
from .distributed import keep_in_sync, sync_running_stats
from .functional import batch_renorm
from .modules import (
    BatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    LazyBatchRenorm1d,
    LazyBatchRenorm2d,
    LazyBatchRenorm3d,
    set_step,
)
from .samplers import LabelGroupBatchSampler
from .schedule import ClipSchedule

__version__ = "0.1.0"

__all__ = [
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ClipSchedule",
    "LabelGroupBatchSampler",
    "LazyBatchRenorm1d",
    "LazyBatchRenorm2d",
    "LazyBatchRenorm3d",
    "average_sigma",
    "batch_renorm",
    "convert_batchnorm",
    "keep_in_sync",
    "recalibrate",
    "reference",
    "set_step",
    "sync_running_stats",
    "to_batchnorm",
]
