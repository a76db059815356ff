"""A session's inputs and outputs in buffers that stay where they are: one set for each shape of its feeds."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import onnxruntime
from onnxruntime import OrtValue

from .device_memory import Array, DeviceMemory
from .errors import RunFailed

log = logging.getLogger("tenuto.kept_buffers")

Binding = Any  # an onnxruntime.IOBinding

# Shapes whose buffers are kept, and their bytes on the host (a device has as many); the one that was used
# longest ago gives way. The one in use is always there.
_MOST, _MOST_BYTES = 32, 256 << 20


class KeptBuffers:
    """Runs one session. `names` are the outputs that are wanted; `bind` binds what lies elsewhere, once for
    each set.

    The feeds of all runs have the same names and dtypes.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        names: list[str],
        memory: DeviceMemory,
        bind: Callable[[Binding], None] = lambda _: None,
    ) -> None:
        self._session = session
        self._names = names
        self._memory = memory
        self._bind = bind
        self._sets: OrderedDict[tuple[tuple[int, ...], ...], BufferSet] = OrderedDict()
        self._order: list[str] = []  # of the feeds' names, as their first run had them

    def __len__(self) -> int:
        return len(self._sets)

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """The outputs. They are overwritten by the next run.

        Raises: RunFailed, and whatever ONNX Runtime does; the run has written nothing then, unless the device
        itself failed.
        """
        self._order = self._order or list(feeds)
        shapes = tuple([feeds[name].shape for name in self._order])
        buffers = self._sets.get(shapes)
        if buffers is None:
            buffers = self._made(feeds)  # whole, before it is kept
            self._sets[shapes] = buffers
        self._sets.move_to_end(shapes)
        before = buffers.nbytes
        results = buffers.run(feeds)
        if buffers.nbytes > before:
            self._make_room()
        return results

    def _made(self, feeds: dict[str, Array]) -> BufferSet:
        buffers = BufferSet(self._session, self._names, self._memory)
        for name in self._order:
            buffers.add_input(name, feeds[name])
        self._bind(buffers.binding)
        return buffers

    def _make_room(self) -> None:
        while len(self._sets) > 1 and (len(self._sets) > _MOST or self.nbytes > _MOST_BYTES):
            self._sets.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """What is kept on the host."""
        return sum(buffers.nbytes for buffers in self._sets.values())


class BufferSet:
    """For feeds of one shape. Where the outputs lie is known after the first run."""

    def __init__(self, session: onnxruntime.InferenceSession, names: list[str], memory: DeviceMemory) -> None:
        self.binding: Binding = session.io_binding()
        self.nbytes = 0  # that it keeps on the host
        self._session = session
        self._memory = memory
        # A kernel of a GPU may want an input where the host has it: an LSTM the lengths of its rows.
        places = list(zip(session.get_inputs(), session.get_input_memory_infos(), strict=True))
        self._on_device = {node.name for node, place in places if place.name == memory.place}
        results = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
        self._made_there = {node.name for node, place in results if place.name == memory.place}
        self._names = names
        self._inputs: list[tuple[str, Array]] = []
        self._sent: list[tuple[Array, int]] = []  # of the inputs; and where the device has them
        self._results: list[Array] = []  # as the outputs stand; empty: another run has to show their shapes
        self._fetched: list[tuple[int, Array]] = []  # of the results
        self._shapes: list[tuple[int, ...]] = []  # of the outputs, when they were last found
        # Whether outputs may stay where they are. One that is an input is that input's value, not a copy.
        self._keeps = not {node.name for node, _ in places} & set(names)
        self._options = onnxruntime.RunOptions()
        # It would wait for its stream, in which the copies back are still to be queued.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options.add_run_config_entry("gpu_graph_id", "-1")  # none: asking in vain costs more
        self._let_outputs_come()  # they stand in front of all other outputs that are bound

    def add_input(self, name: str, like: Array) -> None:
        staging = self._memory.staging(like.shape, like.dtype)
        self._inputs.append((name, staging))
        self.nbytes += staging.nbytes
        if name in self._on_device:
            value = OrtValue.ortvalue_from_shape_and_type(like.shape, like.dtype, self._memory.name)
            self._sent.append((staging, value.data_ptr()))
        else:
            value = OrtValue.ortvalue_from_numpy(staging)  # the same memory
        self.binding.bind_ortvalue_input(name, value)

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """As `KeptBuffers.run`."""
        for name, staging in self._inputs:
            staging[...] = feeds[name]
        for staging, address in self._sent:
            self._memory.send(staging, address)
        if not self._results:
            return self._run_to_find()
        try:
            self._session.run_with_iobinding(self.binding, self._options)
        except Exception:  # noqa: BLE001  # a class of its own for each status
            # It has written no state. Perhaps an output has another shape this time.
            return self._run_to_find()
        for address, staging in self._fetched:
            self._memory.fetch(address, staging)
        self._memory.settle()
        return self._results

    def _let_outputs_come(self) -> None:
        """Wherever ONNX Runtime puts them."""
        self.nbytes -= sum(result.nbytes for result in self._results)
        self._results, self._fetched = [], []
        for name in self._names:
            self.binding.bind_output(name, self._memory.name if name in self._made_there else "cpu")

    def _run_to_find(self) -> list[Array]:
        """The outputs, wherever they come. Those of the next run lie in the same places, unless their shapes
        are others than last time."""
        self._let_outputs_come()  # or it takes the buffers of the run before
        self._session.run_with_iobinding(self.binding, self._options)
        self._memory.settle()
        values = self.binding.get_outputs()[: len(self._names)]
        results: list[Array] = [value.numpy() for value in values]
        shapes = [result.shape for result in results]
        self._keeps = self._keeps and self._shapes in ([], shapes)
        self._shapes = shapes
        if self._keeps:
            self._keep(values, results)
        return results

    def _keep(self, values: list[Any], results: list[Array]) -> None:
        """The outputs stay in `values`, OrtValues, or where the host has them anyway.

        The run is done and may have written states: if there is no room, that is no reason for it to fail.
        """
        try:
            stagings = [self._memory.staging(result.shape, result.dtype) for result in results]
        except (RunFailed, MemoryError) as error:
            log.warning("outputs of %s are not kept: %s", self._shapes, error)
            self._keeps = False
            return
        for name, value, staging in zip(self._names, values, stagings, strict=True):
            if name in self._made_there:
                self._fetched.append((value.data_ptr(), staging))
                self.binding.bind_ortvalue_output(name, value)
            else:
                self.binding.bind_ortvalue_output(name, OrtValue.ortvalue_from_numpy(staging))
        self._results = stagings
        self.nbytes += sum(staging.nbytes for staging in stagings)
