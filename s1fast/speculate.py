"""Drafts from the text itself: what followed the last time the same tokens stood there.

A draft is fed beside the row's next token and is kept only where it equals what the sampler draws
at its position, so it changes when tokens come, never which. Reasoning repeats itself (numbers,
names, lines of algebra), which is all that this lives on.
"""

from __future__ import annotations

from s1fast.row import Row

GRAM = 3
"""Tokens that must agree."""


def draft(row: Row, most: int) -> list[int]:
    """Up to `most` ids that may follow the row's; none where its last GRAM ids are new to it.

    The index maps every GRAM ids to where their last occurrence but the row's end stops; it grows
    by the tokens that came since. Tokens that were taken back may be found in it still: then the
    draft is wrong and costs its slots.
    """
    ids = row.ids
    if len(ids) <= GRAM:
        return []
    for stop in range(max(row.indexed, GRAM), len(ids)):
        row.drafts[tuple(ids[stop - GRAM : stop])] = stop
    row.indexed = len(ids)
    at = row.drafts.get(tuple(ids[-GRAM:]))
    return [] if at is None else ids[at : at + most]
