"""What tests/mutation_check.py breaks in the token loop's draws, automata and layout."""

from __future__ import annotations

from mutation import Mutation

_ROWS, _SAMPLER = "tests/test_device_rows.py", "tests/test_sample_triton.py"
_STEPS = "tests/test_automaton_triton.py"
_KERNELS = f"{_ROWS}::test_kernels_draw_as_the_reference"


def _draw(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"draw: {name}", "kernels/sample_triton.py", old, new, (_SAMPLER,))


def _automaton(name: str, old: str, new: str) -> Mutation:
    file = "kernels/automaton_triton.py"
    return Mutation(f"automaton on the device: {name}", file, old, new, (_STEPS,))


def _advance(name: str, old: str, new: str, *tests: str) -> Mutation:
    file = "kernels/advance_triton.py"
    return Mutation(f"advance: {name}", file, old, new, tests or (_KERNELS,))


MUTATIONS = (
    _draw("the last of equals", "better_T = score_T > high_T", "better_T = score_T >= high_T"),
    _draw(
        "a row's rest left out",
        "logits_T.to(tl.float32), rest_T)",
        "logits_T.to(tl.float32), at_T)",
    ),
    _draw("an overflowing list is trusted", "listed = (num <= NEAR) & (", "listed = (num > 0) & ("),
    _draw("a list short of top-k is trusted", "((num >= top_k) | (top_p >= _ONE))", "(num > 0)"),
    _draw(
        "top-p of all, not of top-k's",
        "            if shares:\n",
        "            if shares & False:\n",
    ),
    _draw("no min-p", "& (_weight(distance_T) >= min_p)", ""),
    _draw("noise by rank", "sample_index, position, id_T)", "sample_index, position, id_T + 1)"),
    _draw("reach too short", "-(2.0**-24))) + 0.05", "-(2.0**-24))) - 12.0"),
    _automaton("masks nothing", "mask=(match_E > 0) & early_E", "mask=(match_E > 99) & early_E"),
    _automaton("no failure function", "node = tl.load(nodes_ptr + 4 * node)", "node = node * 0"),
    _automaton("a delimiter cuts too much", "tl.minimum(match - 1, since)", "match - 1"),
    _automaton("newlines forgotten", "newlines >> cut", "newlines"),
    _automaton("an ignore text is not cut", "tl.minimum(count, left)", "count"),
    _automaton("the harness cuts nothing", "tl.where(harness, beyond, 0)", "beyond * 0"),
    _automaton("stops of the first lanes", "found += tl.sum", "found = tl.sum"),
    _automaton("a long text's first lanes", "range(0, count, _MANY)", "range(0, 1, _MANY)"),
    _advance("a wrong draft is kept", "going = plain & (draft == token)", "going = plain"),
    _advance("cached never shrinks", "tl.minimum(cached, low)", "cached"),
    _advance("an end is never indexed", "tl.maximum(first, _GRAM)", "tl.maximum(first + 1, _GRAM)"),
    _advance("a found gram is not verified", "other=-1) == third_R", "other=-1) != -2", _ROWS),
    _advance("the longest first", "(rest_R[None, :] < rest_R", "(rest_R[None, :] > rest_R", _ROWS),
    _advance("a slot too many", "tl.minimum(spare, slots", "tl.minimum(spare + 1, slots"),
    _advance("drafts from the start", "stop_C + position_C - length_C", "stop_C"),
    _advance("the bucket is not kept", "axis=0) <= bucket", "axis=0) <= slots", _ROWS),
    _advance("a disarmed row draws", "tl.load(state_ptr + _ACTIVE) != 0)", "line >= 0)", _ROWS),
    _advance("one place of the ring", "(launch % ring_size)", "(launch * 0)"),
)
