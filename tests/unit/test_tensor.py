"""What the reader accepts, what it makes of it, and that each refusal says what, expected and got."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tenuto.serving.errors import (
    TooLarge,
    WrongDtype,
    WrongEncoding,
    WrongInput,
    WrongShape,
)
from tenuto.serving.manifest import Manifest
from tenuto.serving.tensor import Reader
from tenuto.serving.text import Text
from tests import toys

from .fakes import FakeTensor, accumulator, doubler, f32

PCM = {"dtype": "int16", "scale": 1 / 32768}
PNG = [{"dtype": "uint8", "scale": 1 / 255}, {"encoding": "png"}, {"encoding": "jpeg"}]


def create_reader(max_bytes: int = 1 << 20, **x: Any) -> Reader:
    """A stateful model's reader: x is float32 [batch, time] unless said otherwise."""
    return Reader(accumulator(x=x, ragged=False), max_bytes)


def image_reader(*shape: int, max_bytes: int = 1 << 20, **x: Any) -> Reader:
    """A stateless model's reader of images."""
    spec = {"name": "image", "dtype": "float32", "shape": ["batch", *shape], "wire": PNG} | x
    return Reader(doubler(inputs=[spec]), max_bytes)


def encoded(pixels: NDArray[Any], encoding: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, encoding)
    return file.getvalue()


def grey(height: int = 4, width: int = 6) -> NDArray[np.uint8]:
    return (np.arange(height * width, dtype=np.uint8) * 3).reshape(height, width)


def behind_lengths(*files: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(f)) + f for f in files)


# Numbers.


def test_the_graphs_own_dtype_passes_untouched() -> None:
    tensor = FakeTensor.of(f32([1, 2, 3]))
    data = create_reader().read([tensor])
    assert data[0] is tensor.data


@pytest.mark.parametrize("name", ["", "x"])
def test_an_input_may_go_without_its_name(name: str) -> None:
    assert create_reader().read([FakeTensor.of(f32([1]), name)]) == (f32([1]).tobytes(),)


def test_no_samples_at_all_are_a_legal_chunk() -> None:
    assert create_reader().read([FakeTensor("", "float32", (0,), b"")]) == (b"",)


def text_reader() -> Reader:
    return Reader(Manifest.model_validate(toys.speaker()[1]), 1 << 20)


@pytest.mark.parametrize("name", ["", "id"])
def test_a_text_passes_as_it_is(name: str) -> None:
    (data,) = text_reader().read([FakeTensor(name, "utf8", (), "ab😀".encode()[:5])])
    assert (type(data), data) == (Text, b"ab\xf0\x9f\x98")
    (data,) = text_reader().read([FakeTensor(name, "int64", (2,), bytes(16))])
    assert (type(data), data) == (bytes, bytes(16))


def test_a_text_has_no_shape_and_a_limit() -> None:
    with pytest.raises(WrongShape, match=r"a text has shape \[1\], expected \[\]"):
        text_reader().read([FakeTensor("", "utf8", (1,), b"a")])
    assert text_reader().read([FakeTensor("", "utf8", (), b"a" * 65_536)])
    with pytest.raises(TooLarge, match="a text of 65537 bytes, the limit is 65536; send several chunks"):
        text_reader().read([FakeTensor("", "utf8", (), b"a" * 65_537)])
    with pytest.raises(WrongDtype, match="'x' is utf8; accepted: float32"):
        create_reader().read([FakeTensor("", "utf8", (), b"a")])


def test_wire_dtypes_are_scaled_and_shifted() -> None:
    reader = create_reader(wire=[PCM, {"dtype": "uint8", "scale": 0.5, "offset": -1.0}])
    (data,) = reader.read([FakeTensor.of(np.array([-32768, 0, 16384], np.int16))])
    assert np.frombuffer(data, np.float32).tolist() == [-1.0, 0.0, 0.5]
    (data,) = reader.read([FakeTensor.of(np.array([0, 2, 255], np.uint8))])
    assert np.frombuffer(data, np.float32).tolist() == [-1.0, 0.0, 126.5]


