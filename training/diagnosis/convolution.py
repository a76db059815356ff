"""The first filters of a CNN, and what each of its layers makes of a picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tenuto.training.candidate import AnyArray
from tenuto.training.stepper import load

from .inside import Inside
from .plot import bare, picture

SHOWN = 8  # feature maps of each layer


def drawn(digit: str) -> AnyArray:
    """Return a digit in a printing face as float32 [28, 28], 1 is ink: no picture of any data set."""
    page = Image.new("L", (28, 28))
    ImageDraw.Draw(page).text((14, 14), digit, fill=255, anchor="mm", font=ImageFont.load_default(24))
    return np.asarray(page, np.float32) / 255


@dataclass(frozen=True, eq=False)
class Convolution:
    """`filters` [n, 3, 3] of the first layer; `maps` by layer [channels, side, side]; what it answers."""

    image: AnyArray
    filters: AnyArray
    maps: list[AnyArray]
    answer: int

    @classmethod
    def measure(cls, folder: Path, digit: str = "3") -> "Convolution":
        """Show the exported model in `folder` a printed digit."""
        content = (folder / "model.onnx").read_bytes()
        _, manifest = load(content)
        model, image = Inside(content), drawn(digit)
        layers = [node.output[0] for node in model.nodes("Relu")]
        wanted = [*layers, manifest.outputs[0].name]
        values = model.values(wanted, {manifest.inputs[0].name: image[None]})
        first = model.constants[model.nodes("Conv")[0].input[1]]
        maps = [values[name][0] for name in layers if values[name].ndim == 4]
        return cls(image, first[:, 0], maps, int(values[wanted[-1]][0].argmax()))

    def draw(self, path: Path) -> None:
        """Draw the first filters, and below each layer's strongest maps."""
        with picture(path, rows=len(self.maps) + 1, columns=SHOWN + 1, size=(7.6, 5.6)) as axes:
            grid = axes.reshape(len(self.maps) + 1, SHOWN + 1)
            for one in axes:
                bare(one)
            bare(grid[0, 0], f"read as {self.answer}")
            grid[0, 0].imshow(self.image, cmap="gray_r")
            for one, kernel in zip(grid[0, 1:], self.filters, strict=False):
                most = float(np.abs(kernel).max())
                one.imshow(kernel, cmap="RdBu", vmin=-most, vmax=most)
            for number, (row, maps) in enumerate(zip(grid[1:], self.maps, strict=True), start=1):
                row[0].axis("off")
                row[0].text(0, 0.5, f"layer {number}\n{len(maps)} maps of\n{maps.shape[1]} × {maps.shape[2]}")
                strongest = np.argsort(-maps.max((1, 2)), kind="stable")[:SHOWN]
                for one, channel in zip(row[1:], strongest, strict=False):
                    one.imshow(maps[channel], cmap="gray_r")
