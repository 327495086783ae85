"""Compiles the package's C when the package is built; `python hatch_build.py` does it in place.

Without a C compiler, or if it fails, the package installs all the same and is pure Python.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # in place, outside of a build
    BuildHookInterface = object

SOURCES = ("backends/native.c", "correction.c", "moving.c")
# No contraction: results do not depend on whether the processor can multiply and add at once.
FLAGS = (
    "-O3",
    "-std=c11",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        try:
            compile_in(Path(self.root) / "src" / "batchrenorm")
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"batchrenorm will be pure Python, slower on the CPU: {error}")
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_in(package: Path, more: Sequence[str] = ()) -> None:
    """Make the shared libraries that `batchrenorm.library` loads, all of them or none.

    Args:
        package: directory of the package.
        more: flags after the usual ones.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it failed.
    """
    variants = {"default": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants["avx2"] = ["-mavx2", "-mf16c"]
    libraries = {package / f"native_{name}.so": flags for name, flags in variants.items()}
    for library in libraries:
        library.unlink(missing_ok=True)  # none rather than one of older sources
    named = os.environ.get("CC")
    compiler = shlex.split(named) if named else [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    try:
        for library, flags in libraries.items():
            sources = [str(package / source) for source in SOURCES]
            subprocess.run([*compiler, *FLAGS, *flags, *more, *sources, "-o", str(library), "-lm"], check=True)
    except (OSError, subprocess.CalledProcessError):
        for library in libraries:
            library.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    compile_in(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "src" / "batchrenorm", sys.argv[2:])
