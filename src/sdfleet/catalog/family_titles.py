"""What people call the families. Apart from the cards, which an engine's process has no use for."""

from __future__ import annotations

from collections.abc import Mapping

FAMILY_TITLES: Mapping[str, str] = {
    "sd": "Stable Diffusion", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX.1", "flux2": "FLUX.2", "zimage": "Z-Image",
    "other": "other",
}  # fmt: skip