def test_a_wire_dtype_may_only_widen() -> None:
    reader = create_reader(dtype="int64", wire=[{"dtype": "int8"}])
    (data,) = reader.read([FakeTensor.of(np.array([-1, 5], np.int8))])
    assert np.frombuffer(data, np.int64).tolist() == [-1, 5]


def test_the_time_axis_comes_first_whatever_the_clients_order() -> None:
    reader = create_reader(shape=["batch", 2, "time"], time_axis=2)
    array = f32([[1, 2, 3], [10, 20, 30]])
    (data,) = reader.read([FakeTensor.of(array)])
    assert np.frombuffer(data, np.float32).tolist() == [1, 10, 2, 20, 3, 30]


def test_the_time_axis_may_stand_before_the_batch_axis() -> None:
    reader = create_reader(shape=["time", "batch", 2], time_axis=0, batch_axis=1)
    array = f32([[1, 2], [3, 4], [5, 6]])
    assert reader.read([FakeTensor.of(array)]) == (array.tobytes(),)


def test_what_is_taken_as_it_is() -> None:
    """Without being read again: the model's own dtype, time first, one input."""
    array = f32([[1, 2], [3, 4]])
    plain = create_reader(shape=["batch", "time", 2], time_axis=1, wire=[PCM])
    assert plain.takes_as_it_is(FakeTensor.of(array))
    assert not plain.takes_as_it_is(FakeTensor.of(array.astype(np.int16)))
    turned = create_reader(shape=["batch", 2, "time"], time_axis=2)
    assert not turned.takes_as_it_is(FakeTensor.of(array))
    spec: dict[str, Any] = {"dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    two = Reader(accumulator(inputs=[{"name": "x"} | spec, {"name": "z"} | spec]), 1 << 20)
    assert not two.takes_as_it_is(FakeTensor.of(f32([1])))


def test_a_stateless_batch_axis_may_stand_anywhere() -> None:
    spec = {"name": "x", "dtype": "float32", "shape": [2, "batch"], "batch_axis": 1}
    reader = Reader(doubler(inputs=[spec]), 1 << 20)
    (data,) = reader.read([FakeTensor.of(f32([[1, 2, 3], [4, 5, 6]]))])
    assert np.frombuffer(data, np.float32).tolist() == [1, 4, 2, 5, 3, 6]


def test_a_sequence_without_time_axis_sends_one_step() -> None:
    spec = {"name": "x", "dtype": "float32", "shape": ["batch", 2]}
    y = {"name": "y", "dtype": "float32", "shape": ["batch", 2]}
    reader = Reader(accumulator(inputs=[spec], outputs=[y]), 1 << 20)
    assert reader.read([FakeTensor.of(f32([1, 2]))]) == (f32([1, 2]).tobytes(),)
    with pytest.raises(WrongShape, match=r"shape \[1, 2\], expected \[2\]"):
        reader.read([FakeTensor.of(f32([[1, 2]]))])


# Refusals.


@pytest.mark.parametrize("dtype, shown", [("float64", "float64"), ("", "without a dtype"), ("png", "png")])
def test_a_wrong_dtype_is_told_with_all_that_are_accepted(dtype: str, shown: str) -> None:
    with pytest.raises(WrongDtype, match=f"input 'x' is {shown}; accepted: float32, int16") as caught:
        create_reader(wire=[PCM]).read([FakeTensor("x", dtype, (1,), bytes(4))])
    assert caught.value.reason == "WRONG_DTYPE"


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (3, 2, 1), (0, 3)])
def test_a_wrong_shape_is_told_with_the_expected_one(shape: tuple[int, ...]) -> None:
    reader = create_reader(shape=["batch", "time", 2])
    with pytest.raises(WrongShape, match=rf"input 'x' has shape \[{', '.join(map(str, shape))}\]") as caught:
        reader.read([FakeTensor("x", "float32", shape, bytes(4 * int(np.prod(shape))))])
    assert "expected ['time', 2]" in str(caught.value)


