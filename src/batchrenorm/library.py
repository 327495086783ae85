"""The package's own C (`backends/native.c`, `correction.c`), if it was built when the package was installed."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch

PASS = struct.Struct("13P8qd")
"""`struct pass` of native.c, as far as the caller fills it."""
STEP = struct.Struct("5P3q4d")
"""`struct step` of correction.c."""


def _load() -> ctypes.CDLL | None:
    capability = torch.backends.cpu.get_cpu_capability()
    variant = "avx2" if capability.startswith("AVX") else "default"
    path = Path(__file__).parent / f"native_{variant}.so"
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name in ("moments", "affine", "backward", "gradient", "move"):
            getattr(library, f"brn_{name}").argtypes = [ctypes.c_char_p]
        library.brn_forward.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p]
        sizes = library.brn_size_of_pass(), library.brn_size_of_step()
    except (OSError, AttributeError):  # built for another machine, or from other sources
        return None
    # Built from other sources it would also read something else where these are packed.
    return library if sizes == (PASS.size, STEP.size) else None


def _openmp() -> tuple[int, int]:
    """Addresses of OpenMP's entry and of what numbers its threads, in the runtime that torch has loaded, or zeros."""
    try:
        runtime = ctypes.CDLL(None)
        entries = runtime.GOMP_parallel, runtime.omp_get_thread_num
    except (AttributeError, OSError, TypeError):
        return 0, 0
    parallel, thread = (ctypes.cast(entry, ctypes.c_void_p).value or 0 for entry in entries)
    return parallel, thread


LIBRARY = _load()
"""None where there was no C compiler: everything has a form in torch operators."""
PARALLEL = (0, 0) if LIBRARY is None else _openmp()
CORRECT = 0 if LIBRARY is None else ctypes.cast(LIBRARY.brn_correct, ctypes.c_void_p).value or 0
"""Address of the function that `brn_forward` calls between the passes."""
