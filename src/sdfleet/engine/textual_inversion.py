"""Embeddings (textual inversion, arXiv:2208.01618): a few vectors that a CLIP reads in the place of a word's own.

An embedding stands in a prompt by its name, as a word of its own; each vector takes a token's place. T5 and Qwen know
nothing of it and read the name as it is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdfleet.catalog.adapters import pattern_of
from sdfleet.domain import AdapterFile
from sdfleet.engine.devices import Device
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

# Vectors of embeddings are counted down from -1, with room for this many of each: no token has a negative id.
_ROOM = 256
# A vector is 3 kB at most; a person with thousands of embeddings uses few of them.
_MOST_KEPT = 256


class Words:
    """The embeddings of one prompt for one encoder. names: as the prompt writes them; vectors: [n, d] of each."""

    def __init__(self, names: Sequence[str], vectors: Sequence[Tensor]) -> None:
        self._pattern = pattern_of(names)
        self._place = {name.casefold(): place for place, name in enumerate(names)}
        self._vectors = tuple(vectors)

    def ids(self, tokenize: Callable[[str], Sequence[int]], text: str) -> list[int]:
        """The ids of a text; a negative one for each vector of an embedding."""
        if self._pattern is None:
            return list(tokenize(text))
        ids: list[int] = []
        read_to = 0
        for found in self._pattern.finditer(text):
            # Blanks are nothing to CLIP's tokenizer, and an empty text has no tokens.
            ids += tokenize(text[read_to : found.start()])
            place = self._place[found[0].casefold()]
            ids += [-1 - _ROOM * place - i for i in range(len(self._vectors[place]))]
            read_to = found.end()
        return [*ids, *tokenize(text[read_to:])]

    @staticmethod
    def goes_on(token: int) -> bool:
        """Whether it is another vector than the first of an embedding."""
        return token < 0 and (-1 - token) % _ROOM > 0

    @contextlib.contextmanager
    def in_place(self, ids: Sequence[int], module: Any) -> Iterator[list[int]]:
        """The ids without the negative ones, while the encoder looks up the vectors in their places.

        module: a CLIP, ours or transformers'; called once within, with one row of these ids.
        """
        vectors = {at: self._vectors[(-1 - i) // _ROOM][(-1 - i) % _ROOM] for at, i in enumerate(ids) if i < 0}

        def put(_module: Any, _args: Any, looked_up: Tensor) -> Tensor:
            changed = looked_up.clone()
            for at, vector in vectors.items():
                changed[0, at] = vector
            return changed

        # Any id will do there but the end mark's, which some CLIPs look for as the highest: the lowest.
        plain = [max(i, 0) for i in ids]
        if not vectors:
            yield plain
            return
        handle = getattr(module, "text_model", module).embeddings.token_embedding.register_forward_hook(put)
        try:
            yield plain
        finally:
            handle.remove()


class Embeddings:
    """Reads embeddings for one checkpoint, and keeps those used last."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept: dict[tuple[str, bool], Tensor] = {}

    def words(self, files: Sequence[AdapterFile], module: Any, *, is_second: bool) -> Words | None:
        """What an encoder reads for these; None where there are none.

        is_second: the encoder is SDXL's larger one. Raises BrokenCheckpoint, and UnsupportedByModel for one that is
        not as wide as the encoder.
        """
        if not files:
            return None
        width = int(module.config.hidden_size)
        vectors = []
        for file in files:
            vector = self._read(file, is_second=is_second)
            if vector.shape[1] != width:
                raise UnsupportedByModel(
                    f"the embedding {file.name!r} is {vector.shape[1]} wide, the text encoder {width}",
                    hint="use it with a checkpoint of the kind that it was made for",
                )
            vectors.append(vector.to(self._device.torch_device, module.dtype))
        return Words([file.name for file in files], vectors)

    def _read(self, file: AdapterFile, *, is_second: bool) -> Tensor:
        key = (file.content, is_second)
        if key not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = _vectors(Path(file.path), is_second=is_second)
        return self._kept[key]


def _vectors(path: Path, *, is_second: bool) -> Tensor:
    """[n, d] float32: the encoder's own part where the file has two, else its only one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            name = ("clip_g" if is_second else "clip_l") if len(names) > 1 else names[0]
            found: Tensor = file.get_tensor(name).to(torch.float32)
    except (SafetensorError, OSError) as exc:
        raise BrokenCheckpoint(f"{path} cannot be read: {exc}", hint="copy or download this file again") from exc
    return found.reshape(-1, found.shape[-1])