@pytest.mark.parametrize("nbytes", [0, 11, 13, 16])
def test_bytes_that_do_not_fill_the_shape_are_counted(nbytes: int) -> None:
    with pytest.raises(WrongShape, match=rf"brings {nbytes} bytes, expected 12 for float32 \[3\]"):
        create_reader().read([FakeTensor("x", "float32", (3,), bytes(nbytes))])


def test_a_shape_of_giants_is_refused_without_allocating() -> None:
    with pytest.raises(WrongShape, match="expected 17179869180"):
        create_reader().read([FakeTensor("x", "float32", (2**32 - 1,), b"1234")])


def test_an_unknown_input_is_told_which_there_are() -> None:
    with pytest.raises(WrongInput, match="'pcm' is not expected, or sent twice; the model's inputs are x"):
        create_reader().read([FakeTensor.of(f32([1]), "pcm")])


# Several inputs.


def two_inputs(*, stateful: bool = True) -> Reader:
    if not stateful:
        spec = {"dtype": "float32", "shape": ["batch", 2]}
        return Reader(doubler(inputs=[{"name": "a"} | spec, {"name": "b"} | spec]), 1 << 20)
    timed = {"dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    return Reader(accumulator(inputs=[{"name": "a"} | timed, {"name": "b"} | timed]), 1 << 20)


ONE, TWO = f32([1]), f32([2])


@pytest.mark.parametrize(
    "tensors",
    [
        [FakeTensor.of(ONE), FakeTensor.of(TWO)],
        [FakeTensor.of(ONE, "a"), FakeTensor.of(TWO, "b")],
        [FakeTensor.of(TWO, "b"), FakeTensor.of(ONE, "a")],
        [FakeTensor.of(ONE), FakeTensor.of(TWO, "b")],
    ],
    ids=["by order", "by name", "by name, other order", "mixed"],
)
def test_inputs_are_found_by_name_or_by_order(tensors: list[FakeTensor]) -> None:
    assert two_inputs().read(tensors) == (ONE.tobytes(), TWO.tobytes())


@pytest.mark.parametrize("tensors, missing", [([], "a, b"), ([FakeTensor.of(ONE, "b")], "a")])
def test_a_missing_input_is_named(tensors: list[FakeTensor], missing: str) -> None:
    with pytest.raises(WrongInput, match=f"input {missing} is missing; the model's inputs are a, b"):
        two_inputs().read(tensors)


@pytest.mark.parametrize(
    "second, shown",
    [(FakeTensor.of(ONE, "a"), "'a'"), (FakeTensor.of(ONE, "c"), "'c'"), (FakeTensor.of(ONE), "'number 3'")],
)
def test_an_input_sent_twice_is_refused(second: FakeTensor, shown: str) -> None:
    tensors = [FakeTensor.of(ONE, "a"), second]
    if not second.name:
        tensors.insert(1, FakeTensor.of(ONE, "b"))
    with pytest.raises(WrongInput, match=f"tensor {shown} is not expected, or sent twice"):
        two_inputs().read(tensors)


def test_inputs_of_a_request_bring_the_same_rows() -> None:
    tensors = [FakeTensor.of(np.ones((n, 2), np.float32)) for n in (2, 3)]
    with pytest.raises(
        WrongShape, match="different lengths: a 2, b 3; send the same time, or rows, for each"
    ):
        two_inputs(stateful=False).read(tensors)


def test_inputs_of_a_chunk_bring_the_same_time() -> None:
    """Else what one is ahead of the other would pile up unseen."""
    tensors = [FakeTensor.of(ONE), FakeTensor.of(f32([1, 2, 3]))]
    with pytest.raises(WrongShape, match="different lengths: a 1, b 3; send the same time"):
        two_inputs().read(tensors)


def test_what_samples_become_is_bounded() -> None:
    """A byte that becomes four must not make four times the limit of a message."""
    reader = create_reader(wire=[{"dtype": "uint8"}], max_bytes=40)
    assert len(reader.read([FakeTensor.of(np.zeros(10, np.uint8))])[0]) == 40
    with pytest.raises(TooLarge, match="11 samples become 44 bytes, the limit is 40; send fewer at once"):
        reader.read([FakeTensor.of(np.zeros(11, np.uint8))])


# Encoded images.


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_one_image_needs_no_length(encoding: str) -> None:
    pixels = np.full((4, 6), 51, np.uint8)
    (data,) = image_reader(4, 6).read([FakeTensor("", encoding, (), encoded(pixels, encoding))])
    np.testing.assert_allclose(np.frombuffer(data, np.float32), 0.2, atol=0.01)


def test_several_images_come_behind_their_lengths() -> None:
    files = behind_lengths(encoded(grey()), encoded(255 - grey()))
    (data,) = image_reader(4, 6).read([FakeTensor("", "png", (2,), files)])
    expected = np.stack([grey(), 255 - grey()]).astype(np.float32) / 255
    np.testing.assert_allclose(np.frombuffer(data, np.float32).reshape(2, 4, 6), expected, atol=1e-6)


def test_an_image_is_the_same_as_its_pixels() -> None:
    reader = image_reader(4, 6)
    as_pixels = reader.read([FakeTensor.of(grey()[None])])
    assert reader.read([FakeTensor("", "png", (), encoded(grey()))]) == as_pixels


@pytest.mark.parametrize("shape", [(4, 6, 3), (3, 4, 6)])
def test_colours_stand_first_or_last_as_the_graph_wants(shape: tuple[int, int, int]) -> None:
    pixels = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    (data,) = image_reader(*shape).read([FakeTensor("", "png", (), encoded(pixels))])
    expected = pixels if shape[2] == 3 else np.moveaxis(pixels, 2, 0)
    got = np.frombuffer(data, np.float32).reshape(shape) * 255
    np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 4, 6), (4, 6, 1), (4, 6)])
