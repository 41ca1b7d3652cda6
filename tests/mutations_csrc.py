"""What tests/mutation_check.py breaks in csrc and its build."""

from __future__ import annotations

from mutation import Mutation

CSRC = "tests/test_csrc.py"


def _gemv(name: str, old: str, new: str, *tests: str) -> Mutation:
    """In csrc's kernel, which is built anew and run on fibers."""
    chosen = tuple(f"{CSRC}::{test}" for test in tests or ("test_tiles_shared_by_blocks",))
    return Mutation(f"gemv: {name}", "csrc/gemv.cuh", old, new, chosen)


def _build(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"build: {name}", "s1fast/build.py", old, new, ("tests/test_build.py",))


MUTATIONS = (
    _gemv(
        "tokens before the wait",
        "  dependency_wait();\n  const int live = live_tokens(g);\n  Walk",
        "  const int live = g.slots;\n  Walk",
    ),
    _gemv("weights before they are there", "wait_for_groups<DEPTH - 1>", "wait_for_groups<DEPTH>"),
    _gemv(
        "a place that is still to be read",
        "for_weights(g, lane, ring[slot]);",
        "for_weights(g, lane, ring[(slot + 1) % DEPTH]);",
    ),
    _gemv(
        "a place whose other lanes still read it",
        "        __syncwarp();  // all is taken: the place is free\n",
        "",
    ),
    _gemv(
        "what other lanes have asked for, before it is there",
        "    __syncwarp();  // all lanes' copies are there\n",
        "",
    ),
    _gemv("rubbish behind a row", "PIECES * 8 < g.width;", "PIECES * 8 < g.width + COLUMNS;"),
    _gemv(
        "tokens behind a row",
        "PIECES * 8 < g.width ? live",
        "PIECES * 8 < g.width + COLUMNS ? live",
        "test_ragged_shapes",
    ),
    _gemv(
        "a step asked for that is not there",
        "if (i < steps) asking.for_tokens",
        "asking.for_tokens",
    ),
    _gemv("a piece in two places", "(piece ^ row / (8", "(piece & row / (8"),
    _gemv(
        "a warp's next step",
        "if (step >= plan.steps_of_tile) step",
        "if (step > plan.steps_of_tile) step",
    ),
    _gemv("steps left over", "(block < plan.over ? block : plan.over)", "plan.over"),
    _gemv("rows behind the last", "odd) < there);", "odd) < there + ROWS);", "test_ragged_shapes"),
    _gemv(
        "sums of one warp",
        "barrier_init(&shared.full[lane], WARPS)",
        "barrier_init(&shared.full[lane], 1)",
    ),
    _gemv(
        "sums overwritten while read",
        "    barrier_wait(&shared.empty[turn], parity);\n",
        "",
        "test_long_stretches",
    ),
    _gemv("sums of two tiles", "    sums = Running{};\n", ""),
    _gemv("one block's share left out", "block <= last; ++block)", "block < last; ++block)"),
    _gemv("arrivals left over", "if (lane == 0) g.arrivals[first] = 0;", ""),
    _gemv("two shares in one place", "2 * block + (block == first)", "2 * block"),
    _gemv("a tile summed too early", "before < last - first", "before < 1"),
    _gemv(
        "squares of another token",
        "group % 2 ? sums.squares[1] : sums.squares[0]",
        "sums.squares[0]",
    ),
    _gemv("mean of a step", "total.squares / g.width", "total.squares / COLUMNS"),
    _gemv(
        "gate for up",
        "(SWIGLU ? g.outputs : 1) * int64_t(apart)",
        "(SWIGLU ? 0 : 1) * int64_t(apart)",
    ),
    _gemv(
        "more tokens than slots",
        "live < g.slots ? live : g.slots",
        "live",
        "test_live_tokens_are_counted_on_the_device",
    ),
    _gemv(
        "rows that are not live",
        "if (token >= live) return;",
        "",
        "test_live_tokens_are_counted_on_the_device",
    ),
    _gemv("rounding down", "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16", "bits >> 16"),
    _gemv("no room for two", "int DEPTH = 4;", "int DEPTH = 6;", "test_plans_of_real_shapes"),
    _build("no lock", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    _build("built by others meanwhile", "if not library.exists():", "if True:"),
    _build("versions not in the key", 'f"{versions}\\n{FLAGS}\\n".encode()', 'b""'),
    _build("leftovers stay", "            remove_leftovers(target.parent)\n", ""),
)
