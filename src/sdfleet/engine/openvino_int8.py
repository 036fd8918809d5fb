"""A converted denoiser with its convolutions and matrix products in 8 bits: weights and what flows into them.

Weights are rounded to 255 levels, each output channel with its own scale. What flows in is rounded to 256 levels
between the least and the greatest value seen while real calls were repeated (`ranges`), one scale for a whole tensor,
fixed beforehand: OpenVINO then multiplies bytes, which the CPU does at twice the pace of bfloat16. What is rounded is
only marked here (FakeQuantize); OpenVINO finds the marks when it compiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfleet.engine.openvino_cache import ConversionFailed

MODEL_FILE = "int8.xml"

Floats = NDArray[np.float32]
Range = tuple[float, float]

_INPUT_LEVELS = 256
_WEIGHT_LEVELS = 255
# Pictures [n, c, h, w] and sequences [n, tokens, d]. What is [n, d] are the embeddings of time, size and pooled text:
# little work, on which every layer depends.
_LEAST_RANK = 3


def ranges(model: Any, calls: Sequence[Sequence[Floats]], *, n_threads: int) -> Iterator[dict[str, Range] | None]:
    """Least and greatest value flowing into each layer to be rounded, by its name, over all calls.

    A generator: None after each call, which takes as long as a step or two, and the ranges at the end.
    """
    import openvino
    from openvino import opset13 as ops

    measured = model.clone()
    layers = list(_layers(measured))
    extremes = []
    for layer in layers:
        source = layer.input_value(0)
        axes = np.arange(source.get_partial_shape().rank.get_length(), dtype=np.int64)
        extremes += [ops.reduce_min(source, axes, keep_dims=False), ops.reduce_max(source, axes, keep_dims=False)]
    measured = openvino.Model([ops.result(extreme) for extreme in extremes], measured.get_parameters())
    setting = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": n_threads, "ENABLE_CPU_PINNING": False}
    request = openvino.Core().compile_model(measured, "CPU", setting).create_infer_request()
    found: dict[str, Range] = {}
    for call in calls:
        answer = request.infer(list(call))
        for n, layer in enumerate(layers):
            low, high = float(answer[2 * n]), float(answer[2 * n + 1])
            name = layer.get_friendly_name()
            before = found.get(name, (low, high))
            found[name] = (min(low, before[0]), max(high, before[1]))
        yield None
    yield found


def save_rounded(model: Any, found: dict[str, Range], target: Path) -> int:
    """Write `model` with its layers marked for 8 bits; how many there are. The model is changed.

    Raises ConversionFailed where there is none.
    """
    import openvino
    from openvino import opset13 as ops

    n_layers = 0
    for layer in list(_layers(model)):
        low, high = found[layer.get_friendly_name()]
        low, high = min(low, 0.0), max(high, 0.0)  # zero must be a level: convolutions fill their edges with it
        if high - low <= 0:
            continue
        bounds = [ops.constant(np.float32(bound)) for bound in _with_zero_as_a_level(low, high)]
        layer.input(0).replace_source_output(
            ops.fake_quantize(layer.input_value(0), *bounds, *bounds, _INPUT_LEVELS).output(0)
        )
        weights = layer.input_value(1)
        values = weights.get_node().data.astype(np.float32)
        most = _most_by_output(layer, values)
        layer.input(1).replace_source_output(
            ops.fake_quantize(
                weights, *[ops.constant(bound) for bound in (-most, most, -most, most)], _WEIGHT_LEVELS
            ).output(0)
        )
        n_layers += 1
    model.validate_nodes_and_infer_types()
    if not n_layers:
        raise ConversionFailed("it has no layer that could be rounded to 8 bits")
    part = target.with_name(".part.xml")
    openvino.save_model(model, part, compress_to_fp16=False)
    part.with_suffix(".bin").replace(target.with_suffix(".bin"))
    part.replace(target)
    return n_layers


def _layers(model: Any) -> Iterator[Any]:
    """Convolutions and matrix products with weights of their own; the first and the last of the network stay as is."""
    found = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in ("Convolution", "MatMul")
        and node.input_value(1).get_node().get_type_name() == "Constant"
        and node.input_value(0).get_partial_shape().rank.get_length() >= _LEAST_RANK
    ]
    first = next((place for place, node in enumerate(found) if node.get_type_name() == "Convolution"), None)
    for place, node in enumerate(found[:-1]):
        if place != first:
            yield node


def _most_by_output(layer: Any, values: Floats) -> Floats:
    """Greatest size of a weight by output channel, in a shape that fits `values`."""
    if layer.get_type_name() == "Convolution":
        outputs = 0
    else:
        outputs = values.ndim - (2 if layer.get_attributes()["transpose_b"] else 1)
    axes = tuple(axis for axis in range(values.ndim) if axis != outputs)
    return np.maximum(np.abs(values).max(axis=axes, keepdims=True), 1e-8).astype(np.float32)


def _with_zero_as_a_level(low: float, high: float) -> Range:
    step = (high - low) / (_INPUT_LEVELS - 1)
    zero = round(-low / step)
    return -zero * step, (_INPUT_LEVELS - 1 - zero) * step
