"""A state pool that the graph itself reads and writes, one buffer a state, on the device that it runs on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .device_memory import device_memory
from .errors import ModelInvalid, NotSupported
from .extended_graph import FINITE, SLOTS, extend, pool_input, pool_output, pool_reader, pool_writer
from .kept_buffers import KeptBuffers
from .manifest import State
from .model_runner import CUDA, ModelRunner, failing, session
from .placement import Placement
from .state_pool import StatePool, layout

Array = NDArray[Any]
Slots = NDArray[np.intp]
Buffer = Any  # an onnxruntime.OrtValue


class GraphPool(StatePool):
    """Its slots are written and read by small graphs of their own. What is to be written waits for the next
    batch, so newcomers share one run; and so do those who are read after one, if they are expected."""

    reads_together = True
    spares = 2  # padding is read from the slot behind the dump slot, which is never written: it begins anew

    def __init__(
        self, states: tuple[State, ...], max_sequences: int, max_bytes: int = 0, *, provider: str, where: str
    ) -> None:
        super().__init__(states, max_sequences, max_bytes)
        self.fresh = self.dump + 1
        self._device = "cuda" if provider == CUDA else "cpu"
        self._waiting: dict[int, tuple[Array, ...]] = {}  # by slot: its values, state by state
        self._expected: dict[int, tuple[bytes, ...]] = {}  # by slot: its values since the last run
        try:
            self._buffers = [self._buffer(state) for state in states]
        except Exception as error:  # the device has no room; a class of ONNX Runtime's own
            raise ModelInvalid(
                f"{where}: its pool of {self.nbytes} bytes finds no room ({str(error).splitlines()[0]}); "
                "lower --max-sequences, or set --max-state-bytes"
            ) from error
        self._where = f"{where}: its pool"
        self._writer = session(pool_writer(states), self._where, provider, 1)
        self._reader = session(pool_reader(states), self._where, provider, 1)
        self.reset(self.fresh)

    def _buffer(self, state: State) -> Buffer:
        values = np.zeros(layout(state, self.capacity + self.spares), state.dtype)
        return onnxruntime.OrtValue.ortvalue_from_numpy(values, self._device)

    def bind(self, binding: Any) -> None:
        """The pool as a run's input, and as its output."""
        for state, buffer in zip(self._states, self._buffers, strict=True):
            binding.bind_ortvalue_input(pool_input(state), buffer)
            binding.bind_ortvalue_output(pool_output(state), buffer)

    def expect(self, slots: list[int]) -> None:
        stored = [slot for slot in slots if slot not in self._waiting]
        self._expected.update(zip(stored, self._fetch(stored), strict=True) if stored else ())

    def read(self, slot: int) -> tuple[bytes, ...]:
        """Raises: RunFailed."""
        waiting = self._waiting.get(slot)
        if waiting is not None:
            return tuple(value.tobytes() for value in waiting)
        return self._expected.get(slot) or self._fetch([slot])[0]

    def _fetch(self, slots: list[int]) -> list[tuple[bytes, ...]]:
        """The values of each slot, out of the buffers: one run, and one copy a state."""
        with failing(self._where):
            binding = self._reader.io_binding()
            binding.bind_cpu_input(SLOTS, np.array(slots, np.int64))
            for state, buffer in zip(self._states, self._buffers, strict=True):
                binding.bind_ortvalue_input(pool_input(state), buffer)
                binding.bind_output(state.input)
            self._reader.run_with_iobinding(binding)
            values = binding.copy_outputs_to_cpu()
        by_row = [np.moveaxis(v, s.batch_axis or 0, 0) for v, s in zip(values, self._states, strict=True)]
        return [tuple(rows[i].tobytes() for rows in by_row) for i in range(len(slots))]

    def write(self, slot: int, values: tuple[bytes, ...]) -> None:
        self._waiting[slot] = tuple(
            np.frombuffer(value, s.dtype).reshape(s.slot_shape)
            for s, value in zip(self._states, values, strict=True)
        )

    def reset(self, slot: int) -> None:
        if slot != self.dump:  # from which nobody reads
            self._waiting[slot] = tuple(self._initial)

    def gather(self, slots: Slots) -> dict[str, Array]:
        return {SLOTS: np.where(slots == self.dump, self.fresh, slots)}

    def scatter(self, slots: Slots, values: list[Array]) -> None:
        """The run did."""

    def not_finite(self, values: list[Array], rows: int) -> list[int]:
        flags = values[0][:rows, 0]
        return [] if not flags.any() else np.flatnonzero(np.isnan(flags)).tolist()

    def flush(self) -> None:
        """Writes what waits, in one run; to be called before each run of the model.

        Raises: RunFailed; then all of it waits on.
        """
        self._expected.clear()
        if not self._waiting:
            return
        with failing(self._where):
            binding = self._writer.io_binding()
            binding.bind_cpu_input(SLOTS, np.array(list(self._waiting), np.int64))
            for i, state in enumerate(self._states):
                rows = np.stack([values[i] for values in self._waiting.values()], state.batch_axis or 0)
                binding.bind_cpu_input(state.output, np.ascontiguousarray(rows))
            self.bind(binding)
            self._writer.run_with_iobinding(binding)
        self._waiting.clear()


