"""The models of this machine: whole, readable, and with tokenizers."""

from __future__ import annotations

from sdfleet.catalog.cards import is_name
from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok
from sdfleet.doctor.machine import Machine
from sdfleet.errors import BrokenCheckpoint, CheckpointError, SdfleetError


def preflight(machine: Machine) -> Finding:
    """Whether every model here could be loaded, as far as its files tell."""
    catalog = machine.catalog()
    faults, cures, n_well = [], [], 0
    try:
        entries = catalog.entries()
    except CheckpointError as exc:
        return fault(exc.message, exc.hint)
    for entry in entries:
        try:
            catalog.inspect(entry)
        except SdfleetError as exc:
            faults.append(f"{entry.card.name}: {exc.message}")
            again = f"sdfleet models pull {entry.card.name}" if catalog.is_pulled(entry) else exc.hint
            cures.append(again)
        else:
            n_well += 1
    for name in _names_of_cards(machine):
        try:
            catalog.card(name)
        except BrokenCheckpoint as exc:
            faults.append(exc.message)
            cures.append(exc.hint)
        except SdfleetError:
            continue
    if faults:
        return fault("; ".join(faults), "; ".join(dict.fromkeys(filter(None, cures))))
    return ok(f"{n_well} model{'' if n_well == 1 else 's'} can be loaded, as far as the files tell")


def default_model(machine: Machine) -> Finding:
    """Whether the model that is drawn with where none is named is here."""
    catalog = machine.catalog()
    try:
        entry = catalog.resolve(machine.settings.model)
    except SdfleetError as exc:
        return fault(exc.message, exc.hint)
    if entry.is_built_in and machine.settings.model == "starter":
        return ok("the built-in model is drawn with where none is named")
    if entry.card.backend is not None:
        return ok(f"{entry.card.name} is drawn with where no model is named, by {entry.card.backend}")
    if not entry.folder.is_dir():
        return fault(f"the folder of {entry.card.name} is gone: {entry.folder}", "sdfleet models list")
    return ok(f"{entry.card.name} is drawn with where no model is named")


def unfinished(machine: Machine) -> Finding:
    """Whether a download was cut off."""
    folder = machine.settings.models_folder / "weights"
    names = sorted(path.name.removeprefix(".").removesuffix(".part") for path in folder.glob(".*.part"))
    if not names:
        return not_applicable("no download was cut off")
    return ok(f"{', '.join(names)}: the download was cut off, or goes on now", f"sdfleet models pull {names[0]}")


def _names_of_cards(machine: Machine) -> list[str]:
    try:
        names = [path.stem for path in machine.settings.models_folder.glob("*.toml")]
    except OSError:
        return []
    return sorted(name for name in names if is_name(name))


ENTRIES = (
    Entry(
        id="broken-model",
        title="A model is not whole",
        symptoms=("is not a whole checkpoint", "is truncated", "Error while deserializing header", "size mismatch for"),
        cause="A copy or a download was cut off, a part was left out, or the files are of different checkpoints.",
        looks="every model's configs, tokenizers and file headers; no weight is read",
        cure="sdfleet models verify NAME, then sdfleet models pull NAME; an import: get its files again",
        check=preflight,
        limit_s=30.0,
        signs=(
            r"error while deserializing header", r"metadataincompletebuffer", r"headertoo(large|small)",
            r"invalidheader", r"size mismatch for", r"no file named .{0,80}(found|in directory)", r"is truncated",
            r"the checkpoint at .* has", r"model_index\.json", r"missing key\(s\) in state_dict", r"safetensorerror",
        ),
        codes=("broken_checkpoint", "checkpoint_error"),
    ),
    Entry(
        id="tokenizer-missing",
        title="The tokenizer is missing",
        symptoms=("Can't load tokenizer for", "tokenizer/vocab.json is missing", "expected str, bytes or os.PathLike"),
        cause="The tokenizer's folders hold small files that copies and partial downloads often leave out.",
        cure="get the folders tokenizer, tokenizer_2 and tokenizer_3 again (sdfleet models pull NAME), "
        "with tokenizer.json, or vocab.json and merges.txt",
        checked_by="broken-model",
        signs=(
            r"can'?t load tokenizer", r"tokenizer(_\d)?/\S+ is missing", r"the folder tokenizer(_\d)?/ is missing",
            r"(unable|not able|failed) to load (the )?(vocabulary|tokenizer)", r"vocab\.json", r"merges\.txt",
            r"spiece\.model", r"tokenizer.{0,80}expected str, bytes or os\.pathlike",
        ),
    ),
    Entry(
        id="default-model",
        title="The default model is not here",
        symptoms=("there is no model named", "the weights of ... are not on this machine"),
        cause="SD_MODEL names a model that was never pulled, was removed, or is spelled otherwise.",
        looks="the model of SD_MODEL among those that are here",
        cure="sdfleet models list; sdfleet models pull NAME; or unset SD_MODEL for the built-in one",
        check=default_model,
        signs=(r"there is no model named", r"are not on this machine", r"is not available on any node"),
        codes=("checkpoint_not_found",),
    ),
    Entry(
        id="unfinished-download",
        title="A download was cut off",
        symptoms=("download cancelled", "another process is downloading"),
        cause="The connection, the program or the machine ended in the middle. What has arrived is kept.",
        looks="unfinished downloads in the folder of weights",
        cure="sdfleet models pull NAME goes on where it stopped",
        check=unfinished,
        signs=(
            r"another process is downloading", r"incompletesnapshoterror", r"download.{0,20}(interrupted|cancelled)",
        ),
        codes=("download_cancelled",),
    ),
    Entry(
        id="pickle",
        title="A checkpoint in a format that can run code",
        symptoms=(".ckpt, .bin and .pt are refused", "Weights only load failed", "unsafe pickle"),
        cause="Opening a pickle runs whatever code it carries. sdfleet opens safetensors and GGUF alone.",
        cure="convert it to .safetensors on a machine you do not mind losing, then sdfleet models import FILE",
        checked_by="broken-model",
        signs=(r"is a pickle", r"weights only load failed", r"unsafe pickle", r"unpicklingerror", r"weights_only"),
        codes=("pickle_refused",),
    ),
    Entry(
        id="prompt-cut",
        title="The prompt is longer than CLIP reads",
        symptoms=("Token indices sequence length is longer than", "part of your input was truncated"),
        cause="CLIP reads 77 tokens at a time, and many programs drop the rest. sdfleet reads long prompts in pieces "
        "and drops nothing.",
        cure="nothing with sdfleet; its answers warn where a model cannot take the whole prompt",
        signs=(r"token indices sequence length", r"input was truncated", r"sequences up to 77 tokens"),
    ),
)  # fmt: skip
