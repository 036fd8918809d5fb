"""What runs a denoiser's forward: torch, or OpenVINO where it was measured to be faster on this machine.

    1. a checkpoint's first pictures are drawn by torch
    2. when the engine is idle, another process converts the denoiser (openvino_cache.py); nobody waits for it
    3. idle again, both are timed on the last real call, one call a turn, and their answers compared
    4. the faster one stays, the other leaves the memory; the times are kept beside the conversion, and after the next
       start OpenVINO takes over in the first pause without a trial

The choice is one per checkpoint, not per number of rows: keeping two copies of the weights for the last few per cent is
not worth their memory. It changes only when nothing is being drawn, so all pictures of a job come from one executor.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
import weakref
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.devices import Device
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.openvino_cache import Conversion, ConversionFailed, ModelCache, Trial
from sdfleet.engine.openvino_calls import NetworkCall, call_of
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser
from sdfleet.errors import InvalidValue

log = logging.getLogger(__name__)

# Rows that are tried: a picture with guidance, and batches of four and eight of them.
TRIED_ROWS = (2, 8, 16)
_REPEATS = 5
# More rows are not tried where one call would take longer: a job that comes in between waits for one call.
_LONGEST_CALL_S = 3.0
# OpenVINO must win by this on the geometric mean of the rows tried. Below that the noise of a busy machine decides.
_MUST_WIN_BY = 1.05
# Largest distance of the answers, rms over rms. Measured on the built-in model and the toys of three families, at seven
# shapes each: float32 below 2e-6; bfloat16 up to 0.026, where torch's own distance from float32 is up to 0.032.
_MOST_APART = {torch.float32: 1e-4, torch.bfloat16: 0.04}
# The converting process held 2.3 times the float32 weights for SD 1.5.
_CONVERTING_TAKES = 3

Choice = Literal["torch", "openvino"]


@dataclass(slots=True)
class _Denoiser:
    """What is known of one checkpoint's denoiser. `why`: of the present choice, for people."""

    components: Components
    name: ComponentName
    call: NetworkCall
    key: str
    choice: Choice = "torch"
    why: str = "not tried yet"
    is_settled: bool = False
    trial: Trial | None = None
    conversion: Conversion | None = None
    trying: Iterator[None] | None = None
    watched: weakref.ref[Any] | None = None
    last_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    unwatch: list[Any] = field(default_factory=list)


