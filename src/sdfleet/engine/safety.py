"""The safety checker that some checkpoints bring (Stable Diffusion 1.x): which finished pictures it flags.

CLIP's picture encoder (arXiv:2103.00020) and a table of concepts, each with a threshold of likeness; a picture above
one of them is flagged. Three concepts only make the others count for more. A verdict is the same as that of diffusers'
StableDiffusionSafetyChecker on the same weights in the same format. What becomes of a flagged picture is not decided
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdfleet.domain import Picture
from sdfleet.engine.networks.clip import Layers, read_clip_config
from sdfleet.engine.networks.layers import Conv2d, Embedding, LayerNorm, Linear
from sdfleet.engine.weight_files import fill, json_of, read_weights
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

# How transformers' CLIPVisionConfig is read where a config is silent, 5.23.0.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# CLIPImageProcessor's own, where preprocessor_config.json is absent or silent.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_SIDE_PX = 224
# A picture near one of the special concepts is judged more strictly by this much.
_STRICTER = 0.01
_PREFIX = "vision_model."


class SafetyChecker(nn.Module):
    """Named as the checkpoints name it, ready for a strict load of their weights. n_*: concepts in its two tables."""

    def __init__(
        self, vision: SimpleNamespace, *, projection_dim: int, n_concepts: int, n_special: int, prepare: Preparation
    ) -> None:
        super().__init__()
        self._prepare = prepare
        self.vision_model = _VisionModel(vision)
        self.visual_projection = Linear(vision.hidden_size, projection_dim, bias=False)
        with torch.device("meta"):
            self.concept_embeds = nn.Parameter(torch.empty(n_concepts, projection_dim))
            self.special_care_embeds = nn.Parameter(torch.empty(n_special, projection_dim))
            self.concept_embeds_weights = nn.Parameter(torch.empty(n_concepts))
            self.special_care_embeds_weights = nn.Parameter(torch.empty(n_special))

    @torch.inference_mode()
    def flags(self, pictures: Sequence[Picture]) -> list[bool]:
        """Which of these RGB pictures are flagged; all are looked at in one call."""
        weight = self.visual_projection.weight
        pixels = torch.stack([self._prepare(picture) for picture in pictures])
        found: list[bool] = self(pixels.to(weight.device, weight.dtype)).tolist()
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        """[n] bool, True for a flagged picture; pixels: [n, 3, s, s], prepared."""
        embeds = self.visual_projection(self.vision_model(pixels))
        special = _likeness(embeds, self.special_care_embeds) - self.special_care_embeds_weights.float()
        is_special = (_rounded(special) > 0).any(dim=1)
        concepts = _likeness(embeds, self.concept_embeds) - self.concept_embeds_weights.float()
        return (_rounded(concepts + _STRICTER * is_special[:, None]) > 0).any(dim=1)


class Preparation:
    """A picture as the encoder takes it, as transformers' CLIPImageProcessor prepares it with Pillow."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._side_px = _side(config.get("size"))
        self._crop_px = _side(config.get("crop_size"))
        self._mean = torch.tensor(config.get("image_mean") or _MEAN).view(3, 1, 1)
        self._std = torch.tensor(config.get("image_std") or _STD).view(3, 1, 1)

    def __call__(self, picture: Picture) -> Tensor:
        """[3, s, s] float32 of an RGB picture: the shorter side to s, the middle cut out, scaled."""
        short_px = min(picture.width_px, picture.height_px)
        size = tuple(int(self._side_px * side_px / short_px) for side_px in (picture.width_px, picture.height_px))
        image = Image.frombytes("RGB", (picture.width_px, picture.height_px), picture.data)
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = ((side_px - self._crop_px) // 2 for side_px in size)
        # What lies outside of the picture is black.
        image = image.crop((left, top, left + self._crop_px, top + self._crop_px))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return (pixels / 255.0 - self._mean) / self._std


def load_safety_checker(folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> SafetyChecker:
    """The checker in a checkpoint's folder safety_checker/, with the preparation of feature_extractor/ beside it.

    Raises BrokenCheckpoint, PickleRefused, and UnsupportedByModel for a checker of another kind.
    """
    config = json_of(folder / "config.json")
    vision = _vision_config(config)
    if vision is None:
        raise UnsupportedByModel(
            f"the safety checker in {folder} has options that are not known here",
            hint="switch it off with SD_SAFETY_CHECKER=off, or report it",
        )
    weights = {_present_name(name): tensor for name, tensor in read_weights(folder, dtype=dtype, device=device).items()}
    weights.pop(f"{_PREFIX}embeddings.position_ids", None)
    tables = [weights.get(name) for name in ("concept_embeds", "special_care_embeds")]
    if tables[0] is None or tables[1] is None:
        raise BrokenCheckpoint(f"{folder} lacks its table of concepts", hint="download the checkpoint again")
    preparation = folder.parent / "feature_extractor" / "preprocessor_config.json"
    module = SafetyChecker(
        vision,
        projection_dim=tables[0].shape[-1],
        n_concepts=len(tables[0]),
        n_special=len(tables[1]),
        prepare=Preparation(json_of(preparation) if preparation.is_file() else {"size": vision.image_size}),
    )
    fill(module, weights, folder=folder)
    return module.eval().requires_grad_(requires_grad=False)


class _VisionModel(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        # The name is its authors' own.
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Layers(config, is_causal=False)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, d], one vector for each picture."""
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[-1]
        pooled: Tensor = self.post_layernorm(hidden[:, 0])
        return pooled


class _Embeddings(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width, patch_px = config.hidden_size, config.patch_size
        with torch.device("meta"):
            self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = Conv2d(config.num_channels, width, kernel_size=patch_px, stride=patch_px, bias=False)
        self.position_embedding = Embedding((config.image_size // patch_px) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


def _vision_config(config: Mapping[str, Any]) -> SimpleNamespace | None:
    """The options of the picture encoder; None where it is of another kind."""
    said = {**(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    options = {name: said.get(name, default) for name, default in _VISION_DEFAULTS.items()}
    shared = {name: options[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act")}
    if read_clip_config(shared) is None or options["num_channels"] != 3:
        return None
    return SimpleNamespace(**options)


def _present_name(name: str) -> str:
    """transformers 4 saved the encoder within another of the same name."""
    return name.replace(f"{_PREFIX}{_PREFIX}", _PREFIX, 1)


def _side(said: Any) -> int:
    """The side in pixels out of 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(said, Mapping):
        said = said.get("shortest_edge") or said.get("height")
    return said if isinstance(said, int) and said > 0 else _SIDE_PX


def _likeness(embeds: Tensor, concepts: Tensor) -> Tensor:
    """Cosine of each picture with each concept, [n, concepts] float32."""
    near = nn.functional.normalize(embeds) @ nn.functional.normalize(concepts).T
    return near.float()


def _rounded(scores: Tensor) -> Tensor:
    """To three decimals, as the thresholds were set."""
    return torch.round(scores, decimals=3)
