"""The card of a checkpoint: facts about it, each measured or sourced; what is not known is absent."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sdfleet.domain import MAX_GUIDANCE, MAX_SIDE_PX, MAX_STEPS, SIDE_MULTIPLE_PX

# other: what another engine or a service draws with, whatever that is made of.
Family = Literal["sd", "sdxl", "sd3", "flux", "flux2", "zimage", "other"]
Ignored = Literal["negative_prompt", "guidance", "image", "mask", "steps", "sampler", "size"]

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
# What people and other programs call a model may be in capitals, have an owner and a tag. It never becomes a path.
Alias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(:[A-Za-z0-9._-]+)?$")]
RepositoryId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=96)]
Side = Annotated[int, Field(ge=16, le=MAX_SIDE_PX, multiple_of=SIDE_MULTIPLE_PX)]


def is_name(text: str) -> bool:
    """Whether this may be the name of a checkpoint: small letters, digits, dot, dash and underscore.

    >>> is_name("sd-1.5"), is_name("../etc/passwd"), is_name("")
    (True, False, False)
    """
    return re.fullmatch(NAME_PATTERN, text) is not None


class Card(BaseModel):
    """What is known of one checkpoint before any weight is read.

    width_px, height_px, steps, guidance, sampler, strength: used where a request says nothing.
    native_area_px: the area it was trained at. min_side_px, max_side_px: sides it draws well.
    resizes: a size outside these sides is drawn near the native area and resized, with a warning.
    ignores: what has no effect on its pictures; a request that uses one is answered with a warning.
    folder: absolute path of the weights; absent for those that come inside the package or from a hub.
    backend: the only one that draws it (see domain.BACKENDS); None: whichever can read the weights.
    side_multiple_px: what sides must be a multiple of, where the backend asks for another than the family.
    hf, modelscope: its repository on Hugging Face and on ModelScope, in the diffusers layout.
    is_gated: Hugging Face gives it only to accounts that have accepted the licence.
    architecture: the file of data/architectures that describes it; None: the one of the same name, where there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    family: Family
    title: str = ""
    licence: str | None = None
    licence_url: str | None = None
    is_gated: bool = False
    hf: RepositoryId | None = None
    modelscope: RepositoryId | None = None
    architecture: Name | None = None
    aliases: tuple[Alias, ...] = ()
    width_px: Side
    height_px: Side
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
    sampler: str
    native_area_px: Annotated[int, Field(gt=0)] | None = None
    min_side_px: Side | None = None
    max_side_px: Side | None = None
    resizes: bool = False
    ignores: tuple[Ignored, ...] = ()
    folder: str | None = None
    backend: str | None = None
    side_multiple_px: Annotated[int, Field(ge=1, le=64)] | None = None

    @field_validator("name", "aliases")
    @classmethod
    def _not_hidden(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if ".." in name:
                raise ValueError("a name holds no '..'")
        return value

    @model_validator(mode="after")
    def _range_is_whole(self) -> Self:
        if self.resizes and (self.min_side_px is None or self.max_side_px is None):
            raise ValueError("a card that resizes says its min_side_px and max_side_px")
        if self.min_side_px and self.max_side_px and self.min_side_px > self.max_side_px:
            raise ValueError("min_side_px is above max_side_px")
        return self

    def answers_to(self, name: str) -> bool:
        """Whether this model is meant: by its name, an alias or a hub's id, in capitals or not, `:latest` or not.

        >>> card = Card(name="sd15", family="sd", aliases=("x/sd",), hf="Someone/SD-15", width_px=512, height_px=512,
        ...     steps=30, guidance=7.5, sampler="ddim")
        >>> [card.answers_to(name) for name in ("sd15:latest", "X/SD", "someone/sd-15", "sd15:other")]
        [True, True, True, False]
        """
        return _plain(name) in {
            _plain(known) for known in (self.name, self.hf, self.modelscope, *self.aliases) if known
        }

    @property
    def area_px(self) -> int:
        """The area to stay near when the size is ours to choose."""
        return self.native_area_px or self.width_px * self.height_px


def _plain(name: str) -> str:
    return name.casefold().removesuffix(":latest")
