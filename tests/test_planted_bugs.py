"""Tests that cannot fail prove nothing: each bug below is planted into a copy of the library, and a test must fail.

Most are bugs of published implementations. A bug is a text of the source and what it is replaced by; when the source
moves on, the text is not found any more and this file says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from batchrenorm.library import LIBRARY

ROOT = Path(__file__).parent.parent


class Bug(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    test: str  # the test, or tests, that must fail


EXACT, IDENTITY, STATE = "test_exact.py::", "test_identities.py::", "test_state.py::"
NATIVE = "test_native.py::"
FUSED = "test_fused.py::"
REPLICAS, SHARED = "test_replicas.py::", "test_distributed.py::"
SHARDED = REPLICAS + "test_sharded_is_whole"
TRITON = "test_triton.py::"
SHAPES = EXACT + "test_shapes"
MOVING = "test_moving.py::"

BUGS = [
    Bug(
        "epsilon outside the root",
        "backends/aten.py",
        "(var + as_tensor(eps)).sqrt_()",
        "var.sqrt() + as_tensor(eps)",
        SHAPES,
    ),
    Bug(
        "epsilon twice in inference",
        "functional.py",
        "F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)",
        "F.batch_norm(x, running_mean, running_var + eps, weight, bias, False, 0.0, eps)",
        IDENTITY + "test_unclipped_layer_in_training_is_the_layer_in_inference",
    ),
    Bug(
        "Bessel's correction in the running variance",
        "correction.py",
        "torch.lerp(sigma, std, alpha).square_()",
        "torch.lerp(sigma, std * (8 / 7) ** 0.5, alpha).square_()",
        IDENTITY + "test_sigma_averages_the_standard_deviation",
    ),
    Bug(
        "average of the variance, not of the standard deviation",
        "correction.py",
        "torch.lerp(sigma, std, alpha).square_()",
        "torch.lerp(sigma * sigma, std * std, alpha)",
        IDENTITY + "test_sigma_averages_the_standard_deviation",
    ),
    Bug(
        "r and d from averages that have moved already",
        "correction.py",
        "    mu, var = running_mean, running_var\n",
        "    mu, var = torch.lerp(running_mean, mean, 0.01), running_var\n",
        IDENTITY + "test_unclipped_training_is_inference",
    ),
    Bug(
        "gradient through r and d",
        "functional.py",
        "(v.detach() if v.requires_grad else v for v in (mean, std))",
        "(v.clone() for v in (mean, std))",
        IDENTITY + "test_no_gradient_through_r_and_d",
    ),
    Bug(
        "r without its lower limit",
        "correction.py",
        ".clamp_(1 / r_max, r_max)",
        ".clamp_(max=r_max)",
        STATE + "test_limits_hold_for_ever",
    ),
    Bug(
        "d without its limits",
        "correction.py",
        ".clamp_(-d_max, d_max)",
        "",
        STATE + "test_limits_hold_for_ever",
    ),
    Bug(
        "a warm-up factor that goes on growing",
        "schedule.py",
        "fraction = min(max((step - start) / (end - start), 0.0), 1.0)",
        "fraction = max((step - start) / (end - start), 0.0)",
        STATE + "test_papers_schedule",
    ),
    Bug(
        "the schedule one step early",
        "modules.py",
        "self.clip(t if isinstance(self.clip, ClipSchedule) else step)",
        "self.clip(t + 1 if isinstance(self.clip, ClipSchedule) else step)",
        EXACT + "test_modules",
    ),
    Bug(
        "one r and d for all microbatches",
        "correction.py",
        "    r = (sigma_B / use.sigma)",
        "    sigma_B, mu_B = use.std.expand_as(sigma_B), use.mean.expand_as(mu_B)\n    r = (sigma_B / use.sigma)",
        EXACT + "test_microbatches",
    ),
    Bug(
        "the gradient of weight without d",
        "backends/aten.py",
        "gw = (gw * scale).addcmul_(gb, shift)",
        "gw = gw * scale",
        SHAPES,
    ),
    Bug(
        "variance as E[x²] - E[x]²",
        "backends/decomposed.py",
        "var, mean = torch.var_mean(x, dims, correction=0)",
        "mean = x.mean(dims); var = ((x * x).mean(dims) - mean * mean).clamp(min=0)",
        EXACT + "test_large_offset",
    ),
    Bug(
        "statistics of half input in half",
        "backends/aten.py",
        "torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)",
        "(v.float() for v in torch.batch_norm_update_stats(x, None, None, 0.0))",
        EXACT + "test_statistics_of_half_input_are_float32",
    ),
    Bug(
        "half in, float32 out",
        "backends/decomposed.py",
        "(y if activation is None else y.relu()).to(x.dtype)",
        "(y if activation is None else y.relu())",
        EXACT + "test_dtype_and_memory_format_are_the_inputs",
    ),
    Bug(
        "channels_last lost by microbatches",
        "backends/aten.py",
        "return y.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))",
        "return y",
        EXACT + "test_dtype_and_memory_format_are_the_inputs",
    ),
    Bug(
        "padding in the statistics",
        "backends/decomposed.py",
        "deviation = torch.where(mask, x - mean, 0)",
        "deviation = x - mean",
        EXACT + "test_masks",
    ),
    Bug(
        "an overflow in the averages",
        "correction.py",
        "math.isfinite(mean.dot(std).item())",
        "True",
        "test_errors.py::test_not_finite_shows_in_y_and_not_in_the_averages",
    ),
    Bug(
        "averages moved before the output is certain",
        "functional.py",
        "    _check_values_per_channel(x, size)\n",
        "    running_mean is None or running_mean.add_(1.0)\n    _check_values_per_channel(x, size)\n",
        "test_errors.py::test_bad_call",
    ),
    Bug(
        "recomputation with the averages of now",
        "correction.py",
        "if torch._C._current_graph_task_id() != -1:",
        "if False:",
        "test_recompute.py::test_checkpointing_changes_no_bit",
    ),
    Bug(
        "averages moved again by a recomputation",
        "correction.py",
        "        if use.repeated:\n            return r, d, own, use.sigma, _stay\n",
        "",
        "test_recompute.py::test_checkpointing_changes_no_bit",
    ),
    Bug(
        "only the last forward remembered",
        "correction.py",
        "PENDING_FORWARDS = 64",
        "PENDING_FORWARDS = 1",
        "test_recompute.py::test_checkpointing_changes_no_bit",
    ),
    Bug(
        "equal minibatches confused",
        "correction.py",
        "ranks = torch.tensor(_ranks(entries))",
        "ranks = torch.arange(len(entries))",
        "test_recompute.py::test_equal_inputs_forwarded_twice_are_told_apart",
    ),
    Bug(
        "a recomputation that repeats nothing goes unnoticed",
        "correction.py",
        "_TOLERANCE = 2e-3",
        "_TOLERANCE = math.inf",
        "test_recompute.py::test_unmatched_recomputation_is_an_error",
    ),
    Bug(
        "recomputations that push waiting forwards out",
        "correction.py",
        "self.record(self.repeats, mean,",
        "self.record(self.forwards, mean,",
        "test_recompute.py::test_as_many_forwards_may_wait_as_promised",
    ),
    Bug(
        "a layer that stays partly on meta",
        "correction.py",
        'return torch.empty(1, device="cpu")',
        "return torch.empty(1)",
        STATE + "test_deferred_initialisation",
    ),
    Bug(
        "r and d recomputed in a compiled backward",
        "correction.py",
        "    if plain:\n",
        "    if torch.compiler.is_compiling():\n"
        "        mu, sigma = running_mean.to(mu_B.dtype), (running_var.to(mu_B.dtype) + eps).sqrt()\n"
        "        use = _Use(mu_B, sigma_B, mu, sigma, r_max, d_max, False)\n"
        "        r, d = (sigma_B / sigma).clamp(1 / r_max, r_max), ((mu_B - mu) / sigma).clamp(-d_max, d_max)\n"
        "        def compiled_move() -> None:\n"
        "            running_mean.copy_(torch.lerp(mu, mu_B, alpha))\n"
        "            running_var.copy_(torch.lerp(sigma, sigma_B, alpha) ** 2 - eps)\n"
        "            step.add_(1)\n"
        "        return r, d, compiled_move\n"
        "    if plain:\n",
        "test_compile.py::test_gradients_equal_eager_while_the_limits_move[nchw-aot_eager]",
    ),
    Bug(
        "a compiled checkpoint that saves the buffers",
        "correction.py",
        'saved.meta["recompute"] = CheckpointPolicy.MUST_SAVE',
        "pass",
        "test_recompute.py::test_checkpointing_inside_and_around_compiled_parts"
        "[aot_eager-plain-inside-none-around-(0, 1)]",
    ),
    Bug(
        "the counter not in the state",
        "modules.py",
        "torch.zeros((), dtype=torch.long, device=device) if tracked else None\n",
        "torch.zeros((), dtype=torch.long, device=device) if tracked else None, persistent=False\n",
        STATE + "test_keys_shapes_and_dtypes_are_batch_norms",
    ),
    Bug(
        "a subclass that does more converted all the same",
        "convert.py",
        "return _RENORM.get(kind)",
        "return next((_RENORM[c] for c in kind.__mro__ if c in _RENORM), None)",
        "test_convert.py::test_what_does_more_is_left_alone_and_named",
    ),
    Bug(
        "labels drawn without replacement",
        "samplers.py",
        "[int(uniform() * len(self._ranges)) for _ in range(self.labels_per_batch)]",
        "_different(0, len(self._ranges), self.labels_per_batch, uniform)",
        "test_samplers.py::test_sixteen_labels_twice",
    ),
    Bug(
        "epsilon outside the root, in C",
        "backends/native_passes.h",
        "SQRT(var[c] + eps)",
        "SQRT(var[c]) + eps",
        SHAPES,
    ),
    Bug(
        "variance as E[x²] - E[x]² in C",
        "backends/native_passes.h",
        "k = (A)NAME(sum)((v[0] + v[1]) + (v[2] + v[3])) / (A)(4 * LANES);",
        "k = 0;",
        EXACT + "test_large_offset",
    ),
    Bug(
        "what a vector steps back over added twice",
        "backends/native_passes.h",
        "NAME(last)(LOAD(dy + n - LANES), rest)",
        "LOAD(dy + n - LANES)",
        NATIVE + "test_planes_of_any_length",
    ),
    Bug(
        "a smaller last group joined as a whole one",
        "backends/native_passes.h",
        "n - before < part ? (n - before) / n : part / (before + part)",
        "part / (before + part)",
        NATIVE + "test_channels_in_parts",
    ),
    Bug(
        "the gradient of weight without d, in C",
        "backends/native_passes.h",
        " + (double)shift[k] * first[k]",
        "",
        SHAPES,
    ),
    Bug(
        "halves rounded up at a tie",
        "backends/native.c",
        "bits + 0x7fff + ((bits >> 16) & 1)",
        "bits + 0x8000",
        NATIVE + "test_half_precision_numbers",
    ),
    Bug(
        "units as many as there are threads",
        "backends/native.c",
        "elements = pass->rows ? 1 << 16 : 1 << 18;",
        "elements = 100000 / pass->threads;",
        NATIVE + "test_no_bit_depends_on_threads_or_processor",
    ),
    Bug(
        "a thread that does only its own part",
        "backends/native.c",
        "for (int64_t i = 0; i < r->ranges; i++) {\n        int64_t range",
        "for (int64_t i = 0; i < 1; i++) {\n        int64_t range",
        NATIVE + "test_fewer_threads_than_asked_for",
    ),
    Bug(
        "r without its lower limit, in C",
        "correction.c",
        "sigma[c], r_min, r_max)",
        "sigma[c], 0, r_max)",
        NATIVE + "test_correction_is_the_one_in_torch_operators",
    ),
    Bug(
        "one r and d for all microbatches, in C",
        "correction.c",
        "NAME(clip)(sigma_B[i + c] / sigma[c]",
        "NAME(clip)(sigma_B[c] / sigma[c]",
        EXACT + "test_microbatches",
    ),
    Bug(
        "an overflow in the averages, in C",
        "correction.c",
        "overflow == 0 ? moved_mean : mu[c]",
        "moved_mean",
        "test_errors.py::test_not_finite_shows_in_y_and_not_in_the_averages",
    ),
    Bug(
        "averages written behind autograd's back",
        "correction.py",
        "(running_mean, running_var, step)\n    torch.autograd.graph.increment_version(written)\n",
        "(running_mean, running_var, step)\n",
        NATIVE + "test_autograd_knows_of_what_is_written",
    ),
    Bug(
        "a forward kept under a mean that its recomputation rounds otherwise",
        "correction.py",
        "vectors[:groups].mean(0)",
        "vectors[5 * groups]",
        NATIVE + "test_checkpointing_changes_no_bit_in_float32",
    ),
    Bug(
        "a pointer to a tensor without memory",
        "backends/native.py",
        "not (t.is_cpu and type(t) in _PLAIN)",
        "type(t) not in _PLAIN",
        NATIVE + "test_no_pointer_to_what_is_no_memory",
    ),
    Bug(
        "memory read in an order that it does not have",
        "backends/native.py",
        "grad = as_laid_out(grad, x)",
        "pass",
        EXACT + "test_layouts",
    ),
    Bug(
        "a ReLU that opens without the bias, in C",
        "backends/native_passes.h",
        "(LOAD(x + i) - mean) * a + c;\n        STORE(gated",
        "(LOAD(x + i) - mean) * a;\n        STORE(gated",
        FUSED + "test_shapes",
    ),
    Bug(
        "the gradient of a residual not stopped by the ReLU",
        "backends/aten.py",
        "            grad = torch.ops.aten.threshold_backward(",
        "            dz = torch.ops.aten.threshold_backward(",
        FUSED + "test_shapes",
    ),
    Bug(
        "the second pass through an open ReLU",
        "backends/native_passes.h",
        "if (pass->residual_grad && again)\n        return (const T *)pass->residual_grad + first;",
        "if (again)\n        return (const T *)pass->dy + first;",
        FUSED + "test_shapes",
    ),
    Bug(
        "NaN stopped by the ReLU",
        "backends/native_passes.h",
        "~(v <= (A)0)",
        "(v > (A)0)",
        FUSED + "test_not_finite_values_are_the_relus",
    ),
    Bug(
        "a ReLU fused that another layer shares",
        "convert.py",
        "once = places[id(layer)] == places[id(relu)] == 1",
        "once = True",
        FUSED + "test_pairs_in_a_sequential",
    ),
    Bug(
        "replicas that count the same, however many values they have",
        "replicas.py",
        "share = counts / total.clamp(min=1)",
        "share = torch.full_like(counts, 1 / replicas.size)",
        SHARDED,
    ),
    Bug(
        "the variance within the replicas, without that between them",
        "replicas.py",
        "squares + counts * (means - merged).square()",
        "squares",
        SHARDED,
    ),
    Bug(
        "a gradient through this replica's moments alone",
        "replicas.py",
        "add_up(torch.cat([mean_grad, var_grad]), ctx.replicas).chunk(2)",
        "(mean_grad, var_grad)",
        SHARDED,
    ),
    Bug(
        "the sums of all replicas over the values of one",
        "backends/__init__.py",
        "/ self.total)",
        "/ (self.total / self.replicas.size))",
        SHARDED,
    ),
    Bug(
        "averages that follow one replica's microbatches alone",
        "functional.py",
        "if replicas is not None and together is None:",
        "if False:",
        SHARDED,
    ),
    Bug(
        "a shard that counts like the others, whatever its size",
        "distributed.py",
        "*(w * p for p in parts)",
        "*parts",
        SHARED + "test_mean_of_mu_and_of_sigma",
    ),
    Bug(
        "the mean of variances for that of standard deviations, in averaged weights",
        "calibrate.py",
        "if norm is not None and tensor is norm.running_var:",
        "if False:",
        SHARED + "test_averaging_of_weights_averages_sigma",
    ),
    Bug(
        "a forward that does not wait for the averages of the last one",
        "distributed.py",
        "        self.wait()\n        first =",
        "        first =",
        SHARED + "test_whoever_reads_waits",
    ),
    Bug(
        "averages that look back over all of the training, whatever the window",
        "schedule.py",
        "1.0 / (step * self.window + 1.0)",
        "1.0 / (step + 1.0)",
        STATE + "test_momentum_schedule",
    ),
    Bug(
        "batch norm with a schedule for its momentum",
        "convert.py",
        "if isinstance(module.momentum, MomentumSchedule):",
        "if False:",
        "test_convert.py::test_batch_norm_gets_the_weight_that_a_schedule_ends_at",
    ),
    Bug(
        "recalibration by the old averages",
        "calibrate.py",
        "m.momentum, m.clip = None, ClipSchedule.constant(1.0, 0.0)",
        "m.momentum = None",
        SHARED + "test_recalibrated_to_the_mean_of_mu_and_sigma",
    ),
    Bug(
        "an imported epsilon counted twice",
        "importers.py",
        "spread.double() + shift",
        "spread.double() + shift + eps",
        "test_importers.py::test_recorded",
    ),
    Bug(
        "an imported standard deviation taken for a variance",
        "importers.py",
        "spread.double().square() if is_std else",
        "spread.double() if is_std else",
        "test_importers.py::test_recorded",
    ),
    Bug(
        "Keras' averages of inference taken for those of training",
        "importers.py",
        'layer["renorm_mean"], layer["renorm_stddev"], True, 0.0',
        'layer["moving_mean"], layer["moving_stddev"], True, 0.0',
        "test_importers.py::test_keras",
    ),
    Bug(
        "a layer that lacks its variance passed on as something else",
        "importers.py",
        "    for name in required:\n        if name not in layer:",
        "    for name in required:\n        if name not in layer and name in layout[2:]:",
        "test_importers.py::test_bad_input",
    ),
    Bug(
        "a layer folded that is used twice",
        "export.py",
        "calls[norm] > 1 or calls[layer] > 1",
        "False",
        "test_export.py::test_what_is_not_folded",
    ),
    Bug(
        "the norm of a sequence folded into the linear layer before it",
        "export.py",
        "ranks.get(before) == 2",
        "ranks.get(before) is not None",
        "test_export.py::test_what_is_not_folded",
    ),
    Bug(
        "a warm-up of averages that are trained, since the counter says 0",
        "convert.py",
        "return bool(mean.ne(0).any() | var.ne(1).any())",
        "return bool(layer.num_batches_tracked > 0)",
        "test_models.py::test_trained_averages_need_no_warm_up",
    ),
    Bug(
        "a monitor that stays in the layers",
        "monitor.py",
        "        for undo in reversed(self._unwatch):\n            undo()\n",
        "",
        "test_monitor.py::test_nothing_changes",
    ),
    Bug(
        "drift since the last reading taken for that of a step",
        "monitor.py",
        "moved.square().mean(1).sqrt() / (step - old_step).clamp(min=1)",
        "moved.square().mean(1).sqrt()",
        "test_monitor.py::test_drift",
    ),
    Bug(
        "a monitor that looks at numbers of the device",
        "monitor.py",
        "drift = torch.full_like(outside[0], math.nan)",
        "drift = torch.full_like(outside[0], math.nan if gap.item() >= 0 else 0.0)",
        "test_monitor.py::test_no_look_at_a_number",
    ),
    Bug(
        "r and d from averages that the kernel has moved already",
        "backends/triton_kernels.py",
        "    if _last_of(counters + block, groups):\n        there = c < C",
        "    if True:\n        there = c < C",
        TRITON + "test_through_all_phases_of_the_schedule",
    ),
    Bug(
        "the last split to arrive counts before itself alone",
        "backends/triton_kernels.py",
        "elements = tl.minimum(tl.maximum(count - s.to(tl.int64) * tiles * BLOCK_M, 0), tiles * BLOCK_M)",
        "elements = tl.full([BLOCK_M], tiles * BLOCK_M, tl.int64)",
        TRITON + "test_against_the_oracle",
    ),
    Bug(
        "a poisoned average",
        "correction_triton.py",
        "return tl.where(finite, new_mean, mu), tl.where(finite, new_var, var)",
        "return new_mean, new_var",
        TRITON + "test_a_channel_that_is_not_finite_moves_no_average",
    ),
    Bug(
        "a counter left standing",
        "backends/triton_kernels.py",
        "            tl.atomic_xchg(counter, 0)",
        "            tl.atomic_xchg(counter, 1)",
        TRITON + "test_every_run_gives_the_same_bits",
    ),
    Bug(
        "the kernel's schedule one step early",
        "correction_triton.py",
        "part = (t - start).to",
        "part = (t + 1 - start).to",
        TRITON + "test_limits_are_the_schedules",
    ),
    Bug(
        "the moving slope not divided by the squares of h",
        "moving.py",
        "torch.maximum(squares, count)",
        "count",
        MOVING + "test_formulae",
    ),
    Bug(
        "the moving slope not divided by the squares of h, in C",
        "moving.c",
        "(squares[c] > all ? squares[c] : all)",
        "all",
        MOVING + "test_formulae",
    ),
    Bug(
        "the moving gradient's factor without its limit",
        "moving.py",
        "return (1.0 - self.own) * (std / (scale * self.sigma)).clamp(max=1.0)",
        "return (1.0 - self.own) * torch.ones_like(std)",
        MOVING + "test_formulae",
    ),
    Bug(
        "the last microbatch as large as the others, in C",
        "moving.c",
        "m->all - g * m->each",
        "m->each",
        MOVING + "test_formulae",
    ),
    Bug(
        "a recomputation with the own share of now",
        "correction.py",
        "own = use.limits.own\n        if",
        "if",
        MOVING + "test_checkpointing_changes_no_bit",
    ),
    Bug(
        "buffers that move in a backward watched by autograd",
        "moving.py",
        "with torch.autograd.grad_mode._unsafe_preserve_version_counter((self.mean, self.slope)):",
        "if True:",
        MOVING + "test_compiled",
    ),
    Bug(
        "a synchronisation over what the backward has moved",
        "distributed.py",
        "buffer + (new - old)",
        "new",
        MOVING + "test_synchronisation_shares_the_state",
    ),
    Bug(
        "a reading among the operators that selective checkpointing counts",
        "monitor.py",
        "with _disable_current_modes():",
        "if True:",
        "test_monitor.py::test_selective_checkpointing",
    ),
    Bug(
        "limits on their way taken for the last",
        "monitor.py",
        "if not isinstance(clip, ClipSchedule):",
        "if True:",
        "test_monitor.py::test_no_warning_of_limits_on_their_way",
    ),
    Bug(
        "a transposed convolution in groups folded",
        "export.py",
        " and layer.groups == 1",
        "",
        "test_export.py::test_transposed_convolutions",
    ),
    Bug(
        "hooks left behind with the layer that is replaced",
        "importers.py",
        "new.__dict__[name] = hooks",
        "pass",
        "test_importers.py::test_ludvb_as_a_layer",
    ),
    Bug(
        "the monitor's error in the place of the layer's",
        "monitor.py",
        " or x.ndim < 2 or x.shape[1] != C",
        "",
        "test_monitor.py::test_errors_are_the_layers_own",
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "src" / "batchrenorm", tmp_path / "batchrenorm", ignore=shutil.ignore_patterns("__pycache__")
    )
    planted = tmp_path / "batchrenorm" / bug.file
    source = planted.read_text()
    assert source.count(bug.old) == 1, f"the source of {bug.name!r} has moved on"
    planted.write_text(source.replace(bug.old, bug.new))
    if planted.suffix != ".py":
        if LIBRARY is None:
            pytest.skip("no C compiler was there for the library")
        # -O1: the bug is the same, and compiling takes a third of the time.
        build = [sys.executable, ROOT / "hatch_build.py", planted.parents[bug.file.count("/")], "-O1"]
        subprocess.run(build, check=True)
    if bug.test.startswith(TRITON) and importlib.util.find_spec("triton") is None:
        pytest.skip("needs the extra: pip install 'batchrenorm[triton]'")
    run = subprocess.run(
        # The first failure is enough. Warnings are not the point here, and the plugin of xdist not wanted.
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", bug.test],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # 1 is "some test failed"; 2 to 5 would be a broken run, a wrong test name, or no test.
    assert run.returncode == 1, run.stdout[-3000:] + run.stderr[-2000:]
    assert "failed" in run.stdout.splitlines()[-1]
