"""What the protocol says of models: metadata, configuration and statistics."""

from __future__ import annotations

from tenuto.oip import inference_pb2 as pb
from tenuto.oip import model_config_pb2 as config_pb
from tenuto.serving.catalogue import Catalogue
from tenuto.serving.manifest import Input, Manifest, Output
from tenuto.serving.metrics import Distribution, ModelMetrics

from .datatype import BYTES, DATATYPES, data_type
from .form import Form, shape_of

PLATFORM = "onnxruntime_onnx"  # what clients know for a model that ONNX Runtime runs


def metadata(form: Form, versions: list[int]) -> pb.ModelMetadataResponse:
    """Shapes are those of a request."""
    response = pb.ModelMetadataResponse(
        name=form.name, versions=[str(version) for version in versions], platform=PLATFORM
    )
    alone = form.manifest.stateful
    for tensors, described in (
        (form.manifest.inputs, response.inputs),
        (form.manifest.outputs, response.outputs),
    ):
        for tensor in tensors:
            described.add(name=tensor.name, datatype=_datatype(tensor), shape=shape_of(tensor, alone))
    return response


def versions_of(catalogue: Catalogue, model: str) -> list[int]:
    """Those that are loaded, in their order."""
    loaded = (*catalogue.served, *catalogue.retiring)
    return sorted({one.engine.version for one in loaded if one.manifest.name == model})


def configuration(form: Form, idle_seconds: float) -> config_pb.ModelConfig:
    """As Triton would describe the model."""
    manifest, batch = form.manifest, form.max_batch_size
    config = config_pb.ModelConfig(
        name=form.name, platform=PLATFORM, backend="onnxruntime", max_batch_size=batch
    )
    for tensor in manifest.inputs:
        config.input.add(
            name=tensor.name, data_type=data_type(_datatype(tensor)), dims=_dims(tensor, manifest, batch)
        )
    for output in manifest.outputs:
        config.output.add(
            name=output.name, data_type=data_type(_datatype(output)), dims=_dims(output, manifest, batch)
        )
    if manifest.stateful:
        _describe_sequences(config.sequence_batching, form, idle_seconds)
    else:
        config.dynamic_batching.preserve_ordering = False
    config.model_transaction_policy.decoupled = False
    return config


def _describe_sequences(batching: config_pb.ModelSequenceBatching, form: Form, idle_seconds: float) -> None:
    batching.max_sequence_idle_microseconds = int(idle_seconds * 1e6)
    batching.oldest.max_candidate_sequences = min(form.served.engine.max_sequences, 2**31 - 1)
    for state in form.manifest.states:
        batching.state.add(
            input_name=state.input,
            output_name=state.output,
            data_type=data_type(DATATYPES[state.dtype]),
            dims=list(state.slot_shape),
        )


def _datatype(tensor: Input | Output) -> str:
    """A text is what a client sends, though ids are what the graph takes."""
    return BYTES if isinstance(tensor, Input) and tensor.text is not None else DATATYPES[tensor.dtype]


def _dims(tensor: Input | Output, manifest: Manifest, batch: int) -> list[int]:
    shape = shape_of(tensor, manifest.stateful)
    return shape[1:] if batch else shape


def statistics(metrics: ModelMetrics) -> pb.ModelStatistics:
    """Since the version was loaded. What a run took is counted for each of its requests: the mean of the runs
    times the requests."""
    answered, failed = metrics.chunks["answered"], metrics.chunks["failed"]
    told = pb.ModelStatistics(
        name=metrics.model,
        version=str(metrics.version),
        inference_count=answered,
        execution_count=metrics.batches,
    )
    stats = told.inference_stats
    _put(stats.success, answered, metrics.chunk_latency.total)
    _put(stats.fail, failed, 0.0)
    _put(stats.queue, answered, metrics.stages["queue"].total)
    for duration, stages in (
        (stats.compute_input, ("gather",)),
        (stats.compute_infer, ("compute",)),
        (stats.compute_output, ("scatter", "reply")),
    ):
        _put(duration, answered, answered * sum(_mean(metrics.stages[stage]) for stage in stages))
    return told


def _mean(stage: Distribution) -> float:
    count = sum(stage.counts)
    return stage.total / count if count else 0.0


def _put(duration: pb.StatisticDuration, count: int, seconds: float) -> None:
    duration.count, duration.ns = count, int(seconds * 1e9)
