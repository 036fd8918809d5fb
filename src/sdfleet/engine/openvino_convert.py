"""Converts a checkpoint's denoiser: `python -m sdfleet.engine.openvino_convert CHECKPOINT COMPONENT TARGET`.

A process of its own, because converting takes seconds to minutes and two to three times the float32 weights in memory:
the engine goes on drawing meanwhile, the memory goes back to the system, and a failure is an exit code. It ends when
its standard input does, so it never outlives the engine that wants the result.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

MODEL_FILE = "model.xml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write TARGET/model.xml and model.bin; anything that is wrong is an exception, and so an exit code of 1."""
    parser = argparse.ArgumentParser(prog="sdfleet.engine.openvino_convert")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("component")
    parser.add_argument("target", type=Path)
    parser.add_argument("--niceness", type=int, default=0)
    chosen = parser.parse_args(arguments)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    if not (chosen.checkpoint / "model_index.json").is_file():
        raise SystemExit(f"there is no model_index.json in {chosen.checkpoint}")
    os.nice(chosen.niceness)
    # OpenVINO's converter reports to a statistics server unless this package cannot be imported; nobody asked for that.
    sys.modules["openvino_telemetry"] = cast("Any", None)
    convert(chosen.checkpoint, chosen.component, chosen.target)
    return 0


def convert(checkpoint: Path, component: str, target: Path) -> None:
    """The component's weights in float32 as an OpenVINO model that takes any number of rows, any size, any tokens."""
    import openvino
    import torch

    from sdfleet.engine.components import ComponentName, Components
    from sdfleet.engine.devices import Device
    from sdfleet.engine.openvino_calls import call_of

    in_float32 = Device(kind="cpu", dtype=torch.float32, vae_dtype=torch.float32, why="OpenVINO rounds by itself")
    components = Components(checkpoint, in_float32)
    name = cast("ComponentName", component)
    call = call_of(components.class_name(name), components.config(name))
    if call is None:
        raise SystemExit(f"the {component} of {checkpoint} is of a class that is not converted")
    with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every branch; the trial compares the answers instead
        model = openvino.convert_model(call.wrapped(components.use(name)), example_input=call.examples())
    openvino.save_model(model, target / MODEL_FILE, compress_to_fp16=False)


def _end_with_standard_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
