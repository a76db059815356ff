"""The command `tenuto`: what a client does is here, `serve`, `adopt`, `train` and others in their extras.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage or a missing extra, 130 Ctrl-C.
The client commands read TENUTO_SERVER, TENUTO_TIMEOUT_SECONDS and TENUTO_REPLY_SECONDS; an option
given on the command line comes first.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TenutoError, invalid

if TYPE_CHECKING:
    from . import Client, Loaded, Model, Output, Stream
    from .recording import Recording
    from .tensor import Array, Inputs

# Subcommand -> its module, the extra it needs, and whether the module wants the subcommand's name.
_ELSEWHERE = {
    "serve": ("tenuto.serving.cli", "serving", False),
    "inspect": ("tenuto.serving.adoption.cli", "serving", True),
    "check": ("tenuto.serving.adoption.cli", "serving", True),
    "adopt": ("tenuto.serving.adoption.cli", "serving", True),
    "train": ("tenuto.training.cli", "training", True),
    "export": ("tenuto.training.cli", "training", True),
    "evaluate": ("tenuto.training.cli", "training", True),
    "diagnose": ("tenuto.training.cli", "diagnosis", True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _ELSEWHERE:
        return _run_elsewhere(words)
    arguments = _parser().parse_args(words)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except TenutoError as error:
        return _fail(arguments.command, str(error))
    except ModuleNotFoundError as error:
        return _missing(arguments.command, error, "midi")
    except OSError as error:
        return _fail(arguments.command, f"{error.filename or ''}: {error.strerror or error}")
    return 0


def _fail(command: str, text: str) -> int:
    print(f"tenuto {command}: {' '.join(text.split())}", file=sys.stderr)
    return 1


def _missing(command: str, error: ImportError, extra: str) -> int:
    text = f"tenuto {command}: {error}; install what it needs: pip install 'tenuto[{extra}]'"
    print(text, file=sys.stderr)
    return 2


def _run_elsewhere(words: list[str]) -> int:
    command = words[0]
    module, extra, wants_name = _ELSEWHERE[command]
    try:
        run = import_module(module).main
    except ImportError as error:
        return _missing(command, error, extra)
    try:
        return int(run(words if wants_name else words[1:]) or 0)
    except KeyboardInterrupt:
        return 130


# -- arguments -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenuto", description="An inference server that holds its callers' recurrent state."
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve the models of a repository (extra: serving)")
    commands.add_parser("inspect", help="say what an ONNX file is (extra: serving)")
    commands.add_parser("check", help="check that a model keeps what it is served for (extra: serving)")
    commands.add_parser("adopt", help="put an ONNX file into a repository (extra: serving)")
    commands.add_parser("train", help="train and export a model (extra: training)")
    commands.add_parser("export", help="export a trained model anew (extra: training)")
    commands.add_parser("evaluate", help="score an exported model (extra: training)")
    commands.add_parser("diagnose", help="draw what the networks do (extra: diagnosis)")

    models = _client_command(commands, "models", _models, "list the models of a server")
    models.add_argument("--json", action="store_true", help="print a JSON list")

    for name, run, text in (
        ("load", _load_model, "have the newest version of a model serve, now"),
        ("unload", _unload_model, "let go of a model until it is loaded; its sequences end with tokens"),
        ("reload", _reload_model, "load a model as its folder is now, other files in a version's place too"),
    ):
        command = _client_command(commands, name, run, f"{text} (of operators; serve --model-control)")
        command.add_argument("model", metavar="MODEL")
        command.add_argument(
            "--wait-seconds",
            type=_seconds,
            default=600.0,
            metavar="SECONDS",
            help="for the outcome (default 600)",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")

    sequences = _client_command(commands, "sequences", _sequences, "list the live sequences of a server")
    sequences.add_argument("--model", default="", metavar="MODEL", help="of this model alone")
    sequences.add_argument("--json", action="store_true", help="print a JSON list")

    end = _client_command(commands, "end", _end, "end a live sequence; its client may go on with it")
    end.add_argument("sequence_id", metavar="SEQUENCE_ID", help="as tenuto sequences prints it")

    predict = _client_command(commands, "predict", _predict, "send files as one batch")
    predict.add_argument("model", metavar="MODEL")
    predict.add_argument("files", metavar="FILE", nargs="+", help=".png, .jpg or .npy")
    predict.add_argument("--top", type=_count, default=3, help="labels for each file (default 3)")
    predict.add_argument("--json", action="store_true", help="print one JSON object")
    _version_option(predict)

    generate = _client_command(commands, "generate", _generate, "have a model go on by itself")
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument(
        "--prompt", metavar="TEXT", help="what a model of text begins with (default: a new line)"
    )
    generate.add_argument("--count", type=_count, help="characters or steps (default 500 or 64)")
    generate.add_argument("--seed", type=_seed, help="for the same again (default: drawn, and told)")
    generate.add_argument(
        "--temperature", type=_positive, help="below 1 it dares less (default: the model's)"
    )
    generate.add_argument("--top-k", type=_count, help="of the k most probable ones (default: the model's)")
    generate.add_argument("-o", "--output", metavar="FILE.mid", help="write chords as MIDI (extra: midi)")
    generate.add_argument(
        "--tempo", type=_positive, default=90.0, help="of MIDI, in beats a minute (default 90)"
    )
    _version_option(generate)

    stream = _client_command(commands, "stream", _stream, "send one recording as a sequence")
    stream.add_argument("model", metavar="MODEL")
    stream.add_argument("file", metavar="FILE.wav|FILE.csv", help="mono 16-bit sound, or columns")
    stream.add_argument("--chunk-ms", type=_count, default=20, help="of sound (default 20)")
    stream.add_argument("--chunk-rows", type=_count, default=1, help="of a CSV file (default 1)")
    stream.add_argument("--realtime", action="store_true", help="at the pace of the recording")
    stream.add_argument("--json", action="store_true", help="print a JSON object for each output")
    _version_option(stream)
    return parser


def _client_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    options: dict[str, tuple[Callable[[str], Any], str, str]] = {
        "server": (str, "127.0.0.1:8001", "the server, or several behind commas, taken in turn"),
        "timeout_seconds": (_seconds, "10", "for each call"),
        "reply_seconds": (_seconds, "30", "for each output of a stream"),
    }
    for option, (kind, default, help_text) in options.items():
        variable = f"TENUTO_{option.upper()}"
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=kind,
            default=os.environ.get(variable, default),
            metavar="HOST:PORT[,…]" if option == "server" else "SECONDS",
            help=f"{help_text} (default: {variable}, else {default})",
        )
    files = {
        "token_file": "a file with the token that says who calls",
        "tls_ca": "a PEM file of authorities: the connection is encrypted, and the server must be of one",
        "tls_client_cert": "a PEM file with the certificate that is shown to the server",
        "tls_client_key": "a PEM file with its key",
    }
    for option, help_text in files.items():
        variable = f"TENUTO_{option.upper()}"
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            default=os.environ.get(variable, ""),
            metavar="FILE",
            help=f"{help_text} (default: {variable})",
        )
    parser.add_argument(
        "--tls",
        action="store_true",
        help="encrypted, by the authorities that gRPC knows; --tls-ca does it too",
    )
    return parser


def _version_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-version", type=_count, default=0, metavar="N", help="default: the newest")


class _Version(argparse.Action):
    """--version, read only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and leave")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from . import __version__

        print(f"tenuto {__version__}")
        parser.exit()


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^64 - 1, got {text!r}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return number


