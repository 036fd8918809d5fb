"""A converted denoiser, called like the diffusers module it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfleet.engine.openvino_calls import NetworkCall

Floats = NDArray[np.float32]


class OpenVinoDenoiser:
    """Compiled for the CPU, weights packed once, any number of rows and any size without compiling again.

    dtype: what it wants its input in. It rounds to bfloat16 by itself where it was compiled so.
    """

    dtype = torch.float32

    def __init__(self, model_file: Path, call: NetworkCall, *, dtype: torch.dtype, resident_bytes: int) -> None:
        import openvino

        self._call = call
        self.model_file = model_file
        self.resident_bytes = resident_bytes
        n_threads = torch.get_num_threads()
        compiled = openvino.Core().compile_model(
            model_file,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": n_threads,
                # Pinning would tie this thread, and with it every later call of torch, to one core.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request = compiled.create_infer_request()

    def __call__(self, *args: Any, return_dict: bool = False, **kwargs: Any) -> tuple[Tensor]:
        """([m, c, h, w] float32,), as the diffusers module answers with return_dict=False."""
        assert not return_dict
        # Shared, not copied. The answer is copied out of the request's buffer, which the next call overwrites.
        answer = self._request.infer(inputs_of(self._call, *args, **kwargs), share_inputs=True)[0]
        return (torch.from_numpy(answer),)


def inputs_of(call: NetworkCall, *args: Any, **kwargs: Any) -> list[Floats]:
    """The inputs of a converted model, from the arguments that the diffusers module takes."""
    kwargs.pop("return_dict", None)
    return [tensor.float().contiguous().numpy() for tensor in call.tensors(*args, **kwargs)]
