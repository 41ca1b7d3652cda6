"""Runs a Gluon kernel for Hopper on a CPU, unchanged, as late and as unfairly as hardware may.

Gluon has no interpreter. Here the functions of a kernel file run as plain Python on torch tensors,
with `gl` and `hopper` replaced:

- each partition of a warp_specialize is a thread; one runs at a time, and which goes on where one
  waits is drawn, so a seed is a run that repeats;
- an mbarrier counts arrivals and bytes and has phases; where nobody can go on, Deadlock is raised;
- a copy poisons its target with NaN when it is issued, and delivers when somebody waits for its
  barrier: who does not wait, or overwrites what is still to be read, meets NaN;
- an asynchronous product reads its operands only when it is waited for, after every other thread
  has gone as far as it can; before that its result is NaN;
- what a thread stores to shared memory may enter a product only after the thread's fence.

Layouts are ignored: the compiler checks them. Warps of a partition are not told apart.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Deadlock(Exception):
    """No partition can go on."""


class Turns:
    """Threads of which one runs at a time."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.changed = threading.Condition()
        self.paused: dict[int, tuple[Callable[[], bool], bool]] = {}
        self.running: int | None = None
        self.failure: BaseException | None = None

    def run(self, calls: Sequence[Callable[[], Any]]) -> None:
        """All of them to their ends; raises what the first of them raised."""
        threads = [threading.Thread(target=self._one, args=(i, x)) for i, x in enumerate(calls)]
        self.paused = {i: (lambda: True, False) for i in range(len(calls))}
        with self.changed:
            self._choose()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure

    def _one(self, number: int, call: Callable[[], Any]) -> None:
        _LOCAL.number = number
        try:
            self._await(number)
            with torch.no_grad():
                call()
        except BaseException as error:
            self.failure = self.failure or error
        with self.changed:
            self._choose()

    def pause(self, ready: Callable[[], bool] = lambda: True, last: bool = False) -> None:
        """Lets others run until `ready`; `last`: for as long as any of them can."""
        number = getattr(_LOCAL, "number", None)
        if number is None:  # before the partitions begin
            assert ready(), "nobody is there to wait for"
            return
        with self.changed:
            self.paused[number] = (ready, last)
            self._choose()
        self._await(number)

    def _await(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.running == number or self.failure)
            if self.failure and self.running != number:
                raise Deadlock

    def _choose(self) -> None:
        able = [(last, n) for n, (ready, last) in self.paused.items() if ready()]
        if self.paused and not able:
            self.failure = self.failure or Deadlock(f"partitions {[*self.paused]} wait for ever")
        now = [n for last, n in able if last == min(able)[0]]
        self.running = self.draw.choice(now) if now else None
        self.paused.pop(self.running, None)  # type: ignore[arg-type]
        self.changed.notify_all()


_LOCAL = threading.local()
"""The number of the running partition; unset before they begin."""


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0
        self.copies: list[Callable[[], int]] = []

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int) -> None:
        assert count <= self.missing, "an arrival too many, or before init"
        self.missing -= count
        self._turn()

    def over(self, phase: int) -> bool:
        """Whether the phase of that parity is over; copies that somebody waits for arrive."""
        while self.copies:
            self.bytes -= self.copies.pop(0)()
            self._turn()
        return self.phase != int(phase)

    def _turn(self) -> None:
        if not self.missing and not self.bytes:
            self.missing = self.count
            self.phase ^= 1


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, block: Block, data: Tensor) -> None:
        self.block, self.data, self.shape = block, data, data.shape

    def index(self, i: Any) -> Shared:
        return Shared(self.block, self.data[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.block, self.data[start : start + length])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.block, self.data.permute(*order))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.block.unfenced.append((_LOCAL.number, *self.span()))

    def span(self) -> tuple[int, int]:
        start = self.data.data_ptr()
        return start, start + self.data.numel() * self.data.element_size()


class Barriers(list[Barrier]):
    """Barriers in shared memory."""

    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


