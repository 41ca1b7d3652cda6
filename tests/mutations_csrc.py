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
        "tokens before the wait", "  dependency_wait();\n  live = live_tokens(g);", "  live = 1;"
    ),
    _gemv(
        "a stage filled too early", "at.parity ^ 1);", "at.parity);", "test_rings_that_turn_often"
    ),
    _gemv("a stage emptied too early", "WARPS);\n    }", "1);\n    }"),
    _gemv("rubbish behind a row", "here = column < columns;", "here = true;", "test_ragged_shapes"),
    _gemv("one block's share left out", "block <= last; ++block)", "block < last; ++block)"),
    _gemv("arrivals left over", "if (thread == 0) g.arrivals[first] = 0;", ""),
    _gemv("two shares in one place", "2 * block + (block == first)", "2 * block"),
    _gemv(
        "a tile summed too early",
        "atomicAdd(&g.arrivals[first], 1) == last - first",
        "atomicAdd(&g.arrivals[first], 1) == 1",
    ),
    _gemv("squares of another token", "group % 2 ? squares[1] : squares[0]", "squares[0]"),
    _gemv("mean of a chunk", "value(SUMS + token) / g.width", "value(SUMS + token) / g.plan.chunk"),
    _gemv("gate for up", "lane >= OUTPUTS ? g.outputs : 0", "lane >= OUTPUTS ? 0 : 0"),
    _gemv(
        "more tokens than slots",
        "live < g.slots ? live : g.slots",
        "live",
        "test_live_tokens_are_counted_on_the_device",
    ),
    _gemv(
        "rows that are not live",
        "if (token >= live ||",
        "if (",
        "test_live_tokens_are_counted_on_the_device",
    ),
    _gemv("sums overwritten while read", "    turn ^= 1;\n", "", "test_rings_that_turn_often"),
    _gemv("rounding down", "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16", "bits >> 16"),
    _gemv("too much memory", "233472 / 2 - 1024", "233472", "test_plans_of_real_shapes"),
    _gemv("units of unequal work", "best_share >= 0.95 ||", "true ||", "test_plans_of_real_shapes"),
    _build("no lock", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    _build("built by others meanwhile", "if not library.exists():", "if True:"),
    _build("versions not in the key", 'f"{versions}\\n{FLAGS}\\n".encode()', 'b""'),
    _build("leftovers stay", "            remove_leftovers(target.parent)\n", ""),
)
