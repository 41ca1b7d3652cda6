"""The device as the captured loop sees it: lines that rows are put on, steps that are launched, and
a ring in which lies what they drew.

Everything a line is given is written into pinned memory here and copied from there, in stream
order and without waiting. A line's memory is written again only when its next row comes, after the
last launch that saw the one before; a page table's entries only grow meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1fast.chat import Chat
from s1fast.decode_step import Chunk, DecodeStep
from s1fast.graphs import Graphs, buckets_for, num_slots
from s1fast.kernels.advance import advance, lay_out
from s1fast.kernels.device_rows import Field, Rows, Slots, gram_index, line_of_state
from s1fast.kv_cache import KVCache
from s1fast.matmul import Matmul
from s1fast.model import Model
from s1fast.row import Row
from s1fast.tensor_parallel import Ranks


class Device:
    """Lines, the steps over them, and their ring.

    Args:
        chat: whose ids may be drawn.
        max_rows: lines; depth: launches that may be under way.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        matmul: Matmul,
        chat: Chat,
        *,
        max_rows: int,
        depth: int,
        ranks: Ranks | None = None,
    ) -> None:
        buckets = buckets_for(max_rows)
        self.device, self._cache, self._vocab_size = cache.k.device, cache, chat.vocab_size
        self._spare = {bucket: num_slots(bucket) - bucket for bucket in buckets}
        self.most_slots = 1 + max(self._spare.values())
        """That a row can get in a step."""
        ender_V = torch.zeros(model.config.vocab_size, dtype=torch.uint8)
        ender_V[sorted(chat.ends_in_newline)] = 1
        sizes = max_rows, model.config.max_position_embeddings, cache.table.shape[1]
        self.rows = Rows.empty(*sizes, ender_V, self.device)
        most = buckets[-1], num_slots(buckets[-1])
        slots = Slots.empty(*most, max_rows, depth, self.most_slots, self.device)
        self._slots = {b: slots.narrow(b, num_slots(b)) for b in buckets}
        self._step = slots.step
        self._host = {
            name: torch.zeros(x.shape, dtype=x.dtype, pin_memory=self.device.type == "cuda")
            for name, x in vars(self.rows).items()
            if name in ("state_RF", "ids_RX", "program_RZ")
        }
        self._ring = slots.ring_DRW.numpy()
        self._forward = DecodeStep(model, cache, self.rows, matmul, most[1], ranks)
        self.graphs = Graphs(self._run, buckets, self.device)

    # -- lines -----------------------------------------------------------------------------------

    def load(self, row: Row) -> None:
        """The row's ids and pages go to its line."""
        self._put("ids_RX", row.line, row.ids)
        self.rows.table_RP[row.line].copy_(self._cache.table[row.line], non_blocking=True)

    def arm(self, row: Row, drafts: int) -> None:
        """The row, loaded before, goes on from what it is now when the next step is laid out."""
        length, params, line = len(row.ids), row.params, row.line
        program = row.cells[0][0].program
        state = line_of_state(
            length=length,
            cached=length - row.pending,
            limit=limit(row),
            drafts=min(drafts, self.most_slots - 1),
            state=row.automaton.state,
            temperature=params.temperature,
            top_k=min(params.top_k, self._vocab_size),  # an int32 there
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
            sample=row.sample,
        )
        self._put("state_RF", line, state)
        self._put("program_RZ", line, program.table)
        if drafts:
            gram_G = self.rows.gram_RG[line]
            gram_G.copy_(gram_index(self.rows.ids_RX[line], length, len(gram_G)))

    def disarm(self, line: int) -> None:
        """No later layout has the line's row."""
        self.rows.state_RF[line, Field.ACTIVE].fill_(0)

    def extend(self, line: int, first: int, stop: int) -> None:
        """The line has pages more, the `first`th up to the `stop`th."""
        fresh = self._cache.table[line, first:stop]
        self.rows.table_RP[line, first:stop].copy_(fresh, non_blocking=True)

    def _put(self, name: str, line: int, values: list[int] | tuple[int, ...]) -> None:
        source: Tensor = self._host[name][line, : len(values)]
        source.copy_(torch.tensor(values, dtype=torch.int32))
        getattr(self.rows, name)[line, : len(values)].copy_(source, non_blocking=True)

    # -- work ------------------------------------------------------------------------------------

    def prefill(self, chunks: list[Chunk]) -> None:
        """Computes keys and values of rows that are loaded."""
        self._forward.prefill(chunks)

    def lay_out(self, bucket: int) -> None:
        """The next step is laid out anew, for the rows that are armed now and for this bucket."""
        lay_out(self.rows, self._slots[bucket], self._spare[bucket])

    def _run(self, bucket: int) -> None:
        slots = self._slots[bucket]
        logits_CV = self._forward.logits(slots)
        advance(self.rows, slots, logits_CV, self._vocab_size, self._spare[bucket])

    def count_from(self, number: int) -> None:
        """The next step's number."""
        self._step.fill_(number)

    def drawn(self, number: int, line: int) -> list[int]:
        """What the line's row drew in a step whose event has come."""
        stamp, count, *tokens = self._ring[number % len(self._ring), line].tolist()
        return tokens[:count] if stamp == (number + 1) & 0x7FFFFFFF else []


def limit(row: Row) -> int:
    """Positions that the row can ever fill."""
    return len(row.prompt_ids) + row.cells[0][0].program.longest