def test_colour_images_are_made_grey_where_the_model_is(shape: tuple[int, ...]) -> None:
    pixels = np.repeat(grey()[:, :, None], 3, axis=2)
    (data,) = image_reader(*shape).read([FakeTensor("", "png", (), encoded(pixels))])
    np.testing.assert_allclose(np.frombuffer(data, np.float32).reshape(4, 6) * 255, grey(), atol=1e-3)


def test_a_model_of_bytes_takes_pixels_as_they_are() -> None:
    reader = image_reader(4, 6, dtype="uint8", wire=[{"encoding": "png"}])
    (data,) = reader.read([FakeTensor("", "png", (), encoded(grey()))])
    assert data == grey().tobytes()


def test_a_wrong_size_is_refused_before_the_pixels_are_decoded() -> None:
    """The file has a header alone: decoding it would fail in another way."""
    header = encoded(np.zeros((700, 900), np.uint8))[:60]
    with pytest.raises(WrongShape, match="an image of 900x700 pixels, expected 6x4"):
        image_reader(4, 6).read([FakeTensor("", "png", (), header)])


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    header = bytearray(encoded(np.zeros((4, 4), np.uint8)))
    header[16:24] = struct.pack(">II", side, side)
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    with warnings.catch_warnings(), pytest.raises((WrongShape, WrongEncoding), match="'image'"):
        warnings.simplefilter("ignore")
        image_reader(4, 4).read([FakeTensor("", "png", (), bytes(header))])