class GraphRunner:
    """Runs a model whose states its graph keeps in a `GraphPool`. What comes and goes is inputs, outputs,
    slot numbers and flags.

    Raises (when built): NotSupported if the graph cannot be extended; ModelInvalid if the pool is too small.
    """

    def __init__(self, model: bytes, plain: ModelRunner, max_sequences: int, max_bytes: int = 0) -> None:
        """`plain` has the same model, and checked it."""
        self.manifest, self.where = plain.manifest, plain.where
        states, provider = plain.manifest.states, plain.provider
        dump, _ = GraphPool.room(states, max_sequences, max_bytes)
        extended = extend(model, plain.manifest, dump=dump, fresh=dump + 1)
        self.pool = GraphPool(states, max_sequences, max_bytes, provider=provider, where=plain.where)
        try:
            tf32 = plain.manifest.precision == "tf32"
            memory = device_memory(provider == CUDA) if plain.kept else None
            self._session = session(extended, plain.where, provider, plain.threads, tf32, memory)
        except ModelInvalid as error:  # which loads as it is
            raise NotSupported(f"its extended graph is refused: {error}") from error
        self.placement = Placement.of(self._session)
        self._names = [*plain.manifest.fetched, FINITE]
        self.kept = plain.kept
        self._buffers = KeptBuffers(self._session, self._names, memory, self.pool.bind) if memory else None
        own = {s.input for s in states}
        self._zeros = {name: value for name, value in plain.zero_feeds().items() if name not in own}
        self.enter_thread = ModelRunner.enter_thread  # not the plain one's: it would be kept, weights and all

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """What the manifest has `fetched`, then the flags of the rows' states.

        Raises: RunFailed, with ONNX Runtime's text; then no state is another one.
        """
        self.pool.flush()
        with failing(self.where):
            if self._buffers is not None:
                return self._buffers.run(feeds)
            binding = self._session.io_binding()
            for name, value in feeds.items():
                binding.bind_cpu_input(name, value)
            for name in self._names:
                binding.bind_output(name)
            self.pool.bind(binding)  # behind them: the pool itself stays where it is
            self._session.run_with_iobinding(binding)
            outputs = binding.get_outputs()
            return [outputs[i].numpy() for i in range(len(self._names))]

    def zero_feeds(self) -> dict[str, Array]:
        """One batch of one row and one frame, all zero, with the initial state, in the dump slot."""
        self.pool.reset(self.pool.dump)
        return self._zeros | self.pool.gather(np.array([self.pool.dump], np.intp))

    def probe(self) -> None:
        """Runs `zero_feeds`, which ran when the model was checked.

        Raises: RunFailed.
        """
        self.run(self.zero_feeds())
