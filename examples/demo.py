"""A server, its models and real data, in one run: `make demo`.

It starts `tenuto serve exported/` on free ports, classifies images in one batch, streams recordings
all at once as if they were spoken now, feeds a year of hourly sensor data into the forecaster, shows
what the server believes as it comes, then what it cost. It stops the server and leaves with 0; an
error is `error: REASON: text` on stderr, and leaves with 1.

Data comes from `tenuto.training.datasets`: downloaded once, or from the folder TENUTO_DATA.
"""

import argparse
import asyncio
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

NEEDED = ("grpc", "numpy", "onnxruntime", "pooch", "prometheus_client", "pydantic")
MISSING = [name for name in ("tenuto", *NEEDED) if find_spec(name) is None]
if MISSING:
    print(
        f"error: EXTRA_MISSING: {', '.join(MISSING)} not installed; run: make demo, or "
        "pip install 'tenuto[demo]'",
        file=sys.stderr,
    )
    raise SystemExit(1)

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from tenuto import TenutoError, aio  # noqa: E402
from tenuto.belief import Guess, guesses, last_frame  # noqa: E402
from tenuto.training.datasets import etth1, fsdd, mnist, store  # noqa: E402

EXPORTED = Path(__file__).resolve().parent.parent / "exported"
CHUNK_SECONDS = 0.02
HOURS_A_CHUNK = 24
START_SECONDS = 60.0  # for the server to check and load its models
STOP_SECONDS = 10.0
READY = re.compile(r"tenuto serving on (\S+), metrics on (\S+), ([^:]+): (.*)")

Floats = NDArray[np.float32]


