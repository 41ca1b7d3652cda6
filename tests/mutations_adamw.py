"""What tests/mutation_check.py breaks in AdamW."""

from __future__ import annotations

from dataclasses import replace

from mutation import Mutation


def _adamw(name: str, old: str, new: str, *tests: str) -> Mutation:
    """In the kernels, or the reference; `tests` are the functions that it takes, if not all."""
    chosen = tuple(f"tests/test_adamw.py::{test}" for test in tests) or ("tests/test_adamw.py",)
    return Mutation(f"adamw: {name}", "kernels/adamw.py", old, new, chosen)


def _norm(name: str, old: str, new: str) -> Mutation:
    tests = ("test_norm_is_float64s", "test_norm_of_large_and_small", "test_norm_repeats")
    return _adamw(f"norm: {name}", old, new, *tests)


def _optimizer(name: str, old: str, new: str) -> Mutation:
    tests = ("test_optimizer_is_torchs", "test_bf16_moments_learn_as_well", "test_norm_over_ranks")
    kernels = _adamw(f"optimizer: {name}", old, new, *tests, "test_optimizer_refuses_by_name")
    return replace(kernels, file="s1fast/optimizer.py")


MUTATIONS = (
    # -- AdamW: kernels
    _adamw("clip factor left out", "mask=mask_B).to(tl.float32) * clip", "mask=mask_B)"),
    _adamw("first moment's weight", "m_B += weight1 *", "m_B += (1.0 - weight1) *"),
    _adamw("second moment's decay", "v_B = v_B * beta2 +", "v_B = v_B +"),
    _adamw("second moment is a first", "weight2 * g_B * g_B", "weight2 * g_B"),
    _adamw(
        "second moment uncorrected", "tl.sqrt_rn(v_B), root_correction2)", "tl.sqrt_rn(v_B), 1.0)"
    ),
    _adamw("first moment uncorrected", "tl.div_rn(lr, correction1)", "lr"),
    _adamw("eps left out", ", root_correction2) + eps", ", root_correction2)"),
    _adamw("decay couples", "p_B = p_B * keep -", "p_B = p_B -"),
    _adamw("decay of the first shard", "tl.load(decay_ptr + shard)", "tl.load(decay_ptr)"),
    _adamw("ascent", "keep - tl.div_rn(step_size", "keep + tl.div_rn(step_size"),
    _adamw(
        "first moment not kept",
        "    tl.store(exp_avg_ptr, m_B",
        "    tl.store(exp_avg_ptr, 0 * m_B",
    ),
    _adamw("chunk's start in elements", "+ 4 * start\n    exp_avg =", "+ start\n    exp_avg ="),
    _adamw(
        "gradient of another chunk",
        "start\n    size = tl.minimum(tl.load(table_ptr + 4 * shard + 3) - start, CHUNK).to("
        "tl.int32)\n    lr,",
        "0\n    size = tl.minimum(tl.load(table_ptr + 4 * shard + 3) - start, CHUNK).to("
        "tl.int32)\n    lr,",
    ),
    _adamw(
        "beyond the shard",
        "            at_B < size - at,\n            keep,",
        "            at_B < BLOCK,\n            keep,",
    ),
    _adamw(
        "ragged end left out",
        "for at in range(whole, size, BLOCK):\n        _update(",
        "for at in range(whole, size - BLOCK, BLOCK):\n        _update(",
    ),
    _adamw("chunk numbers", "- (chunks.cumsum(0) - chunks)[shard]", "- chunks.cumsum(0)[shard]"),
    _adamw("last chunk left out", "-(-sizes // CHUNK)", "sizes // CHUNK"),
    _adamw("fp32 moments only", "NARROW_MOMENTS=shards.narrow", "NARROW_MOMENTS=False"),
    _norm("plain sum", "        sum_B += g_B * g_B\n    for", "        sum_B += g_B\n    for"),
    _norm(
        "last tile overwrites",
        "        sum_B += g_B * g_B\n    tl",
        "        sum_B = g_B * g_B\n    tl",
    ),
    _norm(
        "poison counts",
        "mask=at_B < size - at, other=0.0).to",
        "mask=at_B < BLOCK, other=0.0).to",
    ),
    _norm("chunks overwrite", "tl.store(partial_ptr + chunk, tl", "tl.store(partial_ptr, tl"),
    _norm("one chunk short", "mask=at_B < num_chunks - at", "mask=at_B < num_chunks - 1 - at"),
    # -- AdamW: reference, checks and optimizer
    _adamw("reference: clip factor", "g = grad.float() * clip", "g = grad.float() * 1"),
    _adamw(
        "reference: gradients overwritten", "g = grad.float() * clip", "g = grad.float().mul_(clip)"
    ),
    _adamw("reference: pieces", "param.mul_(keeps[decay])", "param.mul_(keeps[max(keeps)])"),
    _adamw("reference: moments not kept", "            if shards.narrow:", "            if False:"),
    _adamw(
        "reference: norm of one shard",
        "for g in found.grads for",
        "for g in found.grads[:1] for",
    ),
    _adamw(
        "strided shards pass",
        "if not x.is_contiguous():",
        "if False:",
        "test_shards_that_do_not_match",
    ),
    _adamw(
        "other dtypes pass",
        "x.shape != like.shape or x.dtype != dtype or",
        "x.shape != like.shape or",
        "test_shards_that_do_not_match",
    ),
    _adamw(
        "shared memory passes",
        "if len({*addresses}) < len(addresses):",
        "if False:",
        "test_a_shard_given_twice",
    ),
    _optimizer("vectors decay", "if p.ndim > 1 else 0.0", "if p.ndim > 0 else 0.0"),
    _optimizer("no clipping", ".clamp(max=1.0)", ".clamp(min=1.0, max=1.0)"),
    _optimizer("gradients grow to the norm", ".clamp(max=1.0)", ""),
    _optimizer("ranks not summed", "if self.all_reduce is not None:", "if False:"),
    _optimizer("norm is its square", "norm = squares.sqrt()", "norm = squares"),
    _optimizer("steps not counted", "self.steps += 1", "self.steps = 1"),
    _optimizer("gradients kept", "parameter.grad = None", "pass"),
    _optimizer(
        "moved weights pass", "if local(parameter).data_ptr() != part", "if part.data_ptr() != part"
    ),
    _optimizer(
        "moments in fp32 always", "dtype = getattr(torch, config.moments)", "dtype = torch.float32"
    ),
)
