"""For all tests: seeds, one thread, and uninitialised memory that shows."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import processes
import pytest
import torch
from torch.utils._device import _device_constructors

from batchrenorm.backends import aten, native
from batchrenorm.library import LIBRARY

hypothesis.settings.register_profile(
    "ci",
    deadline=None,  # the first example of a test compiles and imports
    derandomize=True,
    database=None,
    max_examples=40,
    # The autouse fixtures below need no reset between examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("ci"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# torch keeps a list of its allocating functions, made once and by identity; made after they are replaced below, and a
# `torch.device` as a context would not know the real ones.
_device_constructors()

# Where there is no GPU, Triton's kernels run in its interpreter; it has to know before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# pytest-xdist has a process for each core.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="of tests/test_device.py (default: cuda, where there is one)")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool() -> Iterator[processes.Pool]:
    """Real processes, started by the first test that wants some."""
    pool = processes.Pool()
    yield pool
    pool.end()


NO_LIBRARY = "the package was installed without a C compiler"


@pytest.fixture(params=["native", "aten-small", "aten-large"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `backend=None` may come to on the CPU: C or, where there is none, ATen in its ways for small and large x."""
    if request.param == "native":
        if LIBRARY is None:
            pytest.skip(NO_LIBRARY)
    else:
        monkeypatch.setattr(native, "LIBRARY", None)
    if request.param == "aten-large":
        monkeypatch.setattr(aten, "_SMALL", -1)
    return request.param


@pytest.fixture(params=["native", "aten-small", "aten-large", "decomposed"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every computation that there is; the value is an argument of `batch_renorm`."""
    name, _, size = request.param.partition("-")
    if name == "native" and LIBRARY is None:
        pytest.skip(NO_LIBRARY)
    if size == "large":
        monkeypatch.setattr(aten, "_SMALL", -1)
    return name


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        out = allocate(*args, **kwargs)
        # A compiler that traces this function cannot look at frames; its own buffers are not ours to fill.
        if torch.compiler.is_compiling():
            return out
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("batchrenorm"):
            return out
        with torch.no_grad():
            if out.is_floating_point() or out.is_complex():
                return out.fill_(torch.nan)
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

    return wrapper


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What batchrenorm allocates without writing is NaN, and not the zeros that a fresh process mostly finds there."""
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
