"""Which of our own networks draws a component, decided from its class and config; never a wrong picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sdfleet.engine.networks.autoencoder import AutoencoderKL, read_autoencoder_config
from sdfleet.engine.networks.clip import CLIPTextModel, CLIPTextModelWithProjection, read_clip_config
from sdfleet.engine.networks.unet import UNet2DConditionModel, UNetConfig

_READERS: dict[str, tuple[Callable[[Mapping[str, Any]], Any], Callable[[Any], nn.Module]]] = {
    "UNet2DConditionModel": (UNetConfig.read, UNet2DConditionModel),
    "AutoencoderKL": (read_autoencoder_config, AutoencoderKL),
    "CLIPTextModel": (read_clip_config, CLIPTextModel),
    "CLIPTextModelWithProjection": (read_clip_config, CLIPTextModelWithProjection),
}


def own_network(class_name: str, config: Mapping[str, Any]) -> Callable[[], nn.Module] | None:
    """What builds the network that a component's config.json describes, with weights yet to be loaded.

    None where it is of another class, or asks for an option that ours has not: diffusers' or transformers' own class
    draws it then.
    """
    if class_name not in _READERS:
        return None
    read, network = _READERS[class_name]
    understood = read(config)
    return None if understood is None else lambda: network(understood)