class DemoError(Exception):
    """What ends the demo: a reason in capitals, and what to do."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")


# -- the server ------------------------------------------------------------------------------------


class Server:
    """`tenuto serve` in a process group of its own; stopped, whatever happens, on leaving."""

    def __init__(self, repository: Path) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-m", "tenuto.cli", "serve", str(repository)]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--metrics-port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the demo, which then stops the server
        )

    def __enter__(self) -> "Server":
        try:
            line = self._first_line()
            found = READY.match(line)
            if found is None:
                self.died(f"its first line was {line!r}, expected 'tenuto serving on …'")
        except BaseException:
            self._stop()
            raise
        self.address, self.metrics_url, self.provider, self.models = found.groups()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        code = self._stop()
        self._errors.close()
        if error is None and code != 0:
            raise DemoError("SERVER_STOP_FAILED", f"the server left with {code}, expected 0")

    def _first_line(self) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], START_SECONDS)[0]:
            self.died(f"it was not ready within {START_SECONDS:g} s")
        return self._process.stdout.readline().decode(errors="replace").strip()

    def died(self, why: str) -> NoReturn:
        """Raise SERVER_FAILED with the end of what the server wrote to stderr."""
        self._stop()
        self._errors.seek(0)
        tail = self._errors.read().splitlines()[-20:]
        code = self._process.returncode
        raise DemoError("SERVER_FAILED", "\n  ".join([f"{why}; exit code {code}; it said:", *tail]))

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def _stop(self) -> int:
        """End the server and whatever it started; return its exit code."""
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:  # a second Ctrl-C: at once
                self._kill()
                raise
        self._kill()
        code = self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of an empty group
            os.killpg(self._process.pid, signal.SIGKILL)


# -- what is shown ---------------------------------------------------------------------------------


class Screen:
    """Redraws its lines on a terminal; prints one line at a time where there is none."""

    def __init__(self) -> None:
        self._redraws = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._drawn = 0

    def title(self, text: str) -> None:
        self._drawn = 0
        print(f"\n{text}", flush=True)

    def draw(self, lines: list[str], line: str) -> None:
        """Show `lines` in the place of those drawn before; without a terminal, print `line`."""
        if not self._redraws:
            print(f"  {line}", flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        text = "".join(f"\x1b[2K{one[:width]}\n" for one in lines)
        print(f"{up}{text}", end="", flush=True)
        self._drawn = len(lines)


def percentiles_ms(seconds: list[float]) -> tuple[float, float]:
    """Return the 50th and 99th percentile in milliseconds."""
    p50, p99 = np.percentile(np.array(seconds or [0.0]) * 1000, [50, 99])
    return float(p50), float(p99)


# -- images ----------------------------------------------------------------------------------------


async def classify(client: aio.Client, data: "Data", count: int) -> None:
    """Send `count` test images as one batch and print answers beside truths."""
    images, truths = data.images, data.digits
    picked = np.linspace(0, len(images) - 1, count).astype(int)
    model = await client.model("digits")
    began = time.monotonic()
    prediction = await client.predict(model.name, images[picked])
    seconds = time.monotonic() - began
    entry = next(entry for entry in model.manifest["outputs"] if entry.get("labels"))
    answers = [guesses(entry, row, 1)[0].label for row in prediction[entry["name"]]]
    right = sum(a == str(t) for a, t in zip(answers, truths[picked], strict=True))
    for start in range(0, count, 32):
        print(f"  truth   {' '.join(str(t) for t in truths[picked[start : start + 32]])}")
        print(f"  answer  {' '.join(answers[start : start + 32])}")
    print(
        f"  {right} of {count} right, one batch, {1000 * seconds:.1f} ms (server: waited "
        f"{prediction.timing.queue_us / 1000:.1f} ms, computed "
        f"{prediction.timing.compute_us / 1000:.1f} ms)"
    )


# -- recordings ------------------------------------------------------------------------------------


@dataclass
class Speaker:
    """One recording that is being streamed."""

    recording: fsdd.Recording
    belief: Guess | None = None
    done: bool = False
    latencies: list[float] = field(default_factory=list)  # seconds

    @property
    def seconds(self) -> float:
        return len(self.recording.pcm) / fsdd.RATE_HZ

    @property
    def right(self) -> bool:
        return self.belief is not None and self.belief.label == str(self.recording.digit)

    @property
    def real_time_factor(self) -> float:
        """Time from sending each chunk to its answer, by the time recorded."""
        return sum(self.latencies) / self.seconds

    def cell(self) -> str:
        heard = f"{self.belief.label} {self.belief.value:4.0%}" if self.belief else "…"
        bar = "█" * round(8 * self.belief.value) if self.belief else ""
        mark = ("✓" if self.right else "✗") if self.done else " "
        return f"{self.recording.digit} {self.recording.speaker:<9} {heard:<7} {bar:<8} {mark}"


async def listen(client: aio.Client, data: "Data", count: int, screen: Screen) -> list[Speaker]:
    """Stream `count` test recordings at once, each in 20 ms chunks at the pace of speech."""
    picked = np.linspace(0, len(data.recordings) - 1, count).astype(int)
    speakers = [Speaker(data.recordings[i]) for i in picked]
    model = await client.model("spoken-digits")
    entries = {entry["name"]: entry for entry in model.manifest["outputs"] if entry.get("labels")}
    entry = entries.get("answer") or next(iter(entries.values()))
    show = asyncio.create_task(_show(speakers, screen))
    opened = asyncio.Barrier(count)
    try:
        async with asyncio.TaskGroup() as group:
            for index, speaker in enumerate(speakers):
                # Microphones do not tick together: each begins its 20 ms a little later.
                delay = CHUNK_SECONDS * index / count
                stream = client.stream(
                    model.name, period_ms=round(1000 * CHUNK_SECONDS), label=speaker.recording.name
                )
                group.create_task(_stream(stream, entry, speaker, opened, delay))
    finally:
        show.cancel()
        await asyncio.wait([show])
    return speakers


async def _stream(
    stream: aio.Stream,
    entry: dict[str, Any],
    speaker: Speaker,
    opened: asyncio.Barrier,
    delay_seconds: float,
) -> None:
    """Stream one recording once all are open; keep what is believed of it."""
    async with stream:
        await opened.wait()
        chunks = _spoken(speaker.recording.pcm, time.monotonic() + delay_seconds)
        async for output in stream.run(chunks):
            speaker.latencies.append(output.latency_seconds)
            array = output.outputs.get(entry["name"])
            frame = None if array is None else last_frame(entry, array)
            if frame is not None:
                speaker.belief = guesses(entry, frame.reshape(-1), 1)[0]
    speaker.done = True


async def _spoken(pcm: NDArray[np.int16], began: float) -> AsyncIterator[NDArray[np.int16]]:
    """Yield each 20 ms of int16 [160] when a microphone would have recorded them."""
    size = round(fsdd.RATE_HZ * CHUNK_SECONDS)
    for number, start in enumerate(range(0, len(pcm), size), 1):
        await asyncio.sleep(began + number * CHUNK_SECONDS - time.monotonic())
        yield pcm[start : start + size]


async def _show(speakers: list[Speaker], screen: Screen) -> None:
    began = time.monotonic()
    try:
        while True:
            await asyncio.sleep(0.1)
            _draw(speakers, time.monotonic() - began, screen)
    finally:
        _draw(speakers, time.monotonic() - began, screen)


def _draw(speakers: list[Speaker], seconds: float, screen: Screen) -> None:
    cells = [speaker.cell() for speaker in speakers]
    columns = 3 if shutil.get_terminal_size().columns >= 102 else 2
    rows = ["  " + "   ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    heard = " ".join(f"{s.recording.digit}:{s.belief.label if s.belief else '…'}" for s in speakers)
    screen.draw([f"  {seconds:.1f} s", *rows], f"{seconds:4.1f} s  spoken:believed  {heard}")


def print_speakers(speakers: list[Speaker]) -> None:
    print("\n  recording           truth  answer   p50 ms  p99 ms  real-time factor")
    for speaker in speakers:
        p50, p99 = percentiles_ms(speaker.latencies)
        mark = "" if speaker.right else "  ✗"
        answer = str(speaker.belief) if speaker.belief else "-"
        print(
            f"  {speaker.recording.name:<20}{speaker.recording.digit:>4}  "
            f"{answer:<9}{p50:>6.1f}  {p99:>6.1f}  "
            f"{speaker.real_time_factor:>16.3f}{mark}"
        )
    right = sum(speaker.right for speaker in speakers)
    recorded = sum(speaker.seconds for speaker in speakers)
    every = [seconds for speaker in speakers for seconds in speaker.latencies]
    p50, p99 = percentiles_ms(every)
    print(
        f"  {'all at once':<20}{right:>4} of {len(speakers)} right  {p50:>6.1f}  {p99:>6.1f}  "
        f"{sum(every) / recorded:>16.3f}"
    )
    print(
        "  (latency: from sending 20 ms of sound to its answer; real-time factor: the sum of these\n"
        "  by the time recorded; below 1, answers come before the next 20 ms are spoken)"
    )


# -- a year of sensors -----------------------------------------------------------------------------


@dataclass
class Year:
    """What came of the forecasts of the oil temperature, in °C."""

    hours: int
    seconds: float
    latencies: list[float]  # seconds
    error: float  # mean absolute error of the next 24 hours
    naive_error: float  # of saying "as it is now" for as long


async def forecast(client: aio.Client, data: "Data", hours: int, screen: Screen) -> Year:
    """Feed the last `hours` of the series, a day a chunk, and compare each forecast with what came."""
    series = data.series
    values, dates = series.values[-hours:], series.dates[-hours:]
    oil = series.columns.index("OT")
    model = await client.model("oil-temperature")
    name = model.manifest["outputs"][0]["name"]
    stream = client.stream(model.name, label="a year")
    forecasts: list[Floats] = []  # one of [hours, 24] a chunk
    latencies: list[float] = []
    seen = 0
    began = time.monotonic()
    async with stream:
        days = (values[start : start + HOURS_A_CHUNK] for start in range(0, hours, HOURS_A_CHUNK))
        async for output in stream.run(days):
            latencies.append(output.latency_seconds)
            if name not in output.outputs:
                continue
            ahead = output[name][:, :24, oil]  # of [hours, 96, 7]
            forecasts.append(ahead)
            seen += len(ahead)
            if seen % (24 * 30) == 0 and seen + 24 <= hours:
                told = (
                    f"{dates[seen - 1]} oil {values[seen - 1, oil]:5.1f} °C; in 24 h: forecast "
                    f"{ahead[-1, -1]:5.1f}, truth {values[seen + 23, oil]:5.1f}"
                )
                screen.draw([f"  {told}"], told)
    seconds = time.monotonic() - began
    error, naive_error = _errors(np.concatenate(forecasts), values[:, oil])
    return Year(hours, seconds, latencies, error, naive_error)


def _errors(forecasts: Floats, truth: Floats) -> tuple[float, float]:
    """Return the mean absolute errors of forecasts [hours, 24], and of the last value kept.

    Row h is what was forecast after truth[h] for the 24 hours that follow it.
    """
    known = len(truth) - 24
    after = np.lib.stride_tricks.sliding_window_view(truth[1:], 24)[:known]
    error = np.abs(forecasts[:known] - after).mean()
    return float(error), float(np.abs(truth[:known, np.newaxis] - after).mean())


def print_year(year: Year) -> None:
    p50, p99 = percentiles_ms(year.latencies)
    print(
        f"  {year.hours} hours in {year.seconds:.1f} s, {HOURS_A_CHUNK} a chunk: p50 {p50:.1f} ms, "
        f"p99 {p99:.1f} ms, real-time factor {year.seconds / (3600 * year.hours):.2g}\n"
        f"  oil temperature, the next 24 hours: mean error {year.error:.2f} °C; "
        f"of saying 'as now': {year.naive_error:.2f} °C"
    )


# -- metrics ---------------------------------------------------------------------------------------


def print_metrics(url: str) -> None:
    """Print a handful of the server's Prometheus metrics, summed for each model."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        text = response.read().decode()
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, model, value in _samples(text):
        sums[model][name] += value
    print(
        f"  {'model':<18}{'sequences':>10}{'chunks':>8}{'batches':>9}{'rows a batch':>14}"
        f"{'mean latency ms':>17}"
    )
    for model, of in sorted(sums.items()):
        rows = of["tenuto_batch_size_sum"] / max(of["tenuto_batch_size_count"], 1)
        answered = max(of["tenuto_chunk_latency_seconds_count"], 1)
        latency_ms = 1000 * of["tenuto_chunk_latency_seconds_sum"] / answered
        print(
            f"  {model:<18}{of['tenuto_sequences_started_total']:>10.0f}"
            f"{of['tenuto_chunks_total']:>8.0f}{of['tenuto_batches_total']:>9.0f}{rows:>14.1f}"
            f"{latency_ms:>17.2f}"
        )


