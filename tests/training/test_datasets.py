"""The loaders: what they import, what they refuse, and what they return."""

import ast
import gzip
import io
import subprocess
import sys
import wave
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenuto.training.datasets import (
    etth1,
    fsdd,
    jsb,
    magic_wand,
    mnist,
    rt_polarity,
    store,
    tinyshakespeare,
)
from tenuto.training.datasets.store import ChecksumMismatch, DataUnavailable

FOLDER = Path(mnist.__file__).parent
LOADS: list[Callable[[], Any]] = [
    mnist.test,
    lambda: fsdd.recordings("test"),
    etth1.series,
    lambda: magic_wand.strokes("test"),
    lambda: jsb.chorales("test"),
    lambda: rt_polarity.sentences("pos"),
    tinyshakespeare.text,
]
SETS = ["mnist", "fsdd", "etth1", "magic_wand", "jsb", "rt_polarity", "tinyshakespeare"]

PARTS: tuple[magic_wand.Split, ...] = ("train", "validation", "test")


def test_source_imports_numpy_and_pooch_alone() -> None:
    allowed = {"numpy", "pooch", *sys.stdlib_module_names}
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed, file


def test_importing_the_loaders_brings_no_other_package() -> None:
    code = (
        "import sys, tenuto.training.datasets.mnist, tenuto.training.datasets.fsdd\n"
        "import tenuto.training.datasets.etth1, tenuto.training.datasets.magic_wand\n"
        "import tenuto.training.datasets.etth1, tenuto.training.datasets.jsb\n"
        "import tenuto.training.datasets.rt_polarity, tenuto.training.datasets.tinyshakespeare\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'pydantic', 'grpc', 'google.protobuf'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("load", LOADS, ids=SETS)
def test_missing_file_is_named_with_its_source(
    load: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    with pytest.raises(DataUnavailable, match=rf"no file ({'|'.join(SETS)})/\S+; put it .*https://"):
        load()


def test_failed_download_tries_every_mirror_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def offline(url: str, **_: object) -> str:
        tried.append(url)
        raise OSError("no network")

    monkeypatch.delenv(store.VARIABLE, raising=False)
    monkeypatch.setattr("pooch.retrieve", offline)
    with pytest.raises(DataUnavailable, match="could not be downloaded from .* TENUTO_DATA"):
        mnist.test()
    assert tried == [f"{mirror}t10k-images-idx3-ubyte.gz" for mirror in mnist.MIRRORS]


def test_wrong_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    for folder in SETS:
        (tmp_path / folder).mkdir()
    (tmp_path / "mnist/t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    (tmp_path / "etth1/ETTh1.csv").write_bytes(b"date,OT\n")
    (tmp_path / "magic_wand/petewarden_0.json").write_bytes(b'{"strokes": []}')
    (tmp_path / "jsb/jsb-chorales-quarter.json").write_bytes(b'{"test": []}')
    (tmp_path / "rt_polarity/rt-polarity.pos").write_bytes(b"good\n")
    (tmp_path / "tinyshakespeare/input.txt").write_bytes(b"To be\n")
    _zip(tmp_path / "fsdd/recordings.zip", "recordings/")
    for load in LOADS:
        with pytest.raises(ChecksumMismatch, match="expected"):
            load()


def test_torn_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    for folder in ("mnist", "fsdd"):
        (tmp_path / folder).mkdir()
    whole = gzip.compress(b"whole")
    (tmp_path / "mnist/t10k-images-idx3-ubyte.gz").write_bytes(whole[:-4])
    (tmp_path / "fsdd/recordings.zip").write_bytes(b"PK")
    for load in LOADS[:2]:
        with pytest.raises(ChecksumMismatch, match="is not a whole"):
            load()


@pytest.mark.parametrize("prefix", ["recordings/", "free-spoken-digit-dataset-1.0.10/recordings/"])
def test_fsdd_reads_either_archive(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    (tmp_path / "fsdd").mkdir()
    files = _zip(tmp_path / "fsdd/recordings.zip", prefix)
    monkeypatch.setattr(fsdd, "CHECKSUM", fsdd.digest(files))
    test, train = fsdd.recordings("test"), fsdd.recordings("train")
    assert [(r.name, r.digit, r.speaker, r.index) for r in test] == [("3_a_4.wav", 3, "a", 4)]
    assert [r.index for r in train] == [5]
    np.testing.assert_array_equal(test[0].pcm, np.arange(8, dtype=np.int16))


def _zip(path: Path, prefix: str) -> dict[str, bytes]:
    files = {}
    for name in ("3_a_4.wav", "3_a_5.wav"):
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(np.arange(8, dtype="<i2").tobytes())
        files[name] = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix}../README.md", b"not a recording")
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return files


def test_mnist_shapes(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    images, labels = reachable(mnist.test)
    assert (images.shape, images.dtype) == ((10000, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((10000,), np.uint8)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_fsdd_split(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    test = reachable(lambda: fsdd.recordings("test"))
    train = reachable(lambda: fsdd.recordings("train"))
    assert (len(test), len(train)) == (300, 2700)
    assert {r.digit for r in test} == set(range(10))
    assert not {r.name for r in test} & {r.name for r in train}
    assert all(r.pcm.dtype == np.int16 and r.pcm.ndim == 1 and len(r.pcm) > 160 for r in test)


def test_etth1_shape(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    series = reachable(etth1.series)
    assert (series.values.shape, series.values.dtype) == ((17420, 7), np.float32)
    assert series.columns == etth1.COLUMNS
    hours = np.diff(series.dates)
    assert (hours == np.timedelta64(1, "h")).all()
    mean, std = series.statistics()
    np.testing.assert_allclose(mean[-1], 17.128262, rtol=1e-6)
    np.testing.assert_allclose(std[-1], 9.176491, rtol=1e-6)


def test_magic_wand_split(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    parts = [reachable(partial(magic_wand.strokes, part)) for part in PARTS]
    assert [len(part) for part in parts] == [600, 100, 300]
    names = [{(stroke.digit, stroke.place) for stroke in part} for part in parts]
    assert len(names[0] | names[1] | names[2]) == 1000
    for part in parts:
        assert {sum(stroke.digit == digit for stroke in part) for digit in range(10)} == {len(part) // 10}
    points = parts[2][0].points
    assert (points.shape, points.dtype) == ((96, 2), np.float32)
    assert (points * 128 == np.round(points * 128)).all()
    # These very strokes: another order would move test strokes into the training part, unseen.
    assert [stroke.place for stroke in parts[2][:5]] == [16, 46, 31, 87, 92]


def test_magic_wand_knows_no_other_split() -> None:
    with pytest.raises(ValueError, match="'train', 'validation' or 'test', got 'dev'"):
        magic_wand.strokes("dev")  # type: ignore[arg-type]


def test_jsb_split(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    splits = reachable(lambda: [jsb.chorales("train"), jsb.chorales("valid"), jsb.chorales("test")])
    assert [len(split) for split in splits] == [229, 76, 77]
    assert [sum(map(len, split)) for split in splits] == [13807, 4602, 4725]
    rolls = np.concatenate([np.concatenate(split) for split in splits])
    assert rolls.shape[1] == 88
    assert rolls.dtype == np.uint8
    assert set(np.unique(rolls)) == {0, 1}
    first = np.flatnonzero(splits[2][0][0]) + jsb.LOWEST
    assert first.tolist() == [72, 76, 79, 84]  # MIDI pitches, as the file has them


def test_rt_polarity_sides(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    good, bad = reachable(lambda: [rt_polarity.sentences("pos"), rt_polarity.sentences("neg")])
    assert (len(good), len(bad)) == (5331, 5331)
    assert all(one == one.strip() and one for one in good + bad)
    assert any("\u00e9" in one for one in good)  # UTF-8, not what Latin-1 makes of it
    assert not any("\u00c3" in one for one in good)


def test_tiny_shakespeare_alphabet(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    text = reachable(tinyshakespeare.text)
    assert "".join(sorted(set(text))) == tinyshakespeare.ALPHABET
    assert (len(text), len(tinyshakespeare.ALPHABET)) == (1115394, 65)
    assert (0, int(0.9 * len(text))) == tinyshakespeare.TRAIN
    assert (int(0.9 * len(text)), len(text)) == tinyshakespeare.TEST
