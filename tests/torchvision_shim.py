"""torchvision beside a torch without CUDA: its published builds do not import there, for want of two operators.

allow_torchvision()                                # in a test, before anything imports torchvision
python -c "import torchvision_shim; ..."           # in a process of one's own: importing this module is enough
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
# A declaration lasts as long as its library.
_declared: list[torch.library.Library] = []


def allow_torchvision() -> None:
    """Make `import torchvision` work, in this process and in all that it starts: workers of loaders, command lines."""
    _declare()
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if not any((Path(path) / "sitecustomize.py").exists() and "torchvision" in path for path in paths):
        # Python runs a module of this name at its start.
        directory = tempfile.mkdtemp(prefix="torchvision-shim-")
        atexit.register(_remove, directory, os.getpid())
        (Path(directory) / "sitecustomize.py").write_text(
            f"import sys\nsys.path.append({str(_HERE)!r})\nimport torchvision_shim\n", encoding="utf-8"
        )
        os.environ["PYTHONPATH"] = os.pathsep.join([directory, *filter(None, paths)])


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # and no fork of it
        shutil.rmtree(directory, ignore_errors=True)


def _declare() -> None:
    if _declared or "torchvision" in sys.modules or torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


_declare()
