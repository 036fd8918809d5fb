"""One adapter for each architecture; the name is the one that cards use."""

from sdfleet.engine.families.base import LatentFamily
from sdfleet.engine.families.flux import Flux
from sdfleet.engine.families.flux2 import Flux2Klein
from sdfleet.engine.families.sd import StableDiffusion
from sdfleet.engine.families.sd3 import StableDiffusion3
from sdfleet.engine.families.sdxl import StableDiffusionXL
from sdfleet.engine.families.zimage import ZImage

FAMILIES: dict[str, type[LatentFamily]] = {
    family.name: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2Klein, ZImage)
}

__all__ = ["FAMILIES", "LatentFamily"]
