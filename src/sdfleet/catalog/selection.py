"""Which files of a repository are needed: what the engine reads and nothing else, never a pickle.

Repositories hold the same weights several times: whole and in float16, as safetensors and as pickles, for other
programs too. Of each component one set is taken: float16 where there is one, as that is half the bytes, and the
published transformers come in 16 bits only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sdfleet.catalog.cards import Family
from sdfleet.catalog.headers import PICKLES
from sdfleet.catalog.hubs.hub import HubFile
from sdfleet.catalog.identify import CHECKED_BY, NEEDED, OPTIONAL
from sdfleet.errors import BrokenCheckpoint, PickleRefused, UnsupportedByModel

# At the top: what the folder is, and the licence, which must come along with the weights.
_TOP = re.compile(r"model_index\.json|(LICENSE|LICENCE)([.-][A-Za-z0-9.-]{1,32})?", re.ASCII)
_SMALL = re.compile(
    r"config\.json|scheduler_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|preprocessor_config\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|spiece\.model|tokenizer\.model|chat_template\.jinja",
    re.ASCII,
)
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-(?P<shard>\d{5})-of-\d{5})?\.safetensors", re.ASCII
)
_INDEX = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json", re.ASCII)
PREFERRED = ("fp16", None, "bf16")


def select(files: Sequence[HubFile], *, family: Family, repo_id: str) -> tuple[HubFile, ...]:
    """The files to download, smallest first. Raises UnsupportedByModel, PickleRefused or BrokenCheckpoint."""
    by_path = {file.path: file for file in files}
    if "model_index.json" not in by_path:
        raise UnsupportedByModel(
            f"{repo_id} is not in the diffusers layout: it has no model_index.json",
            hint="download the file that you want yourself and use `sdfleet models import`",
        )
    chosen = [file for path, file in by_path.items() if _TOP.fullmatch(path)]
    for component in NEEDED[family] + OPTIONAL[family]:
        start = f"{component}/"
        within = {path.removeprefix(start): file for path, file in by_path.items() if path.startswith(start)}
        chosen += [file for name, file in within.items() if _SMALL.fullmatch(name)]
        if not within and component in NEEDED[family]:
            raise BrokenCheckpoint(f"{repo_id} lacks {component}/", hint="use another repository of this model")
        if within and not component.startswith(("tokenizer", "scheduler")):
            chosen += _weights(within, where=f"{repo_id}/{component}")
    chosen += _checker(by_path, CHECKED_BY.get(family, ()))
    return tuple(sorted(chosen, key=lambda file: (file.n_bytes, file.path)))


def _checker(by_path: dict[str, HubFile], components: Sequence[str]) -> list[HubFile]:
    """The safety checker and its preparation; nothing where it is a pickle alone: pictures are told to be unchecked."""
    chosen: list[HubFile] = []
    for component in components:
        start = f"{component}/"
        within = {path.removeprefix(start): file for path, file in by_path.items() if path.startswith(start)}
        is_readable = component == "feature_extractor" or any(_WEIGHTS.fullmatch(name) for name in within)
        if is_readable:
            chosen += [file for name, file in within.items() if _SMALL.fullmatch(name)]
        if is_readable and component != "feature_extractor":
            chosen += _weights(within, where=component)
    return chosen


def _weights(within: dict[str, HubFile], *, where: str) -> Iterable[HubFile]:
    """One set of weights: a single file, or the shards and their index."""
    found = {name: match for name in within if (match := _WEIGHTS.fullmatch(name))}
    variants = {match["variant"] for match in found.values()}
    if not variants:
        pickle = next((name for name in sorted(within) if name.lower().endswith(PICKLES)), None)
        if pickle is not None:
            raise PickleRefused(f"{where}/{pickle}")
        raise BrokenCheckpoint(f"{where} has no weights (*.safetensors)", hint="use another repository of this model")
    variant = next((one for one in PREFERRED if one in variants), min(filter(None, variants), default=None))
    same = [name for name, match in found.items() if match["variant"] == variant]
    whole = [name for name in same if found[name]["shard"] is None]
    if whole:
        return [within[whole[0]]]
    indexes = [name for name in within if (match := _INDEX.fullmatch(name)) and match["variant"] == variant]
    return [within[name] for name in (*same, *indexes)]
