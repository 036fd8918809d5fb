"""What draws: whether a card is used, whether torch can use it, and number formats that do not suit it."""

from __future__ import annotations

import re
from pathlib import Path

from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok, warning
from sdfleet.doctor.machine import Card, Machine, TorchView, gb

TORCH_PAGE = "https://pytorch.org/get-started/locally"
# A process of the compiler that has outlived whoever wanted the code has this in its command line.
WORKER = "torch/_inductor/compile_worker"


def torch_import(machine: Machine) -> Finding:
    """Whether torch can be imported at all, in a process of its own."""
    seen = machine.torch.view()
    if seen.fault:
        return fault(f"torch cannot be used: {seen.fault}")
    return ok(f"torch {seen.version} from {Path(seen.file).parent}, imported in {seen.import_s} s")


def torch_without_cuda(machine: Machine) -> Finding:
    """Whether torch is a build without CUDA beside a card of NVIDIA."""
    if not machine.has_nvidia_card():
        return not_applicable("the system shows no card of NVIDIA")
    seen = machine.torch.view()
    if seen.fault:
        return not_applicable("torch cannot be imported, see torch-import")
    if seen.cuda_build is None:
        return fault(f"this machine has a card of NVIDIA, and torch {seen.version} is a build for CPUs")
    return ok(f"torch {seen.version} is built with CUDA {seen.cuda_build}")


def driver(machine: Machine) -> Finding:
    """Whether the driver lets torch use the card."""
    if not machine.has_nvidia_card():
        return not_applicable("the system shows no card of NVIDIA")
    seen = machine.torch.view()
    if seen.fault or seen.cuda_build is None:
        return not_applicable("torch cannot use a card at all, see torch-import and torch-without-cuda")
    has = _driver_version(machine)
    if seen.has_cuda:
        return ok(f"driver {has} serves CUDA {seen.cuda_build}")
    if machine.variables.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return not_applicable("CUDA_VISIBLE_DEVICES hides every card, see drawing-on-cpu")
    said = f"; torch says: {seen.cuda_said}" if seen.cuda_said else ""
    return fault(f"torch is built with CUDA {seen.cuda_build} and sees no card with driver {has}{said}")


def card_too_new(machine: Machine) -> Finding:
    """Whether torch holds code for every card."""
    seen = machine.torch.view()
    if not seen.cards:
        return not_applicable("torch sees no card of NVIDIA")
    foreign = [card for card in seen.cards if not _is_built_for(seen, card)]
    if foreign:
        names = ", ".join(f"{card.name} (sm_{card.capability[0]}{card.capability[1]})" for card in foreign)
        return fault(f"torch {seen.version} holds no code for {names}; it has {', '.join(seen.is_built_for)}")
    return ok(", ".join(f"{card.name} with {gb(card.total_bytes)}" for card in seen.cards))


def drawing_on_cpu(machine: Machine) -> Finding:
    """Whether pictures are drawn on the CPU beside a card that torch can use, or that is hidden from it."""
    hidden = machine.variables.get("CUDA_VISIBLE_DEVICES")
    if machine.has_nvidia_card() and hidden in {"", "-1"}:
        return warning(f"CUDA_VISIBLE_DEVICES is {hidden!r}: no program sees a card", "unset CUDA_VISIBLE_DEVICES")
    seen = machine.torch.view()
    usable = "cuda" if seen.has_cuda else "mps" if seen.has_mps else ""
    if not usable:
        return not_applicable("torch sees nothing but the CPU")
    if machine.settings.device == "cpu":
        return warning(f"the device is set to cpu, and torch could use {usable}", "unset SD_DEVICE, or SD_DEVICE=auto")
    return ok(f"pictures are drawn on {usable}")


def engine_on_cpu(machine: Machine) -> Finding:
    """Whether a server that runs draws on the CPU beside a card; asks nobody."""
    standing = machine.standing
    if standing is None or "device" not in standing.facts:
        return not_applicable("no engine runs in this process")
    device = standing.facts["device"]
    if device == "cpu" and machine.has_nvidia_card() and machine.settings.device != "cpu":
        return warning("the engine draws on the CPU, and the system shows a card of NVIDIA", "sdfleet doctor")
    return ok(f"the engine draws on {device}")


