"""What torch sees of this machine, as one line of JSON: `python -m sdfleet.engine.probe`.

For `sdfleet doctor`, whose own process must not import torch; imported by nobody.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any


def look() -> dict[str, Any]:
    """The build of torch and its devices; `fault` where it cannot be imported."""
    begun_s = time.perf_counter()
    try:
        import torch
    except (ImportError, OSError, AttributeError, RuntimeError) as exc:
        return {"fault": f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"}
    seen: dict[str, Any] = {
        "version": str(torch.__version__),
        "file": str(torch.__file__),
        "import_s": round(time.perf_counter() - begun_s, 1),
        "cuda_build": torch.version.cuda,
        "has_mps": torch.backends.mps.is_available(),
        "is_built_for": [],
        "cards": [],
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen["has_cuda"] = torch.cuda.is_available()
        if seen["has_cuda"]:
            seen["is_built_for"] = torch.cuda.get_arch_list()
            seen["cards"] = [_card(index) for index in range(torch.cuda.device_count())]
    seen["cuda_said"] = " ".join(" ".join(str(one.message).split()) for one in told)[:500]
    return seen


def _card(index: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(index)
    return {"name": about.name, "capability": [about.major, about.minor], "total_bytes": about.total_memory}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(look()) + "\n")
