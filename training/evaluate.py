"""Measures an exported model on its test set. Needs onnxruntime and the data, not torch.

Models with states are fed as a caller feeds them: sound in chunks of 20 ms, the series hour by hour.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tenuto.serving.manifest import Manifest

from .datasets import etth1, fsdd, mnist
from .progress import progress
from .stepper import Stepper, load, replay

Figures = dict[str, Any]


class NoTestSet(ValueError):
    """A model whose test set this package does not know."""


def evaluate(folder: Path) -> Figures:
    """Return the test figures of the model in `folder`: metric, value, n and how it was measured."""
    session, manifest = load(folder / "model.onnx")
    measure = MEASURES.get(manifest.name)
    if measure is None:
        raise NoTestSet(f"{manifest.name}: no test set is known; known: {', '.join(MEASURES)}")
    return measure(session, manifest)


def digits(session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
    """Accuracy on MNIST's 10,000 test images, in batches of the model's `max_batch`."""
    images, labels = mnist.test()
    right = 0
    with progress("digits: evaluation", len(images)) as bar:
        for start in range(0, len(images), manifest.max_batch):
            batch = images[start : start + manifest.max_batch].astype(np.float32) / np.float32(255)
            answer = replay(session, manifest, [batch])[0]["log_probabilities"].argmax(1)
            right += int((answer == labels[start : start + len(batch)]).sum())
            bar.update(len(batch))
    return {
        "metric": "accuracy",
        "value": right / len(images),
        "n": len(images),
        "test_set": "MNIST, the 10,000 test images",
    }


def spoken_digits(session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
    """Accuracy of the last running answer, each recording fed in chunks of 20 ms from silence."""
    recordings = fsdd.recordings("test")
    chunk = fsdd.RATE_HZ // 50
    right = frames_right = 0
    with progress("spoken-digits: evaluation", len(recordings)) as bar:
        for recording in recordings:
            stepper = Stepper(session, manifest)
            outputs: dict[str, np.ndarray[Any, Any]] = {}
            for start in range(0, len(recording.pcm), chunk):
                outputs = stepper.step(recording.pcm[start : start + chunk]) or outputs
            right += int(outputs["answer"][-1].argmax() == recording.digit)
            frames_right += int(outputs["log_probabilities"][-1].argmax() == recording.digit)
            bar.update()
    return {
        "metric": "accuracy",
        "value": right / len(recordings),
        "n": len(recordings),
        "test_set": "FSDD v1.0.10, official split: takes 0 to 4; the running answer after the last "
        "whole 20 ms, fed 20 ms at a time",
        "accuracy_of_last_log_probabilities": frames_right / len(recordings),
    }


def oil_temperature(session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
    """Error of 96-hour forecasts of all 7 series, z-scored; fed hour by hour, one sequence."""
    series = etth1.series()
    start, stop = etth1.TEST
    horizon = manifest.outputs[0].frame_shape[0]
    warm_up = manifest.states[0].slot_shape[0] + 1
    _, std = series.statistics()
    stepper, squares, gaps = Stepper(session, manifest), [], []
    with progress("oil-temperature: evaluation", stop - horizon - start + warm_up) as bar:
        for hour in range(start - warm_up, stop - horizon):
            forecast = stepper.step(series.values[hour : hour + 1])["forecast"][0]
            bar.update()
            if hour >= start - 1:
                truth = series.values[hour + 1 : hour + 1 + horizon]
                error = (forecast.astype(np.float64) - truth) / std
                squares.append((error**2).mean())
                gaps.append(np.abs(error).mean())
    return {
        "metric": "mse",
        "value": float(np.mean(squares)),
        "mae": float(np.mean(gaps)),
        "n": len(squares),
        "test_set": f"ETTh1, standard split: hours {start} to {stop}, {horizon} hours ahead, all 7 "
        f"series, z-scored by the training part, after {warm_up} hours of the split before",
    }


Measure = Callable[[onnxruntime.InferenceSession, Manifest], Figures]
MEASURES: Mapping[str, Measure] = {
    "digits": digits,
    "spoken-digits": spoken_digits,
    "oil-temperature": oil_temperature,
}
