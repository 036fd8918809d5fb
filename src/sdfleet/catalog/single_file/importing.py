"""Make a single file known: a small folder in the diffusers layout that points at it, and the card of that folder.

The file is not copied, and nothing of it but its header is read. What it lacks comes from a diffusers folder that is
here (`base`); everything that is still missing is told in one message, with what to do about each.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdfleet.catalog.cards import Family
from sdfleet.catalog.family_titles import FAMILY_TITLES
from sdfleet.catalog.headers import Header, read_json
from sdfleet.catalog.identify import NEEDED, NOT_OF_A_REFINER, OPTIONAL, Identified, identify
from sdfleet.catalog.single_file.layout import Layout, Prediction, read_any_header, read_layout, whole
from sdfleet.catalog.single_file.origins import SINGLE_FILES, Origin, read_origin, write_origin
from sdfleet.catalog.single_file.vocabulary import N_CLIP_TOKENS, write_clip_vocabulary
from sdfleet.catalog.store import Catalog, Entry
from sdfleet.errors import BrokenCheckpoint, CheckpointError, CheckpointNotFound, InvalidValue

CLIP_MARKS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_DENOISERS = ("unet", "transformer")
_TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
Check = Callable[[Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The entry of a single file, what it is, and what a person should know of it."""

    entry: Entry
    layout: Layout
    notes: tuple[str, ...]


def name_from(path: Path) -> str:
    """A name that a file or folder could be known under.

    >>> name_from(Path("/models/My Model_v1.5 (fp16).safetensors"))
    'my-model_v1.5-fp16'
    """
    stem = path.name if path.is_dir() else path.name.removesuffix(path.suffix)
    name = re.sub(r"\.\.+", ".", re.sub(r"[^a-z0-9._]+", "-", stem.lower())).strip("-._")
    return name[:64].strip("-._") or "model"


def import_file(
    catalog: Catalog, file: Path, *, name: str, base: str | None, prediction: Prediction | None, check: Check
) -> Imported:
    """Make the checkpoint in `file` known under this name. The same file again renews it.

    base: a model's name or a diffusers folder, for what the file lacks. prediction: of a UNet, where the file is wrong
    or silent. check: raises BrokenCheckpoint for a folder whose weights do not fit its configs; nothing is kept then.
    Raises InvalidValue (name), UnknownName (base), and as `read_any_header` and `read_layout`.
    """
    file = file.expanduser().absolute()
    target = catalog.models_folder / SINGLE_FILES / name
    catalog.check_is_free(name, target)
    _check_is_same(target, file)
    header = read_any_header(file)
    layout = read_layout(header, prediction=prediction, label=str(file))
    found_base = None if base is None else identify(_base_folder(catalog, base))
    if found_base is not None:
        layout = _with_kind_of(found_base, layout)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    except OSError as exc:
        raise CheckpointError(
            f"nothing can be written in {target.parent}: {exc.strerror or exc}",
            hint="make that folder writable, or set SD_HOME to another one",
        ) from exc
    try:
        writer = _Writer(made, file=file, header=header, layout=layout, base=found_base, catalog=catalog)
        notes = writer.write()
        check(made)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Imported(entry=catalog.add(target, name=name), layout=layout, notes=(*layout.notes, *notes))


def _check_is_same(target: Path, file: Path) -> None:
    """A name that stands for another file is taken."""
    for component in _DENOISERS:
        try:
            origin = read_origin(target / component)
        except BrokenCheckpoint:
            # The file was moved or changed: importing again is the cure.
            return
        if origin is not None and origin.path != file:
            raise InvalidValue("name", f"{target.name!r} already stands for {origin.path}", hint="choose another name")


def _base_folder(catalog: Catalog, base: str) -> Path:
    path = Path(base).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        raise CheckpointNotFound(
            f"the base {base} is a file", hint="give a model's name, or a folder in the diffusers layout"
        )
    return catalog.resolve(base).folder


def _with_kind_of(base: Identified, layout: Layout) -> Layout:
    """Kontext is dev's network under another name: only a base can tell."""
    if layout.pipeline_class == "FluxPipeline" and base.pipeline_class.startswith("FluxKontext"):
        return replace(layout, pipeline_class=base.pipeline_class)
    return layout


