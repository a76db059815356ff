"""One sequence at rest between two chunks: all that another server needs to go on with it."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

from .errors import TenutoError, TokenInvalid
from .manifest import Manifest
from .sampling import Generation, Sampling
from .text import LONGEST_REST_BYTES

_LENGTH = struct.Struct("<I")
# What the header and the sealing add to the samples and states, at most.
_OVERHEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A sequence after `step`: `feeds` holds each input's left context and samples not yet eaten, `states`
    each state's values of its slot, C order, both in the manifest's order. `text` is what waits for the rest
    of its word or character. With a `generation` of which parts are done
    it stands behind these parts of the step that comes next."""

    model: str
    version: int
    fingerprint: str  # sha256 of model.onnx and manifest.json
    schema: str  # of the states and what waits before them: `manifest.state_schema`
    sequence_id: str
    step: int
    constants: tuple[tuple[str, float], ...]
    feeds: tuple[bytes, ...]
    states: tuple[bytes, ...]
    text: bytes = b""
    generation: Generation | None = None
    ran: bool = True  # whether a run had samples of it

    def to_bytes(self) -> bytes:
        g = self.generation
        position = [*dataclasses.astuple(g.sampling), g.done, g.digest] if g else None
        blobs = (*self.feeds, *self.states, self.text, g.frame if g else b"")
        header = [
            self.model, self.version, self.fingerprint, self.schema, self.sequence_id, self.step,
            self.constants, position, len(self.feeds), [len(blob) for blob in blobs],
        ]  # fmt: skip
        if not self.ran:  # left out where it need not be said: servers that do not know of it read it as well
            header.append(False)
        text = json.dumps(header, separators=(",", ":")).encode()
        return b"".join((_LENGTH.pack(len(text)), text, *blobs))

    def check(self, manifest: Manifest) -> None:
        """Whether it is of such a model.

        Raises: TokenInvalid.
        """
        states = [s.slot_bytes for s in manifest.states]
        contexts = [i.left_context * i.sample_bytes if manifest.stateful else 0 for i in manifest.inputs]
        least = zip(self.feeds, contexts, strict=False)
        fits = len(self.feeds) == len(contexts) and all(len(feed) >= context for feed, context in least)
        fits = fits and (not self.text or manifest.inputs[0].text is not None)
        if self.generation and self.generation.frame and manifest.generate:
            frames = {o.name: o.frame_bytes for o in manifest.outputs}
            fits = fits and len(self.generation.frame) == frames[manifest.generate.output]
        if not fits or [len(state) for state in self.states] != states:
            raise TokenInvalid(
                f"the resume token holds other samples or states than {manifest.name!r} has; "
                "open a new sequence"
            )

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """The inverse. What is read here was sealed by one of these servers.

        Raises: TokenInvalid for another format.
        """
        try:
            (length,) = _LENGTH.unpack_from(data)
            at = _LENGTH.size + length
            header = json.loads(data[_LENGTH.size : at])
            model, version, fingerprint, schema, sequence_id, step = header[:6]
            constants, position, feeds, lengths, *ran = header[6:]
            blobs = []
            for size in lengths:
                blobs.append(data[at : at + size])
                at += size
            if at != len(data):
                raise ValueError(f"{len(data)} bytes instead of {at}")
            *states, waiting, frame = blobs[feeds:]
            generation = None
            if position is not None:
                *sampling, done, digest = position
                generation = Generation(Sampling(*sampling), frame, done, digest)
        except (ValueError, TypeError, struct.error, TenutoError) as error:
            text = f"the resume token is of another format ({error}); open a new sequence"
            raise TokenInvalid(text) from error
        chosen = tuple((str(name), float(value)) for name, value in constants)
        return cls(
            model, version, fingerprint, schema, sequence_id, step,
            chosen, tuple(blobs[:feeds]), tuple(states), waiting, generation, not ran,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """How the sequences of one model version are sealed."""

    seal: Callable[[Snapshot, str], bytes]  # the sequence at rest, and whose it is
    fingerprint: str
    schema: str
    every_chunks: int  # 0: only when asked, and at endings
    rarer: int = 1  # large states: so many times as many chunks between two

    def interval(self, wished: int) -> int:
        """Chunks between two checkpoints of a sequence whose client wishes that many; 0: none by itself."""
        return (wished or self.every_chunks) * self.rarer


def token_bytes(manifest: Manifest) -> int:
    """What a resume token of that model may take. Of the samples not yet eaten, less than a frame waits."""
    feeds = sum((i.left_context + i.multiple) * i.sample_bytes for i in manifest.inputs if manifest.stateful)
    text = LONGEST_REST_BYTES if manifest.inputs[0].text else 0
    drawn = max(o.frame_bytes for o in manifest.outputs) if manifest.generate else 0
    return _OVERHEAD_BYTES + feeds + text + drawn + sum(s.slot_bytes for s in manifest.states)
