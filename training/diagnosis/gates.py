"""What the gates of an LSTM do along a spoken digit and the pause after it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenuto.training.candidate import AnyArray
from tenuto.training.datasets import fsdd
from tenuto.training.stepper import initial, load

from .inside import Gates, Inside
from .plot import picture

PAUSE_SECONDS = 0.6


@dataclass(frozen=True, eq=False)
class SpokenGates:
    """One recording and a pause through `spoken-digits`, 20 ms a step."""

    name: str
    digit: int
    loudness: AnyArray  # [time], dB of full scale
    belief: AnyArray  # [time], the probability of the right digit in the running answer
    gates: Gates  # of the LSTM that keeps the answer
    spoken: int  # steps before the pause

    @classmethod
    def measure(cls, folder: Path, number: int = 0) -> "SpokenGates":
        """Run the exported model in `folder` over a recording of the test split. Raises DataUnavailable."""
        content = (folder / "model.onnx").read_bytes()
        _, manifest = load(content)
        recording = fsdd.recordings("test")[number]
        step = manifest.inputs[0].multiple
        spoken = recording.pcm[: len(recording.pcm) // step * step]
        pcm = np.concatenate([spoken, np.zeros(int(PAUSE_SECONDS * fsdd.RATE_HZ) // step * step, np.int16)])
        feeds: dict[str, AnyArray] = {
            manifest.inputs[0].name: pcm[None],
            str(manifest.inputs[0].lengths): np.array([len(pcm)], np.int32),
        }
        for state in manifest.states:
            feeds[state.input] = np.expand_dims(initial(manifest)[state.input], state.batch_axis or 0)
        model = Inside(content)
        answer = model.values(["answer"], feeds)["answer"][0, :, recording.digit]
        power = (pcm.reshape(-1, step).astype(np.float64) ** 2).mean(1)
        loudness = 10 * np.log10(power / 32768**2 + 1e-9)
        gates = Gates.of(model, model.nodes("LSTM")[-1], feeds)
        return cls(recording.name, recording.digit, loudness, np.exp(answer), gates, len(spoken) // step)

    def figures(self) -> dict[str, float]:
        """Return how open the gates are in the word and in the pause, means over steps and units."""
        parts = {"word": slice(2, self.spoken), "pause": slice(self.spoken + 5, None)}
        opened = {
            f"{part}_{gate}": float(getattr(self.gates, gate)[steps].mean())
            for gate in ("input", "forget")
            for part, steps in parts.items()
        }
        return opened | {"belief": float(self.belief[-1])}

    def draw(self, path: Path) -> None:
        """Draw loudness, belief and two gates of every unit, units in the order of their forget gates."""
        order = np.argsort(self.gates.forget[: self.spoken].mean(0))
        seconds = np.arange(len(self.loudness)) * 0.02
        with picture(path, rows=3, size=(6.4, 5.4)) as (top, middle, bottom):
            top.plot(seconds, self.loudness, color="#888888")
            top.set(ylabel="loudness, dB", title=f"“{self.digit}” ({self.name}), then silence")
            belief = top.twinx()
            belief.plot(seconds, self.belief, color="#2f6f8f")
            belief.set_ylabel(f"probability of {self.digit}", color="#2f6f8f")
            for axes, gate in ((middle, "input"), (bottom, "forget")):
                values = getattr(self.gates, gate)[:, order].T
                extent = (0, seconds[-1] + 0.02, 0, len(order))
                shown = axes.imshow(values, aspect="auto", origin="lower", extent=extent, vmin=0, vmax=1)
                axes.set(ylabel=f"{gate} gate, by unit")
                axes.grid(visible=False)
                axes.figure.colorbar(shown, ax=axes, label="open")
            for axes in (top, middle, bottom):
                axes.axvline(self.spoken * 0.02, color="#c0504d", lw=0.8)
            bottom.set_xlabel("seconds")
