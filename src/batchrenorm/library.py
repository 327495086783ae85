"""The package's own C (`native.c`, `correction.c`, `moving.c`), if it was built when the package was installed."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch

PASS = struct.Struct("13P8qd")
"""`struct pass` of native.c, as far as the caller fills it."""
STEP = struct.Struct("5P3q4d")
"""`struct step` of correction.c."""
MOVING = struct.Struct("4P5q3d")
"""`struct moving` of moving.c."""


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
        addresses = ctypes.c_void_p, ctypes.c_void_p
        library.brn_backward_given.argtypes = [ctypes.c_char_p, ctypes.c_double, *addresses, ctypes.c_char_p]
        sizes = library.brn_size_of_pass(), library.brn_size_of_step(), library.brn_size_of_moving()
    except (OSError, AttributeError):  # built for another machine, or from other sources
        return None
    # Built from other sources it would also read something else where these are packed.
    return library if sizes == (PASS.size, STEP.size, MOVING.size) else None


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


def _address(name: str) -> int:
    return 0 if LIBRARY is None else ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value or 0


CORRECT = _address("brn_correct")
"""The function that `brn_forward` calls between the passes."""
GIVEN, MOVE_GRADIENT = _address("brn_given"), _address("brn_move_gradient")
"""Those that `brn_backward_given` calls between the passes and after them."""