class Executors:
    """Chooses for every checkpoint of one engine. Raises InvalidValue where OpenVINO is asked for and cannot be."""

    def __init__(self, device: Device, options: EngineOptions) -> None:
        self._device = device
        self._is_forced = options.executor == "openvino"
        self._most_rows = options.max_rows or TRIED_ROWS[-1]
        if self._is_forced:
            _refuse_where_it_cannot_be(device)
        # Without a folder a conversion would be lost with the process that made it: then only when it is asked for.
        wanted = self._is_forced or (options.executor == "auto" and options.cache_folder is not None)
        self._is_on = wanted and _can_be(device)
        self._cache = ModelCache(Path(options.cache_folder) if options.cache_folder is not None else None)
        self._known: dict[str, _Denoiser] = {}

    def adopt(self, components: Components, name: ComponentName) -> None:
        """A checkpoint was opened and nothing of it is loaded yet: what is known decides what will be."""
        call = call_of(components.class_name(name), components.config(name)) if self._is_on else None
        if call is None:
            return
        checkpoint = str(components.folder)
        key = self._cache.key(components.folder, name)
        denoiser = self._known.get(checkpoint)
        if denoiser is None or denoiser.key != key:
            self.forget(checkpoint)
            denoiser = self._known[checkpoint] = _Denoiser(components, name, call, key)
        denoiser.components = components
        if not denoiser.is_settled:
            if self._is_forced:
                self._settle(denoiser, "openvino", "as asked")
            elif self._cache.find(key) is not None:
                trial = self._cache.trial(key, dtype=self._device.dtype_name, n_threads=torch.get_num_threads())
                if trial is not None and _gain(trial) < _MUST_WIN_BY:
                    self._decide(denoiser, trial)
                elif trial is not None:
                    # Compiling takes a second, which is more than it saves a first picture: taken in the first pause.
                    denoiser.trial = trial
        if denoiser.choice == "openvino":
            components.serve(name, lambda: self._opened(denoiser))

    def watch(self, components: Components) -> None:
        """Note the calls of a denoiser that is in memory and not yet tried: the trial repeats the last of them."""
        denoiser = self._known.get(str(components.folder))
        if denoiser is None or denoiser.is_settled:
            return
        module = components.use(denoiser.name)
        if denoiser.watched is not None and denoiser.watched() is module:
            return

        def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            denoiser.last_call = (args, kwargs)

        denoiser.watched = weakref.ref(module)
        denoiser.unwatch = [module.register_forward_pre_hook(note, with_kwargs=True)]

    def has_chore(self, checkpoints: Collection[str]) -> bool:
        """Whether one of these checkpoints, whose parts are all in memory, has something to be tried now."""
        return self._chore(checkpoints) is not None

    def do_chore(self, checkpoints: Collection[str], *, room_bytes: Mapping[str, int]) -> str | None:
        """A little work, at most about one network call; the checkpoint whose executor changed by it.

        Only while nothing is drawn. room_bytes: what each checkpoint may still take.
        """
        denoiser = self._chore(checkpoints)
        if denoiser is None:
            return None
        checkpoint = str(denoiser.components.folder)
        try:
            if denoiser.trying is not None:
                next(denoiser.trying, None)
            elif denoiser.conversion is not None:
                conversion, denoiser.conversion = denoiser.conversion, None
                conversion.result()
                self._cache.tidy(denoiser.key)
            elif self._cache.find(denoiser.key) is not None:
                denoiser.trying = self._tried(denoiser)
            elif self._in_float32(denoiser) * _CONVERTING_TAKES > room_bytes[checkpoint]:
                self._settle(denoiser, "torch", "there is no memory to convert it for OpenVINO")
            else:
                folder = denoiser.components.folder
                denoiser.conversion = self._cache.convert(folder, denoiser.name, denoiser.key, in_background=True)
        except (ConversionFailed, RuntimeError, OSError) as exc:  # RuntimeError: what OpenVINO and torch raise
            self._give_up(denoiser, exc)
        return checkpoint if denoiser.is_settled and denoiser.choice == "openvino" else None

    def let_go(self, checkpoint: str) -> None:
        """The checkpoint leaves the memory: a trial will begin anew; what is decided or converting stays."""
        denoiser = self._known.get(checkpoint)
        if denoiser is not None:
            denoiser.trying = denoiser.watched = denoiser.last_call = None

    def forget(self, checkpoint: str) -> None:
        """Know nothing of a checkpoint any more."""
        denoiser = self._known.pop(checkpoint, None)
        if denoiser is not None and denoiser.conversion is not None:
            denoiser.conversion.cancel()

    def facts(self) -> dict[str, object]:
        """By checkpoint: the executor, why it, and what was measured, as JSON values."""
        told: dict[str, object] = {}
        for checkpoint, denoiser in self._known.items():
            facts: dict[str, object] = {"executor": denoiser.choice, "why": denoiser.why}
            if denoiser.trial is not None:
                facts["torch_ms_by_rows"] = _ms(denoiser.trial.torch_s)
                facts["openvino_ms_by_rows"] = _ms(denoiser.trial.openvino_s)
                facts["answers_apart"] = float(f"{denoiser.trial.apart:.2g}")
            told[checkpoint] = facts
        return told

    def close(self) -> None:
        """End what is converting and remove what was only for this engine."""
        for checkpoint in list(self._known):
            self.forget(checkpoint)
        self._cache.close()

    def _chore(self, checkpoints: Collection[str]) -> _Denoiser | None:
        if self._is_forced:
            return None
        is_converting = any(d.conversion is not None and not d.conversion.has_ended for d in self._known.values())
        for checkpoint in checkpoints:
            denoiser = self._known.get(checkpoint)
            if denoiser is None or denoiser.is_settled or denoiser.last_call is None:
                continue
            if denoiser.trying is not None or not is_converting:
                return denoiser
        return None

    def _opened(self, denoiser: _Denoiser) -> Any:
        """The converted denoiser, converted now if it must be; torch's module where that fails."""
        try:
            model_file = self._cache.find(denoiser.key)
            if model_file is None:
                folder = denoiser.components.folder
                conversion = self._cache.convert(folder, denoiser.name, denoiser.key, in_background=False)
                model_file = conversion.result()
                self._cache.tidy(denoiser.key)
            return self._compiled(denoiser, model_file)
        except (ConversionFailed, RuntimeError, OSError) as exc:
            self._give_up(denoiser, exc)
            return denoiser.components.load(denoiser.name)

    def _compiled(self, denoiser: _Denoiser, model_file: Path) -> OpenVinoDenoiser:
        size = denoiser.components.weights(text_encoders=()).denoiser
        return OpenVinoDenoiser(model_file, denoiser.call, dtype=self._device.dtype, resident_bytes=size)

    def _in_float32(self, denoiser: _Denoiser) -> int:
        return denoiser.components.weights(text_encoders=()).denoiser * 4 // self._device.dtype.itemsize

    def _tried(self, denoiser: _Denoiser) -> Iterator[None]:
        """The trial, one network call at a time."""
        model_file = self._cache.find(denoiser.key)
        assert model_file is not None
        assert denoiser.last_call is not None
        args, kwargs = denoiser.last_call
        by_torch = denoiser.components.use(denoiser.name)
        by_openvino = self._compiled(denoiser, model_file)
        if denoiser.trial is not None:
            self._take_over(denoiser, denoiser.trial, by_openvino)
            return
        yield
        apart = 0.0
        # Another size and other lengths than those timed below, so that nothing in the trace is taken for fixed.
        for changed in (_with_rows(args, kwargs, 3), _half_as_high(*_with_rows(args, kwargs, 2))):
            _, expected = timed_call(by_torch, *changed)
            yield
            _, answer = timed_call(by_openvino, *changed)
            yield
            apart = max(apart, _apart(answer, expected))
        if not apart <= _MOST_APART.get(self._device.dtype, 0.0):
            self._settle(denoiser, "torch", f"OpenVINO's answers are {apart:.2g} away from torch's")
            return
        torch_s: dict[int, float] = {}
        openvino_s: dict[int, float] = {}
        for n_rows in TRIED_ROWS:
            slowest_s = max([0.0, *(spent_s / rows for rows, spent_s in torch_s.items())]) * n_rows
            if torch_s and (n_rows > self._most_rows or slowest_s > _LONGEST_CALL_S):
                break
            changed = _with_rows(args, kwargs, n_rows)
            for n_repeat in range(_REPEATS + 1):
                for times, network in ((torch_s, by_torch), (openvino_s, by_openvino)):
                    spent_s, _ = timed_call(network, *changed)
                    # The first call of a size pays for set-up inside the libraries.
                    times[n_rows] = min(spent_s, times[n_rows]) if n_repeat > 1 else spent_s
                    yield
        trial = Trial(torch_s=torch_s, openvino_s=openvino_s, apart=apart)
        self._cache.keep_trial(denoiser.key, trial, dtype=self._device.dtype_name, n_threads=torch.get_num_threads())
        self._take_over(denoiser, trial, by_openvino)

    def _take_over(self, denoiser: _Denoiser, trial: Trial, by_openvino: OpenVinoDenoiser) -> None:
        self._decide(denoiser, trial)
        if denoiser.choice == "openvino":
            denoiser.components.serve(denoiser.name, lambda: self._opened(denoiser), now=by_openvino)

    def _decide(self, denoiser: _Denoiser, trial: Trial) -> None:
        gain = _gain(trial)
        denoiser.trial = trial
        rows = ", ".join(map(str, trial.torch_s))
        why = f"OpenVINO took {1 / gain:.2f} of torch's time (geometric mean at {rows} rows)"
        self._settle(denoiser, "openvino" if gain >= _MUST_WIN_BY else "torch", why)

    def _settle(self, denoiser: _Denoiser, choice: Choice, why: str) -> None:
        denoiser.choice, denoiser.why, denoiser.is_settled = choice, why, True
        denoiser.trying = denoiser.watched = denoiser.last_call = None
        for handle in denoiser.unwatch:
            handle.remove()
        denoiser.unwatch = []
        facts: dict[str, object] = {
            "checkpoint": str(denoiser.components.folder),
            "executor": choice,
            "why": why,
        }
        if denoiser.trial is not None:
            facts |= {"torch_s": dict(denoiser.trial.torch_s), "openvino_s": dict(denoiser.trial.openvino_s)}
        log.info("executor chosen", extra=facts)

    def _give_up(self, denoiser: _Denoiser, exc: Exception) -> None:
        why = (str(exc).strip().splitlines() or [type(exc).__name__])[-1][:200]
        log.warning(
            "OpenVINO cannot run a denoiser, torch does",
            extra={"checkpoint": str(denoiser.components.folder), "why": why},
        )
        self._cache.remove(denoiser.key)
        self._settle(denoiser, "torch", f"OpenVINO failed: {why}")
        denoiser.components.serve(denoiser.name, None)


