"""The programs in examples/, at toy size: they run as they stand, and do what they say."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torchvision_shim import allow_torchvision

EXAMPLES = Path(__file__).parent.parent / "examples"
# Warnings of other packages, while they are imported and used, are not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Main = Callable[[Sequence[str]], dict[str, float]]


def main_of(name: str, *needs: str) -> Main:
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name} needs {package}, of the extra 'examples'")
    allow_torchvision()
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("norm", ["bn", "frozen", "brn"])
def test_finetune_resnet(norm: str) -> None:
    found = main_of("finetune_resnet", "torchvision", "sklearn")(
        ["--norm", norm, "--steps", "2", "--test-images", "10"]
    )
    assert math.isfinite(found["loss"])


def test_metric_learning() -> None:
    found = main_of("metric_learning", "pytorch_metric_learning", "sklearn")(["--steps", "100"])
    assert found["seen"] > 60  # of five labels: 20 by chance
    assert found["unseen"] > 30


def test_rl_critic() -> None:
    """Each training step is one forward of the critic that counts; the actor's are not training."""
    found = main_of("rl_critic", "stable_baselines3", "gymnasium")(["--steps", "80", "--episodes", "1"])
    assert found["forwards"] == 60
    assert -2500 < found["reward"] < 0


@pytest.mark.parametrize("norm", ["bn", "brn"])
def test_segmentation(norm: str) -> None:
    """By averages there are no seams; with each tile's statistics there are."""
    found = main_of("segmentation", "sklearn")(["--norm", norm, "--steps", "30"])
    assert found["difference"] < 1e-3 < 0.1 < found["difference, tiles' statistics"]
    assert found["seam"] < 1.5 < found["seam, tiles' statistics"]


def test_continual() -> None:
    assert main_of("continual", "sklearn")(["--steps", "40"])["accuracy"] > 40


@pytest.mark.parametrize("name", ["lightning_accumulation", "hf_trainer"])
def test_steps_of_the_schedule_are_the_optimisers(name: str) -> None:
    needs = {"lightning_accumulation": ("lightning",), "hf_trainer": ("transformers", "accelerate")}[name]
    found = main_of(name, "sklearn", *needs)(["--steps", "40", "--accumulate", "3"])
    assert found["step"] == 40  # and not 120 forwards
    assert found["accuracy"] > 50


def test_commands_that_the_examples_name_are_their_own() -> None:
    for path in EXAMPLES.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        commands = re.findall(r"^    python (examples/\S+)(.*)$", source, re.MULTILINE)
        assert commands, path
        for script, options in commands:
            assert script == f"examples/{path.name}"
            assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", options))
