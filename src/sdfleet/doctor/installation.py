"""What is installed, twice, in part, or in versions that do not fit each other."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path

from sdfleet.catalog.component import TO_READ_PIECES
from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok, warning
from sdfleet.doctor.machine import Machine

OLDEST_PYTHON = (3, 11)
# Where two copies are met most, and whose two copies do the most harm.
OFTEN_TWICE = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "sdfleet")


def python_version(machine: Machine) -> Finding:
    """Whether this Python can run sdfleet."""
    shown = ".".join(map(str, machine.python))
    if machine.python < OLDEST_PYTHON:
        return fault(f"this is Python {shown}; sdfleet needs 3.11 or newer")
    if sys.maxsize < 2**32:
        return fault(f"this Python {shown} is a 32-bit one, for which torch is not built")
    return ok(f"Python {shown}")


def packages(machine: Machine) -> Finding:
    """Whether everything that sdfleet requires is here, in a version that will do."""
    from packaging.requirements import InvalidRequirement, Requirement

    here = _by_name(machine.search_path)
    if "sdfleet" not in here:
        return not_applicable("sdfleet runs from a folder that was not installed, so nobody knows what it requires")
    missing, old, n_met = [], [], 0
    for text in here["sdfleet"][0].requires or ():
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = here.get(_normal(wanted.name))
        if found is None:
            missing.append(wanted.name)
        elif not wanted.specifier.contains(found[0].version, prereleases=True):
            old.append(f"{wanted.name} {found[0].version} (wanted: {wanted.specifier})")
        else:
            n_met += 1
    if not missing and not old:
        return ok(f"all {n_met} packages that sdfleet requires are here")
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"of another version: {', '.join(old)}"] if old else []
    return fault("; ".join(parts), f"{_pip()} install --upgrade --upgrade-strategy only-if-needed sdfleet")


def two_copies(machine: Machine) -> Finding:
    """Whether a library lies twice on Python's path, or is half replaced, or is hidden by a file of the same name."""
    folders = [Path(part or ".") for part in machine.search_path]
    told = []
    for name in OFTEN_TWICE:
        places = list(dict.fromkeys(place.resolve() for folder in folders for place in _places(folder, name)))
        versions = [f"{one.version} in {_parent(one)}" for one in _by_name(machine.search_path).get(_normal(name), [])]
        if len(places) > 1:
            hidden = ", ".join(map(str, places[1:]))
            told.append(f"{name} is imported from {places[0]} and hides {hidden}")
        elif len(versions) > 1:
            told.append(f"{name} is installed as {' and '.join(versions)}")
    if not told:
        return ok(f"none of {len(OFTEN_TWICE)} libraries is here twice")
    again = f"{_pip()} install --force-reinstall --no-deps sdfleet" if "sdfleet" in told[0][:8] else _reinstall(told)
    return fault("; ".join(told), again)


def tokenizer_packages(machine: Machine) -> Finding:
    """Whether T5's tokenizer can be read."""
    missing = [package for package, module in TO_READ_PIECES.items() if not _is_importable(module, machine.search_path)]
    if missing:
        return fault(f"not installed: {', '.join(missing)}", f"{_pip()} install {' '.join(missing)}")
    return ok(f"{' and '.join(TO_READ_PIECES)} are here")


def torchvision(machine: Machine) -> Finding:
    """Whether an installed torchvision was built for the installed torch."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import Version

    here = _by_name(machine.search_path)
    if "torchvision" not in here:
        return not_applicable("torchvision is not installed; sdfleet does without it")
    if "torch" not in here:
        return not_applicable("torch is not installed")
    vision, torch = here["torchvision"][0], here["torch"][0]
    for text in vision.requires or ():
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if _normal(wanted.name) == "torch" and not wanted.specifier.contains(Version(torch.version).base_version):
            return fault(f"torchvision {vision.version} is built for torch{wanted.specifier}, here is {torch.version}")
    if ("+cpu" in torch.version) != ("+cpu" in vision.version) and "+" in torch.version + vision.version:
        return warning(f"torch {torch.version} and torchvision {vision.version} are of different builds")
    return ok(f"torchvision {vision.version} fits torch {torch.version}")


def openvino(machine: Machine) -> Finding:
    """Whether the second executor for CPUs is here."""
    if _is_importable("openvino", machine.search_path):
        return ok("OpenVINO is here; executor auto takes it where it is faster")
    if machine.has_nvidia_card() and machine.settings.device != "cpu":
        return not_applicable("a card draws here; OpenVINO is for CPUs")
    return ok("OpenVINO is not here; on a CPU it may draw faster", f"{_pip()} install 'sdfleet[openvino]'")


def _reinstall(told: Iterable[str]) -> str:
    names = " ".join(dict.fromkeys(line.split()[0] for line in told))
    return f"{_pip()} uninstall -y {names}; {_pip()} install sdfleet (once for each copy)"


def _pip() -> str:
    """pip of this Python: a bare `pip` is often another one's."""
    python = sys.executable or "python"
    return f"{python!r} -m pip" if " " in python else f"{python} -m pip"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _by_name(search_path: tuple[str, ...]) -> dict[str, list[Distribution]]:
    """The installed distributions by their names; those that are found first come first."""
    found: dict[str, list[Distribution]] = defaultdict(list)
    # A folder and a link to it (lib64) are one place.
    places = dict.fromkeys(str(Path(part or ".").resolve()) for part in search_path)
    for each in distributions(path=list(places)):
        name = each.metadata["Name"]
        if name:
            found[_normal(name)].append(each)
    return found


