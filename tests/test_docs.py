"""The examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

import batchrenorm as brn

# The experiments have tests and dependencies of their own.
MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(brn.__path__, "batchrenorm.")
    # native_*.so is a library and no module of Python's.
    if not info.name.startswith(("batchrenorm.paper", "batchrenorm.native_"))
]


@pytest.mark.parametrize("module", [brn, *MODULES], ids=lambda m: m.__name__)
def test_examples(module: ModuleType) -> None:
    names = {"torch": torch, "nn": torch.nn, "batchrenorm": brn, "brn": brn}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(brn.__all__))
def test_every_public_name_has_a_docstring(name: str) -> None:
    thing = getattr(brn, name)
    assert thing.__doc__
    if isinstance(thing, ModuleType):
        return
    members = vars(thing).items() if isinstance(thing, type) else []
    public = [member for key, member in members if not key.startswith("_") and callable(member)]
    inherited = ("forward", "reset_parameters", "initialize_parameters", "extra_repr", "cls_to_become")
    assert all(m.__doc__ for m in public if m.__name__ not in inherited and not isinstance(m, type))


@pytest.mark.parametrize(
    "name", ["BatchRenorm", "ClipSchedule", "LabelGroupBatchSampler", "batch_renorm", "convert_batchnorm", "set_step"]
)
def test_every_main_entry_has_an_example(name: str) -> None:
    thing = getattr(brn, name)
    assert ">>>" in thing.__doc__
    assert "Args:" in thing.__doc__