def float16_on_cpu(machine: Machine) -> Finding:
    """Whether float16 is asked for where it is emulated."""
    if machine.settings.dtype != "float16":
        return ok(f"the number format is set to {machine.settings.dtype}")
    if machine.settings.device == "cpu":
        return fault("SD_DTYPE=float16 with SD_DEVICE=cpu: the engine will refuse to start")
    seen = machine.torch.view()
    if seen.fault:
        return not_applicable("torch cannot be imported, see torch-import")
    if not seen.has_cuda and not seen.has_mps:
        return fault("float16 is asked for, and torch sees nothing but a CPU: the engine will refuse to start")
    return ok("float16 is asked for, on a card")


def black_pictures(machine: Machine) -> Finding:
    """Where half precision can overflow, and what is done about it."""
    seen = machine.torch.view()
    if seen.has_mps and not seen.has_cuda:
        return ok("Metal in half precision; sdfleet keeps the VAE in float32 there, so pictures are not black")
    old = [card for card in seen.cards if card.capability < (8, 0)]
    if old or (seen.has_cuda and machine.settings.dtype == "float16"):
        return ok("float16 on a card; a VAE that overflows is run again in float32, and the job's warnings say so")
    return not_applicable("no device here computes in float16")


def processor(machine: Machine) -> Finding:
    """What the CPU can do that decides on speed."""
    try:
        text = (machine.proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not_applicable("the system does not tell the CPU's features")
    found = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    if found is None:
        return not_applicable("the system does not tell the CPU's features")
    flags = set(found[1].split())
    if "avx2" not in flags:
        return warning("this CPU has no AVX2: pictures take several times as long, and some libraries end with SIGILL")
    fast = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512"}
    here = [name for flag, name in fast.items() if flag in flags]
    return ok(f"AVX2{''.join(f', {name}' for name in here)}; {_on_bfloat16(here)}")


def compile_workers(machine: Machine) -> Finding:
    """Whether compiling is off against what is asked for, or the compiler left processes behind."""
    import shutil

    left = _orphans(machine.proc)
    if left:
        pids = " ".join(map(str, left))
        return warning(f"{len(left)} of the compiler's processes live on without their parent", f"kill {pids}")
    if machine.settings.compile == "off":
        return ok("nothing is compiled")
    if machine.variables.get("TORCH_COMPILE_DISABLE") == "1":
        cure = "unset TORCH_COMPILE_DISABLE"
        is_asked = machine.settings.compile == "on"
        what = "TORCH_COMPILE_DISABLE is set"
        return warning(f"{what}, though SD_COMPILE=on", cure) if is_asked else ok(f"{what}: nothing is compiled")
    if machine.settings.compile == "on" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return fault("SD_COMPILE=on, and no C++ compiler is here", "install g++, or unset SD_COMPILE")
    return ok("no process of the compiler was left behind")


def _driver_version(machine: Machine) -> str:
    try:
        text = (machine.proc / "driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "unknown"
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else "unknown"


def _is_built_for(seen: TorchView, card: Card) -> bool:
    """Code for the same generation runs; so does intermediate code (`compute_`) of an older one."""
    major, minor = card.capability
    for name in seen.is_built_for:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if found is None:
            continue
        has = (int(found[2]), int(found[3]))
        if (found[1] == "sm" and has[0] == major and has[1] <= minor) or (
            found[1] == "compute" and has <= (major, minor)
        ):
            return True
    return not seen.is_built_for


def _on_bfloat16(here: list[str]) -> str:
    if {"AMX", "AVX512-BF16"} & set(here):
        return "bfloat16 is computed natively"
    return "bfloat16 is emulated, so float32 is used"


def _orphans(proc: Path) -> list[int]:
    """Processes of torch's compiler whose parent is the system's first process."""
    found = []
    try:
        folders = [folder for folder in proc.iterdir() if folder.name.isdigit()]
    except OSError:
        return []
    for folder in folders:
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if WORKER not in command:
                continue
            parent = re.search(r"^PPid:\s*(\d+)", (folder / "status").read_text(errors="replace"), re.MULTILINE)
        except OSError:
            continue  # it has ended meanwhile
        if parent is not None and parent[1] == "1":
            found.append(int(folder.name))
    return sorted(found)


ENTRIES = (
    Entry(
        id="torch-import",
        title="torch cannot be imported",
        symptoms=("the engine ends before it is ready", "cannot open shared object file", "DLL load failed"),
        cause="torch is missing, broken by a second copy, or needs a system library that is not here.",
        looks="a process of its own imports torch",
        cure="python -m pip install --force-reinstall torch; see also sdfleet doctor two-torches",
        check=torch_import,
        effort="slow",
        limit_s=120.0,
        signs=(
            r"no module named '?torch\b", r"cannot open shared object file", r"dll load failed", r"c10\.dll",
            r"the engine's process ended with exit code", r"static tls block",
        ),
    ),
    Entry(
        id="torch-without-cuda",
        title="The GPU is not used: torch is a build for CPUs",
        symptoms=("zero GPU use", "Torch not compiled with CUDA enabled", "cuda.is_available() is False"),
        cause="Without a word, package installers take the build without CUDA on some systems.",
        looks="the system's card against torch's build, asked in a process of its own",
        cure=f"take the command for your CUDA from {TORCH_PAGE}, with --force-reinstall",
        check=torch_without_cuda,
        effort="slow",
        limit_s=120.0,
        signs=(
            r"torch not compiled with cuda", r"no cuda.{0,20}device that torch can use", r"no cuda gpus are available",
            r"attempting to deserialize object on a cuda device", r"cuda\.is_available\(\) is false",
        ),
    ),
    Entry(
        id="gpu-driver",
        title="The driver is missing or too old for torch",
        symptoms=("The NVIDIA driver on your system is too old", "Found no NVIDIA driver", "nvidia-smi has failed"),
        cause="Each CUDA needs a driver that is at least as new; after an update the old one runs until a restart.",
        looks="whether torch, built with CUDA, sees the card that the system shows",
        cure="install the newest driver of your card and restart; or a torch built with an older CUDA",
        check=driver,
        effort="slow",
        limit_s=120.0,
        signs=(
            r"nvidia driver on your system is too old", r"found no nvidia driver", r"nvidia-smi has failed",
            r"cuda driver version is insufficient", r"driver/library version mismatch", r"cuda unknown error",
            r"cuda initialization",
        ),
    ),
    Entry(
        id="card-not-in-build",
        title="torch holds no code for this card",
        symptoms=("no kernel image is available for execution on the device", "is not compatible with the current"),
        cause="A build of torch serves some generations of cards; very new and very old ones are not among them.",
        looks="the card's generation against those that torch was built for",
        cure=f"take a torch built with a newer CUDA (or, for an old card, an older torch) from {TORCH_PAGE}",
        check=card_too_new,
        effort="slow",
        limit_s=120.0,
        signs=(r"no kernel image is available", r"is not compatible with the current pytorch installation"),
    ),
    Entry(
        id="drawing-on-cpu",
        title="The GPU is there and idle",
        symptoms=("zero GPU use", "0 % in nvidia-smi", "pictures take minutes"),
        cause="A setting or a variable keeps the card from being used.",
        looks="SD_DEVICE and CUDA_VISIBLE_DEVICES against what torch sees",
        cure="SD_DEVICE=auto",
        check=drawing_on_cpu,
        effort="slow",
        limit_s=120.0,
        signs=(r"this machine has no (cuda|mps) device", r"gpu (is )?not (being )?used", r"zero gpu"),
    ),
    Entry(
        id="engine-on-cpu",
        title="The server draws on the CPU beside a card",
        symptoms=("the device of /health is cpu",),
        cause="The engine found no card it could use when it started.",
        looks="what the engine of this server says of itself; only in /dashboard/api/health",
        cure="sdfleet doctor, which asks torch; then start the server again",
        check=engine_on_cpu,
    ),
    Entry(
        id="float16-on-cpu",
        title="float16 on a CPU",
        symptoms=(
            "\"LayerNormKernelImpl\" not implemented for 'Half'", "cannot run with cpu device",
            "hundreds of times slower",
        ),
        cause="CPUs have no float16 arithmetic: torch refuses some of it and emulates the rest.",
        looks="SD_DTYPE against the device",
        cure="SD_DTYPE=auto (bfloat16 where the CPU computes it, float32 elsewhere)",
        check=float16_on_cpu,
        effort="slow",
        limit_s=120.0,
        signs=(
            r"not implemented for 'half'", r"float16.{0,60}(cannot|can't|not).{0,30}cpu",
            r"float16 arithmetic on a cpu", r"input type \(.*half\) and bias type",
        ),
    ),
    Entry(
        id="black-pictures",
        title="Black pictures",
        symptoms=("black image on a Mac", "invalid value encountered in cast", "NaN produced in the VAE"),
        cause="In float16 the VAE of many checkpoints overflows; all of its pixels become NaN, shown as black. "
        "Outside sdfleet also a safety checker's way to withhold a picture.",
        looks="which device computes in float16, and how sdfleet guards it",
        cure="SD_DTYPE=auto; if it was sdfleet that drew, report the model and the seed",
        check=black_pictures,
        effort="slow",
        limit_s=120.0,
        signs=(
            r"invalid value encountered in cast", r"\bnans?\b.{0,60}\b(vae|unet|produced|tensor)", r"nansexception",
            r"black (image|picture)", r"potential nsfw content was detected",
        ),
    ),
    Entry(
        id="processor",
        title="The CPU lacks AVX2",
        symptoms=("Illegal instruction", "SIGILL", "very slow on an old CPU or in a virtual machine"),
        cause="Libraries are built for CPUs with AVX2; virtual machines often hide it from their guests.",
        looks="the features that the system tells of the CPU",
        cure="in a virtual machine, pass the host's CPU through (`cpu: host`); else draw on another machine",
        check=processor,
        signs=(r"illegal instruction", r"\bsigill\b"),
    ),
    Entry(
        id="compile-workers",
        title="Compiling hangs, or leaves processes behind",
        symptoms=("the first picture never comes", "compile_worker processes at 100 %", "BackendCompilerFailed"),
        cause="torch.compile starts a process for each core; short of memory or without a compiler they stand still, "
        "and they outlive an engine that was killed.",
        looks="processes of torch's compiler without a parent, and the settings that decide on compiling",
        cure="SD_COMPILE=off",
        check=compile_workers,
        signs=(
            r"backendcompilerfailed", r"compile_worker", r"inductorerror", r"torch\._dynamo\.exc", r"no c\+\+ compiler",
            r"invalidcxxcompiler", r"cannot find a working triton", r"subprocpool", r"triton.{0,40}(missing|not found)",
        ),
    ),
    Entry(
        id="card-fault",
        title="The card itself, or its driver, fell over",
        symptoms=("CUDA error: an illegal memory access was encountered", "Xid in the system's log", "GPU is lost"),
        cause="A fault of the driver or of the card: heat, power, memory, a card pulled out of a virtual machine.",
        cure="restart the server; if it comes back, look for Xid in `dmesg` and restart the machine",
        signs=(
            r"illegal memory access", r"device-side assert", r"gpu (is lost|has fallen off)", r"\bxid\b",
            r"cublas_status_(?!alloc_failed)", r"cudnn_status_", r"unspecified launch failure", r"ecc error",
        ),
    ),
    Entry(
        id="metal-operator",
        title="An operator that Metal does not have",
        symptoms=("is not currently implemented for the MPS device",),
        cause="torch has no Metal code for some operators; sdfleet uses none of these, plugins and other programs do.",
        cure="update torch; for another program, PYTORCH_ENABLE_MPS_FALLBACK=1",
        signs=(r"not (currently )?implemented for the mps device", r"pytorch_enable_mps_fallback"),
    ),
)  # fmt: skip