def test_reading_images_leaves_the_process_wide_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers run on several threads; `warnings.catch_warnings` belongs to the whole process."""
    before, seen = warnings.filters, []
    original = Image.open

    def spy(*arguments: Any, **keywords: Any) -> Any:
        seen.append(warnings.filters is before)
        return original(*arguments, **keywords)

    monkeypatch.setattr(Image, "open", spy)
    image_reader(4, 6).read([FakeTensor("", "png", (), encoded(grey()))])
    assert seen == [True]


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
@pytest.mark.parametrize("keep", [0, 10, 100])
def test_a_truncated_image_is_refused_by_name(encoding: str, keep: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (16, 16), np.uint8)
    file = encoded(noise, encoding)[:keep]
    with pytest.raises(WrongEncoding, match=f"input 'image': the bytes are no {encoding} image"):
        image_reader(16, 16).read([FakeTensor("", encoding, (), file)])


def test_a_png_is_no_jpeg() -> None:
    with pytest.raises(WrongEncoding, match="are no jpeg image"):
        image_reader(4, 6).read([FakeTensor("", "jpeg", (), encoded(grey()))])


@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_no_bytes_make_the_reader_fail_in_an_unnamed_way(at: int, value: int, cut: int) -> None:
    file = bytearray(encoded(grey(16, 16)))
    file[at % len(file)] = value
    with contextlib.suppress(WrongEncoding, WrongShape):
        image_reader(16, 16).read([FakeTensor("", "png", (), bytes(file[: len(file) - cut]))])


@pytest.mark.parametrize(
    "data, count",
    [
        (b"", 1),
        (b"\x05\x00\x00", 1),
        (behind_lengths(b"12345")[:-1], 1),
        (behind_lengths(b"1", b"2"), 3),
        (behind_lengths(b"1", b"2"), 1),
        (b"\xff\xff\xff\xff1", 1),
    ],
    ids=["nothing", "half a length", "too short", "one too few", "one too many", "giant"],
)
def test_lengths_that_do_not_add_up_are_refused(data: bytes, count: int) -> None:
    with pytest.raises(WrongEncoding, match=f"expected {count} encoded images.*got {len(data)} bytes"):
        image_reader(4, 6).read([FakeTensor("", "png", (count,), data)])


def test_no_images_are_an_empty_batch() -> None:
    assert image_reader(4, 6).read([FakeTensor("", "png", (0,), b"")]) == (b"",)


def test_small_files_must_not_decode_to_more_than_the_limit() -> None:
    reader = image_reader(4, 6, max_bytes=4 * 24 * 2)
    file = encoded(grey())
    reader.read([FakeTensor("", "png", (2,), behind_lengths(file, file))])
    with pytest.raises(TooLarge, match="3 images decode to 288 bytes, the limit is 192; send fewer"):
        reader.read([FakeTensor("", "png", (3,), behind_lengths(file, file, file))])


def test_one_step_of_a_sequence_is_one_image() -> None:
    spec = {"name": "image", "dtype": "float32", "shape": ["batch", 4, 6], "wire": PNG}
    y = {"name": "y", "dtype": "float32", "shape": ["batch", 2]}
    reader = Reader(accumulator(inputs=[spec], outputs=[y]), 1 << 20)
    file = encoded(grey())
    assert len(reader.read([FakeTensor("", "png", (), file)])) == 1
    with pytest.raises(WrongShape, match="2 images, expected 1"):
        reader.read([FakeTensor("", "png", (2,), behind_lengths(file, file))])


def test_the_images_of_one_chunk_are_bounded() -> None:
    """They are decoded where every stream is read."""
    file = encoded(grey())
    reader = image_reader(4, 6)
    tensor = FakeTensor("", "png", (3,), behind_lengths(file, file, file))
    assert reader.read([tensor], 3)
    with pytest.raises(TooLarge, match="3 encoded images in one chunk, the limit is 2; send several chunks"):
        reader.read([tensor], 2)
