"""Ends a rank whose peers have gone silent, so that no node waits, and is paid for, in vain.

torchrun ends the ranks of its own node when one dies. Those of other nodes may sit in a collective
that nobody will join until it times out, after minutes. So each rank says in the common store every
few seconds that it lives; rank 0 looks after all, the others after rank 0, which leaves word of
whom it missed. A thread does so, also while the rank waits in a collective.
"""

from __future__ import annotations

import os
import sys
import time
from threading import Event, Thread

from torch.distributed import Store

BEAT_S = 4.0
SILENCE_S = 45.0
"""A rank that says nothing for so long counts as dead; with two beats more, less than a minute."""


class Heartbeat:
    """Beats from its making until stop."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        """The store: a connection that nobody else uses, to one that all ranks have in common."""
        self._store, self._rank = store, rank
        self._peers = [0] if rank else list(range(1, world))
        self._stopped = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """To be called when nobody waits for this rank any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        heard = {peer: (b"", time.monotonic()) for peer in self._peers}
        count = 0
        while not self._stopped.wait(BEAT_S if count else 0):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                missed = self._missed(heard)
            except RuntimeError as error:  # of the store, whose host is gone
                missed = f"the store of torchrun's first node is gone: {str(error).splitlines()[0]}"
            if missed and not self._stopped.is_set():
                print(f"s1fast: error: rank {self._rank}: {missed}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread cannot be asked: it waits for the dead

    def _missed(self, heard: dict[int, tuple[bytes, float]]) -> str:
        """Who is silent, in words; "" for nobody."""
        if self._rank and self._store.check(["missed"]):
            return self._store.get("missed").decode()
        now = time.monotonic()
        for peer in self._peers:
            if self._store.check([f"beat/{peer}"]):
                beat = self._store.get(f"beat/{peer}")
                if beat != heard[peer][0]:
                    heard[peer] = (beat, now)
        silent = [str(peer) for peer, (_, at) in heard.items() if now - at > SILENCE_S]
        if not silent:
            return ""
        missed = f"nothing heard from rank {', '.join(silent)} for {SILENCE_S:.0f} s"
        if not self._rank:
            self._store.set("missed", missed)
        return missed
