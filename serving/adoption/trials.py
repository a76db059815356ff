"""The checks of `tenuto check`, in a process of their own: `python -m tenuto.serving.adoption.trials`.

Each drives an `Engine`, as the server does, on the folder that it would load: what is checked is what serves.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto.serving.engine import Engine
from tenuto.serving.errors import ModelInvalid, RunFailed
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU
from tenuto.serving.pending import PendingBytes
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import RunSettings, open_runner
from tenuto.serving.sequence import Checkpoint, Chunk, Ending, Failed, Opened, Output, Reply
from tenuto.serving.sequence import Sequence as Voice
from tenuto.serving.snapshot import Checkpoints, Snapshot
from tenuto.serving.tensor import Reader

from .dialogue import Job, work
from .sample_input import Array, Arrays, cut, drawn

MODULE = "tenuto.serving.adoption.trials"

_FRAMES = 12  # of a sequence that is cut in several ways
_CUTS = ([1.0] * _FRAMES, [5.0, 7.0], [2.0, 3.0, 7.0])  # frames a piece
_ROWS = 5  # beside each other
_STEPS = 4
_MAX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
    """`held` is None where there is nothing to check."""

    held: bool | None
    says: str


class _Broken(Exception):
    """What was to be answered was not."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor message's fields."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _Watched:
    """A runner that compares the shapes of what comes with those that the manifest tells."""

    def __init__(self, runner: Any, manifest: Manifest) -> None:
        self._runner = runner
        self._manifest = manifest
        self.pool = runner.pool
        self.rows: list[int] = []  # of each run
        self.enter_thread, self.probe = runner.enter_thread, runner.probe

    def run(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        results: list[NDArray[Any]] = self._runner.run(feeds)
        first = self._manifest.inputs[0]
        axis = first.batch_axis
        rows = 1 if axis is None else feeds[first.name].shape[axis]
        self.rows.append(rows)
        samples = 1
        if first.time_axis is not None:
            samples = feeds[first.name].shape[first.time_axis] - first.left_context
        names = [*self._manifest.fetched, *(s.output for s in self._manifest.states)]
        by_name = dict(zip(names, results, strict=False))
        for o in self._manifest.outputs:
            frames = None if o.lengths_output else samples // o.stride
            lengths = {o.batch_axis: rows, o.time_axis: frames}
            self._compare(
                o.name, o.shape, {a: n for a, n in lengths.items() if a is not None}, by_name, rows, samples
            )
        for s in self._manifest.states if self.pool is None else ():
            lengths = {} if s.batch_axis is None else {s.batch_axis: rows}
            self._compare(s.output, s.shape, lengths, by_name, rows, samples)
        return results

    def _compare(
        self,
        name: str,
        shape: Sequence[int | str],
        lengths: dict[Any, Any],
        by_name: Any,
        rows: int,
        samples: int,
    ) -> None:
        """Raises: RunFailed if it is another shape."""
        told = [lengths.get(a, d) for a, d in enumerate(shape)]
        got = list(by_name[name].shape)
        if len(told) != len(got) or any(
            isinstance(t, int) and t != g for t, g in zip(told, got, strict=True)
        ):
            raise RunFailed(
                f"{name!r}: the manifest tells {list(shape)}, so {told} for {rows} rows of {samples} "
                f"samples; the run gave {got}"
            )


class _Player:
    """One engine, turned by hand. A voice is a sequence; what it was told comes back from `send`."""

    def __init__(self, runner: _Watched, manifest: Manifest, slots: int) -> None:
        self._manifest = manifest
        self._reader = Reader(manifest, _MAX_BYTES)
        self._snapshots: list[Snapshot] = []
        self._engine = Engine(
            manifest, runner, version=1, max_sequences=slots, pool=runner.pool, pending=PendingBytes(1 << 40),
            checkpoints=Checkpoints(self._seal, "", "", every_chunks=0),
        )  # fmt: skip

    def _seal(self, snapshot: Snapshot, _: str) -> bytes:
        self._snapshots.append(snapshot)
        return b"-"

    def open(self, snapshot: Snapshot | None = None, constants: dict[str, float] | None = None) -> Voice:
        voice = Voice(_Ear(), self._manifest, constants=constants)
        if self._manifest.stateful:
            self._engine.open(voice, snapshot)
            self._turn()
            reply = voice.sink.replies[-1]  # type: ignore[attr-defined]
            if not isinstance(reply, Opened):
                raise _Broken(f"it was not opened: {getattr(reply, 'error', reply)}")
        return voice

    def send(self, chunks: Sequence[tuple[Voice, Arrays]]) -> list[Reply]:
        """What each voice gets for its chunk, all of which were there before the first run."""
        for voice, arrays in chunks:
            tensors = [_Tensor(n, a.dtype.name, a.shape, a.tobytes()) for n, a in arrays.items()]
            chunk = Chunk(voice.accepted + 1, self._reader.read(tensors), 0.0, 0)
            (self._engine.accept if self._manifest.stateful else self._engine.request)(voice, chunk)
        self._turn()
        return [voice.sink.replies[-1] for voice, _ in chunks]  # type: ignore[attr-defined]

    def answers(self, chunks: Sequence[tuple[Voice, Arrays]]) -> list[Arrays]:
        """Raises: _Broken if one of them is none."""
        return [self.arrays(reply) for reply in self.send(chunks)]

    def play(self, voice: Voice, pieces: Sequence[Arrays]) -> list[Arrays]:
        return [self.answers([(voice, piece)])[0] for piece in pieces]

    def arrays(self, reply: Reply) -> Arrays:
        if isinstance(reply, Failed):
            raise _Broken(str(reply.error))
        if not isinstance(reply, Output):
            raise _Broken("a chunk was not answered")
        pairs = zip(self._manifest.outputs, reply.tensors, strict=False)
        return {o.name: np.frombuffer(data, o.numpy_dtype).reshape(shape) for o, (shape, data) in pairs}

    def snapshot(self, voice: Voice) -> Snapshot:
        self._engine.checkpoint(voice)
        self._turn()
        if not isinstance(voice.sink.replies[-1], Checkpoint):  # type: ignore[attr-defined]
            raise _Broken("no snapshot could be taken of it")
        return self._snapshots[-1]

    def end(self, voice: Voice) -> None:
        self._engine.close(voice, Ending.END)
        self._turn()

    def _turn(self) -> None:
        while self._engine.turn():
            pass


class _Ear:
    """Where a voice's replies go."""

    full = False
    share = None

    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def deliver(self, replies: list[tuple[Voice, Reply]]) -> None:
        self.replies += [reply for _, reply in replies]


class Trials:
    """The child's side: one folder, laid out as in a repository, and a seed for all that is drawn.

    Raises (when built): ModelInvalid and its like, as the server would.
    """

    def __init__(self, job: Job) -> None:
        folder = ModelFolder(job["model"], job["version"], Path(job["folder"]))
        self._tolerance = float(job["tolerance"])
        self._seed = int(job["seed"])
        runner = open_runner(folder.read(), RunSettings(CPU), max_sequences=1)
        self._manifest = manifest = runner.manifest
        if manifest.name != folder.model:
            raise ModelInvalid(f"the manifest is named {manifest.name!r}, its folder {folder.model!r}")
        runner.enter_thread()
        runner.run(runner.zero_feeds())
        self._runner = _Watched(runner, manifest)
        self._checks: dict[str, Callable[[], Finding]] = {
            "shapes": self._shapes, "repeated": self._repeated, "cut": self._cut, "batched": self._batched,
            "remembers": self._remembers, "reset": self._reset, "resumed": self._resumed, "nan": self._nan,
            "constants": self._constants,
        }  # fmt: skip

    def answer(self, job: Job) -> Job:
        try:
            if "golden" in job:
                return {"steps": self._write_golden(Path(job["golden"]))}
            return dataclasses.asdict(self._checks[job["check"]]())
        except _Broken as error:
            return dataclasses.asdict(Finding(False, str(error)))

    # -- what is drawn ---------------------------------------------------------------------------------

    def _player(self, slots: int = 1) -> _Player:
        return _Player(self._runner, self._manifest, slots)

    @property
    def _timed(self) -> bool:
        return bool(self._manifest.timed)

    def _frames(self) -> int:
        """Of one chunk that is one run, unless the graph takes a frame a run."""
        return min(_FRAMES, self._manifest.max_frames) if self._timed else 1

    def _pieces(self, number: int, steps: int = _STEPS) -> list[Arrays]:
        """So many chunks of one sequence; of a timed one they end within frames."""
        seed = self._seed + 1000 * number
        if not self._manifest.stateful:
            return [drawn(self._manifest, 1 if self._manifest.alone else 2, seed + i) for i in range(steps)]
        if not self._timed:
            return [drawn(self._manifest, 1, seed + i) for i in range(steps)]
        whole = drawn(self._manifest, 3 * steps, seed)
        return cut(self._manifest, whole, [2.6 + 3 * i for i in range(steps)])

    def _same(self, one: Sequence[Arrays], other: Sequence[Arrays], what: str) -> Finding:
        worst, allowed = 0.0, self._tolerance
        for a, b in zip(one, other, strict=True):
            for name in a.keys() | b.keys():
                if name not in a or name not in b or a[name].shape != b[name].shape:
                    shapes = [list(x[name].shape) if name in x else "nothing" for x in (a, b)]
                    return Finding(False, f"{name!r} has shape {shapes[0]} {what} {shapes[1]}")
                worst = max(worst, _difference(a[name], b[name]))
                allowed = max(allowed, self._tolerance * _size(a[name]))
        if worst == 0.0:
            return Finding(True, "bit for bit")
        return Finding(worst <= allowed, f"off by {worst:.2g} at most, allowed {allowed:.2g}")

    # -- the checks ------------------------------------------------------------------------------------

    def _shapes(self) -> Finding:
        self._runner.rows.clear()
        player = self._player(2)
        if not self._manifest.stateful:
            for rows in (1,) if self._manifest.alone else (1, 3):
                player.answers([(player.open(), drawn(self._manifest, rows, self._seed))])
        else:
            chunks = [(player.open(), drawn(self._manifest, frames, self._seed)) for frames in (1, 1)]
            player.answers(chunks[:1])
            player.answers(chunks)
            player.answers(
                [(voice, drawn(self._manifest, self._frames(), self._seed)) for voice, _ in chunks]
            )
        return Finding(
            True, f"as told, in runs of {' and '.join(map(str, sorted(set(self._runner.rows))))} rows"
        )

    def _repeated(self) -> Finding:
        pieces = self._pieces(1)
        once, again = [self._alone(pieces) for _ in range(2)]
        return self._same(once, again, "once, and again")

    def _alone(self, pieces: Sequence[Arrays], constants: dict[str, float] | None = None) -> list[Arrays]:
        player = self._player()
        if self._manifest.stateful:
            return player.play(player.open(constants=constants), pieces)
        return [player.answers([(player.open(constants=constants), piece)])[0] for piece in pieces]

    def _cut(self) -> Finding:
        if not self._timed:
            return Finding(
                None, "a chunk is one step" if self._manifest.stateful else "the model has no state"
            )
        frames = max(self._frames(), 2)
        whole = drawn(self._manifest, frames, self._seed)
        joined = self._alone([whole])[0]
        multiple = max(i.multiple for i in self._manifest.timed)
        cuts = [list(np.cumsum(c)) for c in _CUTS if sum(c) == frames] or [
            [float(f + 1) for f in range(frames)]
        ]
        if multiple > 1 and len(self._manifest.inputs) == 1:
            cuts.append([*np.arange(0.7, frames, 0.7).tolist(), float(frames)])
        for ends in cuts:
            parts = self._alone(cut(self._manifest, whole, ends))
            found = self._same([joined], [self._joined(parts)], f"in one chunk, in {len(ends)}")
            if not found.held or found.says != "bit for bit":
                return dataclasses.replace(
                    found, says=f"{found.says} (1 chunk of {frames} frames, and {len(ends)})"
                )
        return Finding(True, f"bit for bit, {frames} frames in {len(cuts)} ways")

    def _joined(self, parts: Sequence[Arrays]) -> Arrays:
        """One answer: the frames of timed outputs behind each other, the last of others."""
        whole: Arrays = {}
        for o in self._manifest.outputs:
            values = [part[o.name] for part in parts if o.name in part]
            if not values:
                continue
            if o.time_axis is None:
                whole[o.name] = values[-1]
            else:
                axis = o.time_axis - (o.batch_axis is not None and o.batch_axis < o.time_axis)
                whole[o.name] = np.concatenate(values, axis)
        return whole

    def _batched(self) -> Finding:
        rows = _ROWS
        pieces = [self._pieces(number) for number in range(rows)]
        if self._manifest.ragged:  # rows of different lengths in one batch
            pieces = [
                p if n % 2 else [cut(self._manifest, c, [1.0])[0] for c in p] for n, p in enumerate(pieces)
            ]
        alone = [self._alone(p) for p in pieces]
        self._runner.rows.clear()
        player = self._player(rows)
        voices = [player.open() for _ in range(rows)]
        together: list[list[Arrays]] = [[] for _ in range(rows)]
        for step in range(_STEPS):
            if not self._manifest.stateful:
                voices = [player.open() for _ in range(rows)]
            answers = player.answers([(v, p[step]) for v, p in zip(voices, pieces, strict=True)])
            for row, answer in zip(together, answers, strict=True):
                row.append(answer)
        found = self._same(list(chain(*alone)), list(chain(*together)), "alone, among others")
        most = max(self._runner.rows)
        return dataclasses.replace(found, says=f"{found.says}, {rows} beside each other, {most} rows a run")

    def _remembers(self) -> Finding:
        if not self._manifest.stateful:
            return Finding(None, "the model has no state")
        pieces = self._pieces(2)
        player, fresh = self._player(), self._player()
        voice, newcomer = player.open(), fresh.open()
        late = player.play(voice, pieces)[-1]
        early = fresh.play(newcomer, pieces[-1:])[0]
        if self._same([late], [early], "late, early").says != "bit for bit":
            return Finding(True, "what came before changes an answer")
        if player.snapshot(voice).states != fresh.snapshot(newcomer).states:
            return Finding(True, "what came before changes the state")
        return Finding(False, "neither answers nor states depend on what came before")

    def _reset(self) -> Finding:
        if not self._manifest.stateful:
            return Finding(None, "the model has no state")
        pieces = self._pieces(3)
        fresh = self._alone(pieces)
        player = self._player()
        first = player.open()
        player.play(first, self._pieces(4))
        player.end(first)
        return self._same(fresh, player.play(player.open(), pieces), "in a new slot, in a used one")

    def _resumed(self) -> Finding:
        if not self._manifest.stateful:
            return Finding(None, "the model has no state")
        pieces = self._pieces(5)
        half = len(pieces) // 2
        player = self._player()
        voice = player.open()
        player.play(voice, pieces[:half])
        snapshot = player.snapshot(voice)
        gone_on = player.play(voice, pieces[half:])
        elsewhere = self._player()
        resumed = elsewhere.play(elsewhere.open(snapshot), pieces[half:])
        return self._same(gone_on, resumed, "going on, resumed")

    def _nan(self) -> Finding:
        """A neighbour's NaN, in its input and in its state."""
        floats = [i for i in self._manifest.inputs if i.numpy_dtype.kind == "f" and i.finite]
        states = [s for s in self._manifest.states if np.dtype(s.dtype).kind == "f" and s.finite]
        if not floats and not states:
            return Finding(None, "no number of it can be NaN")
        found = Finding(True, "")
        if floats:
            found = self._nan_in_input()
        if states and found.held:
            found = self._nan_in_state()
        return found

    def _nan_in_input(self) -> Finding:
        pieces = self._pieces(6)
        player = self._player(2)
        good, bad = player.open(), player.open()
        spoiled = {
            n: np.full_like(a, np.nan) if a.dtype.kind == "f" else a for n, a in self._pieces(7)[0].items()
        }
        replies = player.send([(bad, spoiled), (good, pieces[0])])
        if not isinstance(replies[0], Failed):
            return Finding(False, "a chunk of NaN was answered")
        rest = player.play(good, pieces[1:]) if self._manifest.stateful else []
        found = self._same(
            self._alone(pieces[: 1 + len(rest)]), [player.arrays(replies[1]), *rest], "alone, beside"
        )
        return dataclasses.replace(found, says=f"{found.says} beside a chunk of NaN, which is refused")

    def _nan_in_state(self) -> Finding:
        pieces, others = self._pieces(6), self._pieces(7)
        before = self._player()
        voice = before.open()
        before.play(voice, others[:1])
        snapshot = before.snapshot(voice)
        states = tuple(
            np.full(s.slot_shape, np.nan, s.dtype).tobytes()
            if np.dtype(s.dtype).kind == "f" and s.finite
            else value
            for s, value in zip(self._manifest.states, snapshot.states, strict=True)
        )
        player = self._player(2)
        bad, good = player.open(dataclasses.replace(snapshot, states=states)), player.open()
        replies = player.send([(bad, others[1]), (good, pieces[0])])
        if isinstance(replies[1], Failed):
            return Finding(False, f"a state of NaN ends the one beside it too: {replies[1].error}")
        ended = isinstance(replies[0], Failed)
        rest = player.play(good, pieces[1:])
        found = self._same(self._alone(pieces), [player.arrays(replies[1]), *rest], "alone, beside")
        outcome = "ends alone" if ended else "heals"
        if found.held and ended:
            after = player.play(player.open(), pieces)
            found = self._same(self._alone(pieces), after, "in a new slot, after NaN")
        return dataclasses.replace(found, says=f"{found.says} beside a state of NaN, which {outcome}")

    def _constants(self) -> Finding:
        choices = [(c.name, value) for c in self._manifest.constants for value in c.allowed]
        if not choices:
            return Finding(None, "a client may choose none")
        for name, value in choices:
            try:
                self._alone(self._pieces(8), {name: value})
            except _Broken as error:
                return Finding(False, f"{name}={value:g}: {error}")
        return Finding(True, f"{', '.join(f'{n}={v:g}' for n, v in choices)} run")

    # -- golden steps ----------------------------------------------------------------------------------

    def _write_golden(self, path: Path) -> int:
        """The self test that the server replays: what was answered here, once all checks held."""
        pieces = self._pieces(9, 6)
        answers = self._alone(pieces)
        arrays: dict[str, Array] = {}
        for step, (sent, got) in enumerate(zip(pieces, answers, strict=True), 1):
            arrays |= {f"{step}.in.{name}": value for name, value in sent.items()}
            arrays |= {f"{step}.out.{name}": value for name, value in got.items()}
        largest = max((_size(value) for answer in answers for value in answer.values()), default=0.0)
        arrays["tolerance"] = np.array(self._tolerance * max(1.0, largest))
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        path.write_bytes(buffer.getvalue())
        return len(pieces)


def _difference(a: Array, b: Array) -> float:
    """The largest one; infinite where one is not finite and the other is not the same."""
    if a.tobytes() == b.tobytes():
        return 0.0
    with np.errstate(invalid="ignore"):  # Inf less Inf
        gaps = np.abs(a.astype(np.float64) - b.astype(np.float64))
    same = (a == b) | ((a != a) & (b != b))
    return float(np.nan_to_num(np.max(gaps[~same], initial=0.0), nan=np.inf))


def _size(a: Array) -> float:
    """The largest finite number in it."""
    values = np.abs(a.astype(np.float64)).reshape(-1)
    return float(np.max(values[np.isfinite(values)], initial=0.0))


if __name__ == "__main__":
    work(lambda job: Trials(job).answer, sys.argv[1:])
