"""Draws where somebody speaks: docs/examples/voice-activity.md.

    tenuto stream voice-activity test.wav --json | python voice_activity.py speech.svg

It reads what `tenuto stream --json` prints, a JSON object a line, draws the probabilities over time, and says
in how many seconds they are above one half.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, cast

if find_spec("matplotlib") is None:
    print("error: EXTRA_MISSING: matplotlib is not installed; run: pip install matplotlib", file=sys.stderr)
    raise SystemExit(1)

import matplotlib as mpl
from matplotlib.figure import Figure

SECONDS_A_FRAME = 512 / 16000
STYLE: dict[str, Any] = {
    "svg.hashsalt": "tenuto",  # the same bytes for the same figure
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def probabilities(lines: Iterable[str]) -> list[float]:
    """Return the frames of all answers, in order; many answers may hold none."""
    answers = (json.loads(line) for line in lines)
    return [p for answer in answers for p in answer.get("outputs", {}).get("output", ())]


def draw(speech: list[float], path: str) -> None:
    """Write the picture to `path`, an SVG or PNG."""
    seconds = [SECONDS_A_FRAME * (frame + 1) for frame in range(len(speech))]
    with mpl.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(8, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0.5, color="#bbbbbb", linewidth=0.8)
        axes.plot(seconds, speech, color="#2f6f8f", linewidth=0.9)
        axes.set(xlabel="seconds", ylabel="speech", xlim=(0, seconds[-1]), ylim=(0, 1.02), yticks=(0, 0.5, 1))
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else {"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw where somebody speaks.")
    parser.add_argument("picture", metavar="FILE.svg|FILE.png")
    arguments = parser.parse_args()
    speech = probabilities(sys.stdin)
    if not speech:
        raise SystemExit("error: NO_OUTPUT: no answer on the standard input holds an output named 'output'")
    draw(speech, arguments.picture)
    spoken = SECONDS_A_FRAME * sum(p > 0.5 for p in speech)
    print(f"{arguments.picture}: speech in {spoken:.1f} of {SECONDS_A_FRAME * len(speech):.1f} s")


if __name__ == "__main__":
    main()