class Pointer:
    """Elements of a tensor's storage."""

    def __init__(self, data: Tensor, at: Any) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)

    @staticmethod
    def to(x: Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(x.as_strided((size,), (1,), 0), x.storage_offset())


class Product:
    """A product on its way."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands, self.acc, self.use_acc = (a, b), acc, use_acc
        self.result: Tensor | None = None

    def compute(self, block: Block) -> None:
        a, b = (block.checked(x).data if isinstance(x, Shared) else x for x in self.operands)
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        product = a.float() @ b.float()
        self.result = acc + product if self.use_acc else product


class Block:
    """One block's shared memory and threads, and Gluon's functions for it."""

    def __init__(self, number: int, blocks: int, seed: int) -> None:
        self.number, self.blocks, self.turns = number, blocks, Turns(seed)
        self.unfenced: list[tuple[int, int, int]] = []
        self.products: dict[int, list[Product]] = {}

    # -- language ----------------------------------------------------------------------------

    def language(self) -> SimpleNamespace:
        def scalar(x: int) -> Tensor:
            return torch.tensor(x, dtype=torch.int32)

        def no_layout(*_: Any) -> None: ...

        return SimpleNamespace(
            **{name: getattr(torch, name) for name in ("bfloat16", "float32", "int32", "int64")},
            **{name: getattr(torch, name) for name in ("exp2", "log2", "maximum", "minimum")},
            **dict.fromkeys(
                ("SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "DotOperandLayout"),
                no_layout,
            ),
            NVMMASharedLayout=SimpleNamespace(get_default_for=no_layout),
            program_id=lambda axis: scalar(self.number),
            num_programs=lambda axis: scalar(self.blocks),
            static_range=range,
            cdiv=lambda a, b: -(-a // b),
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            where=torch.where,
            max=torch.amax,
            sum=torch.sum,
            convert_layout=lambda x, layout: x,
            load=lambda pointer: pointer.data[pointer.at],
            store=self.store,
            allocate_shared_memory=self.allocate,
            warp_specialize=lambda calls, warps, registers: self.turns.run(
                [partial(function, *arguments) for function, arguments in calls]
            ),
        )

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        mask = mask.expand(value.shape)
        pointer.data[pointer.at.expand(value.shape)[mask]] = value[mask]

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if dtype == torch.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Shared(self, torch.full(tuple(shape), torch.nan, dtype=dtype))

    # -- Hopper ------------------------------------------------------------------------------

    def hopper(self) -> SimpleNamespace:
        return SimpleNamespace(
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=Barrier.init,
                arrive=Barrier.arrive,
                expect=self.expect,
                wait=lambda barrier, phase: self.turns.pause(lambda: barrier.over(phase)),
            ),
            tma=SimpleNamespace(
                make_tensor_descriptor=self.descriptor, async_copy_global_to_shared=self.copy
            ),
            fence_async_shared=self.fence,
            warpgroup_mma=self.product,
            warpgroup_mma_wait=self.wait_products,
        )

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.arrive(1)

    def descriptor(
        self, base: Pointer, shape: list[int], strides: list[int], box: list[int], layout: Any
    ) -> SimpleNamespace:
        size = torch.Size(box).numel() * base.data.element_size()
        return SimpleNamespace(
            base=base,
            shape=shape,
            strides=strides,
            box=box,
            block_type=SimpleNamespace(nbytes=size),
        )

    def copy(self, desc: SimpleNamespace, at: list[Any], barrier: Barrier, to: Shared) -> None:
        to.data.fill_(torch.nan)

        def deliver() -> int:
            low = [max(0, int(i)) for i in at]
            high = [min(int(i) + n, m) for i, n, m in zip(at, desc.box, desc.shape, strict=True)]
            size = [max(0, b - a) for a, b in zip(low, high, strict=True)]
            offset = desc.base.at + sum(i * s for i, s in zip(low, desc.strides, strict=True))
            box = torch.zeros(desc.box, dtype=to.data.dtype)
            box[tuple(map(slice, size))] = desc.base.data.as_strided(
                size, desc.strides, offset if min(size) else 0
            )
            to.data.copy_(box.reshape(to.data.shape))
            return desc.block_type.nbytes

        barrier.copies.append(deliver)

    def fence(self) -> None:
        number = getattr(_LOCAL, "number", None)
        self.unfenced = [x for x in self.unfenced if x[0] != number]

    def checked(self, memory: Shared) -> Shared:
        start, end = memory.span()
        for number, low, high in self.unfenced:
            assert high <= start or low >= end, f"partition {number} stored here without a fence"
        return memory

    def product(
        self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        assert is_async
        product = Product(a, b, acc, use_acc)
        self.products.setdefault(_LOCAL.number, []).append(product)
        return product

    def wait_products(self, left: int, results: Sequence[Product]) -> Tensor:
        self.turns.pause(last=True)
        pending = self.products[_LOCAL.number]
        while len(pending) > left:
            pending.pop(0).compute(self)
        (product,) = results
        if product.result is None:
            return torch.full_like(product.acc, torch.nan)
        return product.result


class Launcher:
    """Stands for the kernel `name` of a module: Launcher(module, name)[grid](...)."""

    def __init__(self, module: ModuleType, name: str, seed: int = 0) -> None:
        self.known, self.name, self.seed = dict(vars(module)), name, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self._launch, grid[0])

    def _launch(self, blocks: int, *arguments: Any, **constants: Any) -> None:
        del constants["num_warps"], constants["maxnreg"]
        taken = [Pointer.to(x) if isinstance(x, Tensor) else x for x in arguments]
        for number in range(blocks):
            block = Block(number, blocks, self.seed + number)
            names = {"gl": block.language(), "hopper": block.hopper()}
            _functions(self.known, names)[self.name](*taken, **constants)


def _functions(known: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """A module's globals, in which functions for Gluon are plain ones that see `names`."""
    found = {name: getattr(value, "value", value) for name, value in known.items()} | names
    for name, value in known.items():
        function = getattr(value, "fn", value)
        if isinstance(function, FunctionType) and function.__module__ == known["__name__"]:
            found[name] = FunctionType(function.__code__, found, name, function.__defaults__)
    return found
