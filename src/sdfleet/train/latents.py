"""Latents without training: a fixed linear map from 8-pixel patches to eight numbers.

The map is the whitened top eight principal components of 8x8x3 patches, so it is known after seconds and the
decoder, the encoder and the denoiser can be trained independently of each other. The first three components are
in effect a patch's mean colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PATCH_PX = 8
N_CHANNELS = 8
# Mean colours keep unit spread. The other components have heavy tails (most patches are flat), so they get a
# smaller spread: the decisive edges then lie within the range the noise covers.
SPREADS = (1.0, 1.0, 1.0, 0.6, 0.6, 0.6, 0.6, 0.6)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentMap:
    """weight [8, 3, 8, 8] and bias [8] of the convolution that encodes pictures."""

    weight: Tensor
    bias: Tensor

    def encode(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Latents [n, 8, h/8, w/8] float32 of pictures [n, h, w, 3] uint8."""
        return F.conv2d(to_signed(pictures), self.weight, self.bias, stride=PATCH_PX)

    def mean_colours(self, latents: Tensor) -> Tensor:
        """Mean colour of every patch, [n, 3, h, w] float32 in [0, 255], as near as the latents tell."""
        flat = self.weight.reshape(N_CHANNELS, -1)
        back = torch.linalg.pinv(flat).reshape(3, PATCH_PX**2, N_CHANNELS).mean(1)
        signed = torch.einsum("ck,nkhw->nchw", back, latents - self.bias[:, None, None])
        return (signed + 1.0) * 127.5


def to_signed(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures [n, h, w, 3] uint8 as [n, 3, h, w] float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def fit_latent_map(pictures: NDArray[np.uint8]) -> LatentMap:
    """The map fitted to pictures [n, h, w, 3] uint8; a few thousand are enough."""
    patches = F.unfold(to_signed(pictures), PATCH_PX, stride=PATCH_PX).transpose(1, 2).reshape(-1, 3 * PATCH_PX**2)
    mean = patches.mean(0)
    centred = patches - mean
    power, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
    top = basis[:, -N_CHANNELS:].flip(1)
    # An eigenvector's sign is arbitrary; fix it so that the same pictures always give the same map.
    top = top * torch.where(top.sum(0) + top[0] >= 0, 1.0, -1.0)
    scaled = top * (torch.tensor(SPREADS) / power[-N_CHANNELS:].flip(0).sqrt())
    weight = scaled.T.reshape(N_CHANNELS, 3, PATCH_PX, PATCH_PX).contiguous()
    return LatentMap(weight=weight, bias=-(mean @ scaled))