def _parent(distribution: Distribution) -> str:
    return str(Path(str(distribution.locate_file(""))))


def _places(folder: Path, name: str) -> Iterator[Path]:
    if (folder / name / "__init__.py").is_file():
        yield folder / name
    if (folder / f"{name}.py").is_file():
        yield folder / f"{name}.py"


def _is_importable(module: str, search_path: tuple[str, ...]) -> bool:
    path: list[str] | None = list(search_path)
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return False
        path = list(spec.submodule_search_locations or ())
    return True


ENTRIES = (
    Entry(
        id="python-version",
        title="Python is too old",
        symptoms=("requires a different Python", "SyntaxError in a file of sdfleet", "no matching distribution"),
        cause="sdfleet is written for Python 3.11 and newer; torch has no build for 32-bit systems.",
        looks="the version of the Python that runs sdfleet",
        cure="install Python 3.11 or newer and make a new environment with it: python3.11 -m venv .venv",
        check=python_version,
        signs=(
            r"requires a different python", r"requires-python", r"no module named '?tomllib",
            r"could not find a version that satisfies the requirement (sdfleet|torch)",
        ),
    ),
    Entry(
        id="packages",
        title="A package is missing or too old",
        symptoms=("ModuleNotFoundError", "ImportError: cannot import name", "requires accelerate"),
        cause="Another program's installation changed a package that sdfleet shares with it, or one was interrupted.",
        looks="what sdfleet requires against what is installed, by the metadata of the packages",
        cure="python -m pip install --upgrade --upgrade-strategy only-if-needed sdfleet",
        check=packages,
        signs=(
            r"modulenotfounderror", r"no module named", r"cannot import name", r"requires `?accelerate`?",
            r"is required but not (found|installed)", r"compiled using numpy 1", r"numpy\.dtype size changed",
        ),
    ),
    Entry(
        id="two-torches",
        title="Two copies of torch, or of another library",
        symptoms=("undefined symbol", "partially initialized module 'torch'", "module 'torch' has no attribute"),
        cause="A copy in the user's folder, on PYTHONPATH or in the working folder hides the one of the environment, "
        "or an update left parts of the old one behind.",
        looks="every folder on Python's path, for libraries that lie there twice or have two versions on record",
        cure="python -m pip uninstall -y torch, once for each copy; then python -m pip install sdfleet",
        check=two_copies,
        signs=(
            r"undefined symbol", r"partially initialized module", r"module '(torch|diffusers|transformers)' has no",
            r"glibcxx_\S+' not found", r"libtorch\S*: cannot open", r"duplicate (registration|key).*torch",
            r"only a single torch_library can be used",
        ),
    ),
    Entry(
        id="torchvision-build",
        title="torchvision of another build than torch",
        symptoms=("operator torchvision::nms does not exist",),
        cause="torchvision holds compiled parts for one build of torch. sdfleet does not need it, but diffusers and "
        "transformers import it wherever it is installed.",
        looks="what the installed torchvision says it was built for",
        cure="python -m pip uninstall -y torchvision",
        check=torchvision,
        signs=(r"torchvision::nms", r"torchvision\S*\.so", r"torchvision.*(not|mis)match"),
    ),
    Entry(
        id="tokenizer-packages",
        title="protobuf or sentencepiece is missing",
        symptoms=("requires the protobuf library", "requires the SentencePiece library", "slow version of tokenizer"),
        cause="The T5 text encoder of SD3 and FLUX has its vocabulary in a file that these two packages read.",
        looks="whether both can be imported",
        cure="python -m pip install protobuf sentencepiece",
        check=tokenizer_packages,
        signs=(
            r"(requires|need).{0,40}(protobuf|sentencepiece)", r"no module named '?(google\.protobuf|sentencepiece)",
            r"cannot instantiate this tokenizer from a slow version", r"instantiate the backend tokenizer",
            r"descriptors cannot (not )?be created directly", r"converting from (sentencepiece|tiktoken)",
        ),
    ),
    Entry(
        id="openvino",
        title="OpenVINO is not installed",
        symptoms=("slow on a CPU", "executor openvino is not available"),
        cause="On CPUs a denoiser often runs faster in OpenVINO than in torch; it is an extra, not a requirement.",
        looks="whether it can be imported, where no card draws",
        cure="python -m pip install 'sdfleet[openvino]'",
        check=openvino,
        signs=(r"openvino.*(not installed|no module)", r"no module named '?openvino"),
    ),
)  # fmt: skip