def _samples(text: str) -> Iterator[tuple[str, str, float]]:
    """Yield (name, model, value) of each sample that is about a model."""
    for line in text.splitlines():
        found = re.match(r'(\w+)\{.*?\bmodel="([^"]*)".*?\} (\S+)', line)
        if found is not None:
            yield found[1], found[2], float(found[3])


# -- the whole -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """What is sent: uint8 images [n, 28, 28] and their digits [n], recordings, the series."""

    images: NDArray[np.uint8]
    digits: NDArray[np.uint8]
    recordings: list[fsdd.Recording]
    series: etth1.EtthSeries


def load() -> Data:
    """Load all data before the server starts, so that what is missing is said at once."""
    try:
        return Data(*mnist.test(), fsdd.recordings(split="test"), etth1.series())
    except (store.DataUnavailable, store.ChecksumMismatch) as error:
        raise DemoError("DATA_UNAVAILABLE", str(error)) from error


async def demonstrate(server: Server, data: Data, arguments: argparse.Namespace) -> None:
    screen = Screen()
    async with aio.Client(server.address) as client:
        screen.title(f"digits: {arguments.images} handwritten digits in one batch")
        await classify(client, data, arguments.images)
        screen.title(f"spoken-digits: {arguments.recordings} recordings at once, 20 ms a chunk, as spoken")
        speakers = await listen(client, data, arguments.recordings, screen)
        print_speakers(speakers)
        screen.title(f"oil-temperature: {arguments.hours} hours of seven sensors")
        print_year(await forecast(client, data, arguments.hours, screen))
    screen.title(f"metrics, from {server.metrics_url}")
    print_metrics(server.metrics_url)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM and SIGHUP unwind the stack, so that the server is stopped on the way."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(arguments: argparse.Namespace) -> None:
    if not Path(arguments.repository).is_dir():
        raise DemoError("MODELS_MISSING", f"{arguments.repository} is no folder; run: make models")
    data = load()
    print(f"starting tenuto serve {arguments.repository} …", flush=True)
    with stopped_by_sigterm(), Server(arguments.repository) as server:
        print(f"{server.models} on {server.address}, {server.provider}", flush=True)
        try:
            asyncio.run(demonstrate(server, data, arguments))
        except (TenutoError, OSError, ExceptionGroup) as error:
            cause: BaseException = error
            while isinstance(cause, BaseExceptionGroup):  # of the recordings' tasks
                cause = cause.exceptions[0]
            if not isinstance(cause, TenutoError | OSError):
                raise
            if not server.is_running:
                server.died(f"it died under the demo ({cause})")
            raise DemoError("SERVER_REFUSED", str(cause)) from cause
    print("\nthe server has stopped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="demo")
    parser.add_argument("--repository", type=Path, default=EXPORTED)
    parser.add_argument("--images", type=_between(1, 1000), default=64)
    parser.add_argument("--recordings", type=_between(1, 300), default=24)
    parser.add_argument("--hours", type=_between(48, 17420), default=8760)
    arguments = parser.parse_args()
    if sys.platform == "win32":
        print("error: PLATFORM_UNSUPPORTED: the server needs Linux or macOS", file=sys.stderr)
        return 1
    try:
        run(arguments)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _between(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {number}")
        return number

    return parse


if __name__ == "__main__":
    sys.exit(main())
