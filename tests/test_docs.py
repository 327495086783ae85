"""The examples in the docstrings and in the docs are true."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import batchrenorm as brn

# The experiments have tests and dependencies of their own; kernels have no examples.
KERNELS = ("batchrenorm.backends.triton_kernels", "batchrenorm.correction_triton")
MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(brn.__path__, "batchrenorm.")
    # native_*.so is a library and no module of Python's.
    if not info.name.startswith(("batchrenorm.paper", "batchrenorm.native_", *KERNELS))
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


ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```python(?: title=\"needs ([\w ,]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_code_of_the_docs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other in one namespace, are run; what they assert holds."""
    text = page.read_text(encoding="utf-8")
    blocks = _BLOCK.findall(text)
    assert len(blocks) == len(re.findall(r"^ *```python", text, re.MULTILINE))  # none is passed over
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    skipped = []
    for needs, block in blocks:
        missing = [need for need in needs.split(", ") if need and importlib.util.find_spec(need) is None]
        if missing:
            skipped += [f"{page.name} needs {name}" for name in missing]
            continue
        exec(compile(block, f"{page.name}: {block[:60]!r}", "exec"), names)
    if skipped:
        pytest.skip("; ".join(skipped))