class _Writer:
    """Writes the folder of one single file; collects what is missing until all of it can be told."""

    def __init__(
        self, made: Path, *, file: Path, header: Header, layout: Layout, base: Identified | None, catalog: Catalog
    ) -> None:
        self._made = made
        self._origin = Origin(path=file, n_file_bytes=file.stat().st_size)
        self._header = header
        self._layout = layout
        self._base = base
        self._catalog = catalog
        self._index: dict[str, Any] = {"_class_name": layout.pipeline_class, **layout.flags}
        self._faults: list[str] = []
        self._notes: list[str] = []

    def write(self) -> tuple[str, ...]:
        """Notes for a person. Raises BrokenCheckpoint with everything that is missing."""
        family, is_refiner = self._layout.family, self._layout.flags.get("requires_aesthetics_score", False)
        needed = [name for name in NEEDED[family] if not (is_refiner and name in NOT_OF_A_REFINER)]
        if self._base is not None and self._base.family != family:
            raise BrokenCheckpoint(
                f"{self._origin.path} is {family}, the base {self._base.folder} is {self._base.family}",
                hint="give a base of the same family",
            )
        for name in (*needed, *OPTIONAL[family]):
            if name == "scheduler":
                self._scheduler()
            elif not name.startswith("tokenizer"):
                self._component(name, is_needed=name in needed)
        for encoder, tokenizer in _TOKENIZER_OF.items():
            if encoder in self._index:
                self._tokenizer(tokenizer, encoder, is_needed=encoder in needed)
        if is_refiner:
            self._index |= {name: [None, None] for name in NOT_OF_A_REFINER}
        self._check_fit()
        if self._faults:
            raise BrokenCheckpoint(
                f"{self._origin.path} is {_what(family, self._layout)}, and to draw with it: {'; '.join(self._faults)}",
                hint=f"give a whole {FAMILY_TITLES[family]} model in the diffusers layout: --base NAME_OR_FOLDER",
            )
        self._json("model_index.json", self._index)
        return tuple(self._notes)

    def _component(self, name: str, *, is_needed: bool) -> None:
        part = self._layout.parts.get(name)
        of_base = None if self._base is None else next((p for p in self._base.components if p.name == name), None)
        if part is not None:
            whole(self._layout.parts, self._header, name)
            self._json(f"{name}/config.json", part.config)
            write_origin(self._made / name, self._origin)
            self._index[name] = [_library(part.class_name), part.class_name]
        elif of_base is not None and self._base is not None:
            folder = self._base.folder / name
            self._json(f"{name}/config.json", of_base.config)
            write_origin(self._made / name, Origin(path=folder))
            self._index[name] = [_library(of_base.class_name), of_base.class_name]
            self._notes.append(f"the {name} is taken from {folder}")
        elif is_needed:
            self._faults.append(f"the {name} is missing")

    def _scheduler(self) -> None:
        part = self._layout.scheduler
        config = {"_class_name": part.class_name, **part.config}
        self._json("scheduler/scheduler_config.json", config)
        self._index["scheduler"] = ["diffusers", part.class_name]

    def _tokenizer(self, name: str, encoder: str, *, is_needed: bool) -> None:
        config = read_json(self._made / encoder / "config.json")
        is_t5 = self._index[encoder][1] == "T5EncoderModel"
        class_name = "T5TokenizerFast" if is_t5 else "CLIPTokenizer"
        if self._base is not None and (self._base.folder / name).is_dir():
            shutil.copytree(self._base.folder / name, self._made / name)
            of_base = next(part for part in self._base.components if part.name == name)
            class_name = of_base.class_name
        elif is_t5:
            source = self._known_tokenizer(is_t5=True, vocab_size=None)
            if source is None and not is_needed:
                # SD3 draws without its T5.
                del self._index[encoder]
                shutil.rmtree(self._made / encoder)
                self._notes.append("its T5 is left out: it needs a tokenizer, and no model here has one (see --base)")
                return
            if source is None:
                self._faults.append(f"the {name} (T5's sentence pieces) is missing")
                return
            shutil.copytree(source, self._made / name)
        else:
            vocab_size, source = config["vocab_size"], None
            if vocab_size != N_CLIP_TOKENS:
                n_tokens = vocab_size if isinstance(vocab_size, int) else None
                source = self._known_tokenizer(is_t5=False, vocab_size=n_tokens)
            if source is None and vocab_size != N_CLIP_TOKENS:
                self._faults.append(f"the {name} (CLIP's vocabulary of {vocab_size} tokens) is missing")
                return
            self._clip_tokenizer(name, source)
        self._index[name] = ["transformers", class_name]

    def _clip_tokenizer(self, name: str, source: Path | None) -> None:
        """CLIP's vocabulary is one and the same; what short prompts are filled up with is not.

        source: a tokenizer's folder with a vocabulary of its own; None: CLIP's.
        """
        (self._made / name).mkdir()
        if source is None:
            write_clip_vocabulary(self._made / name)
        else:
            for file in ("vocab.json", "merges.txt", "tokenizer.json"):
                if (source / file).is_file():
                    shutil.copyfile(source / file, self._made / name / file)
        fills_with_zero = name == "tokenizer_2" or self._layout.like == "sd21"
        marks = {**CLIP_MARKS, "pad_token": "!" if fills_with_zero else CLIP_MARKS["eos_token"]}
        self._json(f"{name}/special_tokens_map.json", marks)
        self._json(
            f"{name}/tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **marks},
        )

    def _known_tokenizer(self, *, is_t5: bool, vocab_size: int | None) -> Path | None:
        """One that a model on this machine has: the base first, then any that was imported or pulled."""
        folders = [] if self._base is None else [self._base.folder]
        folders += [entry.folder for entry in self._catalog.entries()]
        for folder in folders:
            for name in _TOKENIZER_OF.values():
                if is_t5:
                    if _is_t5_tokenizer(folder / name):
                        return folder / name
                elif vocab_size is not None and _n_clip_tokens(folder / name) == vocab_size:
                    return folder / name
        return None

    def _check_fit(self) -> None:
        """That the encoders speak in the width the denoiser listens in, and the codec in its channels."""

        def said(name: str, key: str) -> Any:
            file = self._made / name / "config.json"
            return read_json(file).get(key) if name in self._index and file.is_file() else None

        unet_or_transformer = next(name for name in _DENOISERS if name in self._layout.parts)
        denoiser = self._layout.parts[unet_or_transformer].config
        clip, second = said("text_encoder", "hidden_size"), said("text_encoder_2", "hidden_size")
        pooled, pooled_second = said("text_encoder", "projection_dim"), said("text_encoder_2", "projection_dim")
        pairs: list[tuple[str, Any, Any]] = []
        match self._layout.family:
            case "sd":
                pairs = [("text_encoder", clip, denoiser["cross_attention_dim"])]
            case "sdxl":
                is_refiner = "requires_aesthetics_score" in self._index
                both = clip + second if clip and second else None
                pairs = [("text encoders", second if is_refiner else both, denoiser["cross_attention_dim"])]
            case "sd3":
                both = pooled + pooled_second if pooled and pooled_second else None
                pairs = [
                    ("text encoders", both, denoiser["pooled_projection_dim"]),
                    ("text_encoder_3", said("text_encoder_3", "d_model"), denoiser["joint_attention_dim"]),
                ]
            case "flux":
                pairs = [
                    ("text_encoder", clip, denoiser["pooled_projection_dim"]),
                    ("text_encoder_2", said("text_encoder_2", "d_model"), denoiser["joint_attention_dim"]),
                ]
        channels = {"flux": 16, "sd3": 16}.get(self._layout.family, 4)
        pairs.append(("vae", said("vae", "latent_channels"), channels))
        self._faults += [
            f"the {what} is {width} wide where the {unet_or_transformer} takes {wanted}"
            for what, width, wanted in pairs
            if width is not None and width != wanted
        ]

    def _json(self, name: str, value: Mapping[str, Any]) -> None:
        path = self._made / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")


def _what(family: Family, layout: Layout) -> str:
    """`FLUX.1 (its transformer alone)`."""
    parts = [name for name in layout.parts if name not in _DENOISERS]
    inside = f"with {', '.join(parts)}" if parts else "its denoiser alone"
    return f"{FAMILY_TITLES[family]} ({inside})"


def _library(class_name: str) -> str:
    return "transformers" if class_name.startswith(("CLIP", "T5", "Qwen")) else "diffusers"


def _is_t5_tokenizer(folder: Path) -> bool:
    if (folder / "spiece.model").is_file():
        return True
    model = read_json(folder / "tokenizer.json").get("model") if (folder / "tokenizer.json").is_file() else None
    return isinstance(model, dict) and model.get("type") == "Unigram"


def _n_clip_tokens(folder: Path) -> int | None:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return len(read_json(folder / "vocab.json"))
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model")
    added = tokenizer.get("added_tokens")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return None
    vocabulary = model["vocab"]
    contents = {token.get("content") for token in added} if isinstance(added, list) else set()
    # Qwen's vocabulary is a BPE too; CLIP's has the mark that ends every word.
    return len(vocabulary.keys() | contents) if CLIP_MARKS["bos_token"] in vocabulary.keys() | contents else None