# -- tenuto models ---------------------------------------------------------------------------------


def _client(arguments: argparse.Namespace) -> "Client":
    from . import Client

    return Client(arguments.server, **_connection(arguments))


def _connection(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a client of either kind connects.

    Raises InvalidInput for a file that cannot be read.
    """
    return {
        "timeout_seconds": arguments.timeout_seconds,
        "reply_seconds": arguments.reply_seconds,
        # Read before every call: a stream may outlive its token.
        "token": (lambda: _content(arguments.token_file).decode().strip()) if arguments.token_file else "",
        "credentials": _credentials(arguments),
    }


def _credentials(arguments: argparse.Namespace) -> Any:
    shown = [arguments.tls_client_key, arguments.tls_client_cert]
    if any(shown) != all(shown):
        raise invalid("--tls-client-cert and --tls-client-key come together", "WRONG_SETTING")
    if not (arguments.tls or arguments.tls_ca or any(shown)):
        return None
    import grpc

    authorities = _content(arguments.tls_ca) if arguments.tls_ca else None
    return grpc.ssl_channel_credentials(authorities, *(_content(file) if file else None for file in shown))


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise invalid(f"{file} cannot be read: {error.strerror}", "WRONG_SETTING") from error


def _models(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    with _client(arguments) as client:
        models = client.models()
    if arguments.json:
        print(json.dumps([_unfolded(asdict(model)) for model in models]))
        return
    # A line of a terminal is cut at its end; what is piped elsewhere is whole.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    rows = [_HEADINGS, *map(_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, model in zip(rows, (None, *models), strict=True):
        line = "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        print(line[:width])
        if model is not None and model.why:
            print(f"  {' '.join(model.why.split())}")


_HEADINGS = ("MODEL", "STATE", "LIVE/SLOTS", "STATES/MOST", "FILES", "PROVIDER", "SHA256", "DESCRIPTION")


def _row(model: "Model") -> tuple[str, ...]:
    """Return a model's cells under _HEADINGS; "-" where there is nothing to tell."""
    states = f"{_size(model.state_bytes_used)}/{_size(model.state_bytes)}"
    return (
        f"{model.name}/{model.version}",
        model.state,
        f"{model.sequences}/{model.slots}" if model.stateful else "-",
        states if model.stateful else "-",
        _size(model.file_bytes) if model.file_bytes else "-",
        model.provider.removesuffix("ExecutionProvider") or "-",
        model.sha256[:12] or "-",
        model.description.partition(". ")[0],
    )


def _size(count: int) -> str:
    """Return that many bytes for people: 0, 512 B, 1.5 MiB."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.3g} {units[0]}"


def _unfolded(listed: dict[str, Any]) -> dict[str, Any]:
    """Return a model without its manifest, which no list has."""
    return {name: value for name, value in listed.items() if name != "manifest"}


# -- tenuto load, tenuto unload, tenuto reload -----------------------------------------------------


def _load_model(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        loaded = client.load(arguments.model, timeout_seconds=arguments.wait_seconds)
    _tell_loaded(arguments, loaded)


def _reload_model(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        loaded = client.reload(arguments.model, timeout_seconds=arguments.wait_seconds)
    _tell_loaded(arguments, loaded)


def _tell_loaded(arguments: argparse.Namespace, loaded: "Loaded") -> None:
    from dataclasses import asdict

    model = loaded.model
    if arguments.json:
        told = {"changed": loaded.changed, "sequences": loaded.sequences}
        print(json.dumps({"model": _unfolded(asdict(model)), **told}))
        return
    how = "serves now" if loaded.changed else "served already"
    print(f"{model.name}/{model.version} {how}, SHA-256 {model.sha256[:12]}")
    if loaded.sequences:
        print(f"{_count_of(loaded.sequences)} of the files before ended")


def _unload_model(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        unloaded = client.unload(arguments.model, timeout_seconds=arguments.wait_seconds)
    if arguments.json:
        told = {"versions": list(unloaded.versions), "sequences": unloaded.sequences}
        print(json.dumps({"model": arguments.model, **told}))
        return
    versions = ", ".join(f"{arguments.model}/{version}" for version in unloaded.versions)
    print(f"unloaded {versions}; {_count_of(unloaded.sequences)} ended")


def _count_of(sequences: int) -> str:
    return "1 live sequence" if sequences == 1 else f"{sequences or 'no'} live sequences"


# -- tenuto sequences, tenuto end ------------------------------------------------------------------


def _sequences(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    with _client(arguments) as client:
        sequences = client.sequences(arguments.model)
    if arguments.json:
        print(json.dumps([asdict(one) for one in sequences]))
        return
    for one in sequences:
        print(
            f"{one.id}  {one.model}/{one.version}  step {one.last_step}  {one.age_seconds:.1f} s old  "
            f"{one.idle_seconds:.1f} s idle  {one.label}".rstrip()
        )


def _end(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        client.end_sequence(arguments.sequence_id)


# -- tenuto predict --------------------------------------------------------------------------------


def _predict(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        model = client.model(arguments.model, arguments.model_version)
        inputs, rows = _batch(arguments.files, model.manifest)
        prediction = client.predict(model.name, inputs, model.version)
    if arguments.json:
        answers = [
            {"file": row, "outputs": {k: v[i].tolist() for k, v in prediction.outputs.items()}}
            for i, row in enumerate(rows)
        ]
        timing = {
            "queue_us": prediction.timing.queue_us,
            "compute_us": prediction.timing.compute_us,
        }
        print(
            json.dumps(
                {
                    "model": model.name,
                    "version": prediction.version,
                    "answers": answers,
                    "timing": timing,
                }
            )
        )
        return
    from .belief import describe

    entries = [entry for entry in model.manifest["outputs"] if entry["name"] in prediction.outputs]
    for i, row in enumerate(rows):
        told = (describe(entry, prediction[entry["name"]][i], arguments.top) for entry in entries)
        print(f"{row}: {'; '.join(told)}")


def _batch(files: list[str], manifest: dict[str, Any]) -> tuple["Inputs", list[str]]:
    """Return the files' content as one batch, and what to call each of its rows."""
    arrays = [name.lower().endswith(".npy") for name in files]
    if any(arrays) and not all(arrays):
        raise invalid("images and .npy arrays are mixed; send one batch of each", "WRONG_INPUT")
    if not any(arrays):
        from .tensor import encoding

        images = [Path(name).read_bytes() for name in files]
        for name, image in zip(files, images, strict=True):
            encoding(name, image)  # so that the error names the file
        return images, files
    import numpy as np

    rank = len(manifest["inputs"][0]["shape"])
    batches, rows = [], []
    for name in files:
        batch = _load(name)
        if batch.ndim == rank - 1:  # one row
            batches.append(batch[np.newaxis])
            rows.append(name)
        else:
            batches.append(batch)
            rows += [f"{name}[{i}]" for i in range(len(batch) if batch.ndim else 0)]
    try:
        return np.concatenate(batches), rows
    except ValueError as error:
        shapes = ", ".join(f"{name} {list(b.shape)}" for name, b in zip(files, batches, strict=True))
        raise invalid(f"the arrays make no one batch: {shapes}", "WRONG_SHAPE") from error


def _load(name: str) -> "Array":
    import numpy as np

    try:
        array: Array = np.load(name, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise invalid(f"{name} is no .npy file of numbers: {error}", "WRONG_ENCODING") from error
    return array


# -- tenuto generate -------------------------------------------------------------------------------

# A longer text is asked for in several chunks: so it may have any length, and begins like a shorter one.
_PARTS = 1024


def _generate(arguments: argparse.Namespace) -> None:
    from . import Sampling
    from .alphabet import alphabet_of

    sampling = Sampling(arguments.seed, arguments.temperature, arguments.top_k)
    if arguments.output:
        import_module("mido")  # before the work, not behind it
    with _client(arguments) as client:
        model = client.model(arguments.model, arguments.model_version)
        rule, alphabet = model.manifest.get("generate"), alphabet_of(model.manifest)
        if rule is None:
            raise invalid(
                f"model {model.name!r} does not generate; its manifest says no `generate`", "NOT_SUPPORTED"
            )
        with client.stream(model.name, version=model.version, sampling=sampling) as stream:
            if rule["sampling"] == "bernoulli":
                _play(arguments, stream, model.manifest)
            elif alphabet is None:
                raise invalid(
                    f"model {model.name!r} generates ids that stand for no characters", "NOT_SUPPORTED"
                )
            else:
                _speak(arguments, stream, model.manifest, alphabet)
            told = stream.sampling
    if told is not None and arguments.seed is None:
        print(f"the same again: --seed {told.seed}", file=sys.stderr)


def _parts(stream: "Stream", inputs: "Inputs", count: int) -> Iterator["Output"]:
    """Yield the outputs of a chunk that goes on `count` times, whatever fits into one chunk."""
    following: Inputs | None = inputs
    for begun in range(0, count, _PARTS):
        yield from stream.generate(following, min(_PARTS, count - begun))
        following = None


def _speak(arguments: argparse.Namespace, stream: "Stream", manifest: dict[str, Any], alphabet: str) -> None:
    """Print the prompt, and each character as it comes."""
    from .alphabet import said

    if arguments.output:
        raise invalid(f"model {arguments.model!r} generates text; leave -o out", "WRONG_INPUT")
    prompt = arguments.prompt if arguments.prompt is not None else "\n" if "\n" in alphabet else alphabet[0]
    for output in _parts(stream, prompt, arguments.count or 500):
        first = (output.step, output.part) == (1, 0)  # the server has taken the prompt
        print(prompt if first else said(output, manifest, alphabet), end="", flush=True)
    print(flush=True)


def _play(arguments: argparse.Namespace, stream: "Stream", manifest: dict[str, Any]) -> None:
    """Write what is played behind a silent step, or print its pitches, a line a step."""
    import numpy as np

    from . import midi

    if arguments.prompt is not None:
        raise invalid(f"model {arguments.model!r} takes no text; leave --prompt out", "WRONG_INPUT")
    entry = manifest["inputs"][0]
    shape = [n for axis, n in enumerate(entry["shape"]) if axis != entry.get("batch_axis", 0)]
    silence = np.zeros([n if isinstance(n, int) else 1 for n in shape], entry["dtype"])
    if silence.size != midi.KEYS:
        raise invalid(
            f"a step of {arguments.model!r} has {silence.size} keys, expected a piano's 88", "WRONG_SHAPE"
        )
    steps = []
    for output in _parts(stream, silence, arguments.count or 64):
        if entry["name"] in output.outputs:
            steps.append(output[entry["name"]].reshape(-1))
            if not arguments.output:
                print(*(np.flatnonzero(steps[-1]) + midi.LOWEST_PITCH), flush=True)
    if arguments.output:
        midi.write(arguments.output, np.stack(steps), arguments.tempo)
        print(f"{arguments.output}: {len(steps)} steps")


# -- tenuto stream ---------------------------------------------------------------------------------


def _stream(arguments: argparse.Namespace) -> None:
    from .recording import read

    asyncio.run(_stream_recording(arguments, read(arguments.file)))


async def _stream_recording(arguments: argparse.Namespace, recording: "Recording") -> None:
    from . import aio

    async with aio.Client(arguments.server, **_connection(arguments)) as client:
        model = await client.model(arguments.model, arguments.model_version)
        recording = recording.suited(model.manifest["inputs"][0])
        samples = _chunk_samples(arguments, recording)
        period = samples / recording.rate_hz if arguments.realtime and recording.rate_hz else 0.0
        teller = _Teller(model.manifest["outputs"], arguments.json)
        stream = client.stream(
            model.name,
            version=model.version,
            period_ms=min(round(1000 * period), 2**32 - 1),
            label=Path(arguments.file).name.encode()[:128].decode(errors="ignore"),
        )
        began = time.monotonic()
        async with stream:
            async for output in stream.run(_paced(recording, samples, period)):
                teller.tell(output)
        teller.summarise(time.monotonic() - began, recording.seconds)


def _chunk_samples(arguments: argparse.Namespace, recording: "Recording") -> int:
    if recording.columns:
        return int(arguments.chunk_rows)
    return max(1, round((recording.rate_hz or 0.0) * int(arguments.chunk_ms) / 1000))


async def _paced(recording: "Recording", samples: int, period_seconds: float) -> AsyncIterator["Array"]:
    """Yield each chunk when its last sample would have been recorded; at once if the period is 0."""
    began = time.monotonic()
    for number, chunk in enumerate(recording.chunks(samples), 1):
        if period_seconds:
            await asyncio.sleep(began + number * period_seconds - time.monotonic())
        yield chunk


class _Teller:
    """Prints what the model believes: a line whenever its strongest labels change, or its values."""

    def __init__(self, entries: list[dict[str, Any]], as_json: bool) -> None:
        self._entries = entries
        self._as_json = as_json
        self._labels: list[str] = []
        self._latencies_ms: list[float] = []

    def tell(self, output: "Output") -> None:
        self._latencies_ms.append(1000 * output.latency_seconds)
        if self._as_json:
            print(
                json.dumps(
                    {
                        "step": output.step,
                        "part": output.part,
                        "latency_ms": round(self._latencies_ms[-1], 3),
                        "outputs": {name: v.tolist() for name, v in output.outputs.items()},
                    }
                ),
                flush=True,
            )
            return
        self._tell_in_words(output)

    def _tell_in_words(self, output: "Output") -> None:
        from .belief import describe, guesses, last_frame

        told, labels = [], []
        for entry in self._entries:
            array = output.outputs.get(entry["name"])
            frame = None if array is None else last_frame(entry, array)
            if frame is None:
                continue
            told.append(describe(entry, frame))
            if entry.get("labels"):
                labels.append(guesses(entry, frame.reshape(-1), 1)[0].label)
        if told and (labels != self._labels or not labels):
            self._labels = labels
            print(f"step {output.step}: {'; '.join(told)}", flush=True)

    def summarise(self, seconds: float, recorded_seconds: float | None) -> None:
        import numpy as np

        p50, p99 = np.percentile(self._latencies_ms or [0.0], [50, 99])
        factor = seconds / recorded_seconds if recorded_seconds else None
        if self._as_json:
            summary = {
                "outputs": len(self._latencies_ms),
                "seconds": round(seconds, 6),
                "latency_p50_ms": round(float(p50), 3),
                "latency_p99_ms": round(float(p99), 3),
                "real_time_factor": factor,
            }
            print(json.dumps({"summary": summary}))
            return
        line = (
            f"{len(self._latencies_ms)} outputs in {seconds:.2f} s; latency p50 {p50:.2f} ms, "
            f"p99 {p99:.2f} ms"
        )
        if factor is not None:
            line += f"; real-time factor {factor:.3g} ({recorded_seconds:g} s recorded)"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
