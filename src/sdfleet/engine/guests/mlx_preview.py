"""Rough colours of unfinished latents, in numpy: the same fit as `Vae.fit_preview`, for networks that are no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdfleet.domain import Picture

Array = np.ndarray[Any, np.dtype[np.float32]]

# As in engine/vae.py, where it is said why.
_CHART_PATCHES = 8
_PATCH_PX = 32
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """A linear map from latents to colours. weights: [c, 3], bias: [3]; colours in [-1, 1]."""

    weights: Array
    bias: Array

    def picture(self, latents: Array) -> Picture:
        """Latents [c, h, w] as a picture with one pixel for each cell."""
        colours = np.einsum("chw,cr->hwr", latents, self.weights) + self.bias
        pixels = np.rint((colours / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
        return Picture(width_px=pixels.shape[1], height_px=pixels.shape[0], mode="RGB", data=pixels.tobytes())


def fit_preview(encode: Callable[[Array], Array]) -> PreviewMap:
    """The map that suits a picture codec. encode: [1, 3, H, W] in [-1, 1] to latents [c, h, w].

    >>> def halves(picture):
    ...     return picture[0, :, ::8, ::8] / 2
    >>> red = np.zeros((3, 1, 1), np.float32)
    >>> red[:, 0, 0] = 0.5, -0.5, -0.5
    >>> list(fit_preview(halves).picture(red).data)
    [255, 0, 0]
    """
    levels = np.linspace(-1.0, 1.0, 4, dtype=np.float32)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    order = np.arange(len(colours)) * 37 % len(colours)
    chart = colours[order].reshape(_CHART_PATCHES, _CHART_PATCHES, 3).transpose(2, 0, 1)
    whole = chart.repeat(_PATCH_PX, axis=1).repeat(_PATCH_PX, axis=2)
    latents = encode(np.ascontiguousarray(whole[None]))
    n_cells = latents.shape[1] // _CHART_PATCHES
    wanted = chart.repeat(n_cells, axis=1).repeat(n_cells, axis=2).reshape(3, -1).T.astype(np.float64)
    known = latents.reshape(latents.shape[0], -1).T.astype(np.float64)
    known = np.concatenate([known, np.ones_like(known[:, :1])], axis=1)
    solved = np.linalg.solve(known.T @ known + _RIDGE * np.eye(known.shape[1]), known.T @ wanted).astype(np.float32)
    return PreviewMap(solved[:-1], solved[-1])