def timed_call(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, Tensor]:
    """Seconds of one network call, and its answer."""
    begun_s = time.perf_counter()
    with torch.inference_mode():
        answer: Tensor = network(*args, **kwargs)[0]
    return time.perf_counter() - begun_s, answer


def is_of(checkpoint: str, key: Hashable) -> bool:
    """Whether a batch key is of this checkpoint."""
    return isinstance(key, tuple) and key[0] == checkpoint


def _refuse_where_it_cannot_be(device: Device) -> None:
    if device.kind != "cpu":
        raise InvalidValue("executor", f"OpenVINO draws on a CPU here, not on {device.kind}", hint="use auto or torch")
    if not _is_installed():
        raise InvalidValue("executor", "OpenVINO is not installed", hint="pip install 'sdfleet[openvino]'")


def _can_be(device: Device) -> bool:
    return device.kind == "cpu" and device.dtype in _MOST_APART and _is_installed()


def _is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _with_rows(args: tuple[Any, ...], kwargs: dict[str, Any], n_rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its rows repeated, or left out, until there are n."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value[torch.arange(n_rows) % len(value)].contiguous()
        return {name: changed(part) for name, part in value.items()} if isinstance(value, dict) else value

    return tuple(changed(value) for value in args), changed(kwargs)


def _half_as_high(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call for a picture of half the height, told twice as many tokens."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4:
            return value[:, :, : max(4, value.shape[2] // 4 * 2)].contiguous()
        return torch.cat([value, value], dim=1) if isinstance(value, Tensor) and value.dim() == 3 else value

    return tuple(changed(value) for value in args), {name: changed(value) for name, value in kwargs.items()}


def _gain(trial: Trial) -> float:
    gains = [trial.torch_s[rows] / max(trial.openvino_s[rows], 1e-9) for rows in trial.torch_s]
    return math.exp(sum(math.log(gain) for gain in gains) / len(gains))


def _apart(answer: Tensor, expected: Tensor) -> float:
    distance = (answer.float() - expected.float()).pow(2).mean().sqrt()
    return float(distance / expected.float().pow(2).mean().sqrt().clamp_min(1e-12))


def _ms(seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(rows): round(spent_s * 1000, 1) for rows, spent_s in seconds.items()}
