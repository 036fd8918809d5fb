"""A converted denoiser, called like the diffusers module it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfleet.engine.openvino_calls import NetworkCall


class OpenVinoDenoiser:
    """Compiled for the CPU, weights packed once, any number of rows and any size without compiling again.

    dtype: what it wants its input in. It rounds to bfloat16 by itself where it was compiled so.
    """

    dtype = torch.float32

    def __init__(self, model_file: Path, call: NetworkCall, *, dtype: torch.dtype, resident_bytes: int) -> None:
        import openvino

        self._call = call
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
        inputs = [tensor.float().contiguous().numpy() for tensor in self._call.tensors(*args, **kwargs)]
        answer = self._request.infer(inputs, share_inputs=True)[0]
        return (torch.from_numpy(answer),)
