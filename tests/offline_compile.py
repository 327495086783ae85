"""The kernels of `backends.triton` compiled for sm_90 without a GPU: widths of loads and stores, registers, spills.

`python tests/offline_compile.py` prints a line for each kernel and fails where a promise does not hold.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchrenorm.backends import triton as passes
from batchrenorm.backends import triton_kernels as kernels

VECTORS = {"running_mean", "running_var", "vectors", "partials", "totals"}
NUMBERS = {"alpha": "fp32", "window": "fp32", "r_max": "fp32", "d_max": "fp32", "eps": "fp32"}
FLAGS = {"FALLING": False, "RELU": True, "REVERSED": True}
ABSENT = {"residual", "masked"}


def compiled(name: str, dtype: str, p: passes._Passes, absent: set[str] = ABSENT) -> triton.compiler.CompiledKernel:
    function = getattr(kernels, name)
    signature, constants, aligned = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in FLAGS:
            signature[argument], constants[(i,)] = "constexpr", FLAGS[argument]
        elif argument in ("ROWS", "UNIT", "WIDE", "BLOCK_M", "BLOCK_C"):
            signature[argument], constants[(i,)] = "constexpr", getattr(p, argument)
        elif argument in absent or (argument == "y" and name in ("sums", "gradient", "backward_in_one")):
            signature[argument], constants[(i,)] = "constexpr", None
        elif argument in NUMBERS:
            signature[argument] = NUMBERS[argument]
        elif argument in passes._Passes._fields or argument in ("warmup", "d_full", "r_full"):
            signature[argument] = "i32"
        else:
            kind = "i64" if argument == "step" else "i32" if argument == "counters" else "fp32"
            signature[argument] = f"*{dtype if argument in ('x', 'y', 'dx', 'dy', 'residual', 'masked') else kind}"
            aligned[(i,)] = [["tt.divisibility", 16]]  # as the JIT finds it in any tensor of torch
    source = ASTSource(function, signature, constants, aligned)
    warps = passes.warps(name, p.BLOCK_M * p.BLOCK_C)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def resources(kernel: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.findall(rf"{key}:(\d+)", out.stdout)[-1]) for key in ("REG", "STACK"))
    return registers, stack


def widths(ptx: str, what: str) -> list[int]:
    """Bytes of each access to global memory, `what` being ld or st."""
    found = re.findall(rf"{what}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted(int(n or 1) * int(bits) // 8 for n, bits in found)


def main() -> None:
    failed = []
    large = {"rows": (256, 256, 784, True), "planes": (256, 256, 784, False), "planes of 196": (256, 256, 196, False)}
    small = {"rows": (4, 256, 49, True), "planes": (4, 256, 784, False)}
    for dtype in ("bf16", "fp32"):
        cases = [
            (name, label, shape)
            for name in ("statistics", "affine", "sums", "gradient")
            for label, shape in large.items()
        ]
        cases += [
            (name, label, shape) for name in ("forward_in_one", "backward_in_one") for label, shape in small.items()
        ]
        for name, label, (N, C, S, rows) in cases:
            p = passes._divided(N, C, S, N, rows, passes.TILE, passes.CHANNELS, passes.PROGRAMS)
            p = p.slab() or p if "in_one" in name else p
            kernel = compiled(name, dtype, p)
            registers, stack = resources(kernel)
            loads, stores = widths(kernel.asm["ptx"], "ld"), widths(kernel.asm["ptx"], "st")
            whole = 8 if label == "planes of 196" and dtype == "bf16" else 16
            print(f"{name:16} {dtype} {label:13} tile {p.BLOCK_M} x {p.BLOCK_C}: {registers} registers, stack {stack}, "
                  f"loads of {whole} bytes: {loads.count(whole)}, stores: {stores.count(whole)}")  # fmt: skip
            elements = p.BLOCK_M * p.BLOCK_C // (32 * passes.warps(name, p.BLOCK_M * p.BLOCK_C))
            tensors = 1 if name in ("statistics", "affine", "forward_in_one") else 2
            wanted = tensors * elements * (2 if dtype == "bf16" else 4) // whole
            if stack or loads.count(whole) < wanted:
                failed.append(f"{name} {dtype} {label}: {stack} bytes spilled, loads {loads}")
            if name not in ("statistics", "sums") and stores.count(whole) < wanted // tensors:
                failed.append(f"{name} {dtype} {label}: stores {stores}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
