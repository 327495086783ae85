"""Batch Renormalization (S. Ioffe, 2017) for PyTorch: exact, drop-in for `torch.nn.BatchNorm`."""

from . import reference
from .calibrate import average_sigma, recalibrate
from .convert import convert_batchnorm, to_batchnorm
from .distributed import keep_in_sync, sync_running_stats
from .export import fold_batchnorm
from .functional import batch_renorm
from .importers import convert_renorm, import_state_dict
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
from .monitor import RenormMonitor
from .samplers import LabelGroupBatchSampler
from .schedule import ClipSchedule, MomentumSchedule

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
    "MomentumSchedule",
    "RenormMonitor",
    "average_sigma",
    "batch_renorm",
    "convert_batchnorm",
    "convert_renorm",
    "fold_batchnorm",
    "import_state_dict",
    "keep_in_sync",
    "recalibrate",
    "reference",
    "set_step",
    "sync_running_stats",
    "to_batchnorm",
]
