"""What runs a denoiser's forward: torch, or OpenVINO where it was measured to be faster on this machine.

    1. a checkpoint's first pictures are drawn by torch
    2. when the engine is idle, another process converts the denoiser (openvino_cache.py); nobody waits for it
    3. idle again, both are timed on the last real call, one call a turn, and their answers compared
    4. the faster one stays, the other leaves the memory; the times are kept beside the conversion, and after the next
       start OpenVINO takes over in the first pause without a trial

Asked for int8, the trial has a third candidate: the converted model in 8 bits, with ranges from calls noted before. It
changes pictures, so it must also stay near torch's answers, and every job is told whether it was used, and why not.

The choice is one per checkpoint, not per number of rows: keeping two copies of the weights for the last few per cent is
not worth their memory. It changes only when nothing is being drawn, so all pictures of a job come from one executor.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
import weakref
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping
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
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser, inputs_of
from sdfleet.engine.openvino_int8 import MODEL_FILE as INT8_FILE
from sdfleet.engine.openvino_int8 import ranges, save_rounded
from sdfleet.errors import InvalidValue

log = logging.getLogger(__name__)

# Rows that are tried: a picture with guidance, and batches of four, eight and sixteen of them.
TRIED_ROWS = (2, 8, 16, 32)
# In each of two rounds.
_REPEATS = 4
_ROUNDS = 2
# More rows are not tried where one call would take longer: a job that comes in between waits for one call.
_LONGEST_CALL_S = 3.0
# OpenVINO must win by this on the geometric mean of the rows tried. Below that the noise of a busy machine decides.
_MUST_WIN_BY = 1.05
# Largest distance of the answers, rms over rms. Measured on the built-in model and the toys of three families, at seven
# shapes each: float32 below 2e-6; bfloat16 up to 0.026, where torch's own distance from float32 is up to 0.032.
_MOST_APART = {torch.float32: 1e-4, torch.bfloat16: 0.04}
# 8 bits: the built-in model's pictures were 42 dB from the full ones when its worst call was 0.06 off (docs/modes.md).
_INT8_MOST_APART = 0.1
# Calls kept to learn the ranges from and to compare with: when there are more, every second one goes.
_MOST_NOTED = 24
_MOST_NOTED_ROWS = 8
# The converting process held 2.3 times the float32 weights for SD 1.5.
_CONVERTING_TAKES = 3

Choice = Literal["torch", "openvino", "int8"]
NotedCall = tuple[tuple[Any, ...], dict[str, Any]]


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
    last_call: NotedCall | None = None
    noted: list[NotedCall] = field(default_factory=list)
    note_every: int = 1
    n_calls: int = 0
    unwatch: list[Any] = field(default_factory=list)


class Executors:
    """Chooses for every checkpoint of one engine. Raises InvalidValue where OpenVINO is asked for and cannot be."""

    def __init__(self, device: Device, options: EngineOptions) -> None:
        self._device = device
        self._is_forced = options.executor == "openvino"
        self._wants_int8 = options.executor == "int8"
        self._most_rows = options.max_rows or TRIED_ROWS[-1]
        if self._is_forced or self._wants_int8:
            _refuse_where_it_cannot_be(device)
        # Without a folder a conversion would be lost with the process that made it: then only when it is asked for.
        wanted = (
            self._is_forced or self._wants_int8 or (options.executor == "auto" and options.cache_folder is not None)
        )
        # OpenVINO would keep the weights in a format of its own.
        self._is_on = wanted and _can_be(device) and device.weights is None
        self._cache = ModelCache(Path(options.cache_folder) if options.cache_folder is not None else None)
        self._known: dict[str, _Denoiser] = {}

    def adopt(self, components: Components, name: ComponentName) -> None:
        """A checkpoint was opened and nothing of it is loaded yet: what is known decides what will be."""
        # What is packed was made small on purpose; a conversion would unpack it.
        is_on = self._is_on and not components.is_packed(name)
        call = call_of(components.class_name(name), components.config(name)) if is_on else None
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
                if trial is not None and self._wants_int8 and trial.int8_apart is None:
                    trial = None
                if trial is not None and self._chosen(trial) != "openvino":
                    # 8 bits are what was asked for: used from the first picture on, whatever compiling takes.
                    self._decide(denoiser, trial)
                elif trial is not None:
                    # Compiling takes a second, which is more than it saves a first picture: taken in the first pause.
                    denoiser.trial = trial
        if denoiser.choice != "torch":
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
            if self._wants_int8:
                _keep(denoiser, denoiser.last_call)

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
        return checkpoint if denoiser.is_settled and denoiser.choice != "torch" else None

    def is_settled(self, checkpoint: str) -> bool:
        """Whether what runs a checkpoint's denoiser is going to stay."""
        denoiser = self._known.get(checkpoint)
        return denoiser is None or denoiser.is_settled

    def told(self, checkpoint: str) -> tuple[str | None, tuple[str, ...]]:
        """The format the denoiser computes in where it is not the device's own, and what a job should be warned of."""
        denoiser = self._known.get(checkpoint)
        if not self._wants_int8:
            return None, ()
        if denoiser is None:
            return None, ("int8 is not used: only Stable Diffusion's UNets and SD3's transformer can be converted",)
        if denoiser.choice == "int8":
            return "int8", ("drawn in int8: the picture differs from that of the full format",)
        return None, (f"int8 is not used: {denoiser.why}",)

    def let_go(self, checkpoint: str) -> None:
        """The checkpoint leaves the memory: a trial will begin anew; what is decided or converting stays."""
        denoiser = self._known.get(checkpoint)
        if denoiser is not None:
            denoiser.trying = denoiser.watched = denoiser.last_call = None
            denoiser.noted, denoiser.n_calls, denoiser.note_every = [], 0, 1

    def forget(self, checkpoint: str) -> None:
        """Know nothing of a checkpoint any more."""
        denoiser = self._known.pop(checkpoint, None)
        if denoiser is not None and denoiser.conversion is not None:
            denoiser.conversion.cancel()

    def facts(self) -> dict[str, object]:
        """By checkpoint: the executor, why it, and what was measured, as JSON values."""
        told: dict[str, object] = {}
        for checkpoint, denoiser in self._known.items():
            facts: dict[str, object] = {
                "executor": denoiser.choice,
                "why": denoiser.why,
                "is_settled": denoiser.is_settled,
            }
            if denoiser.trial is not None:
                facts["torch_ms_by_rows"] = _ms(denoiser.trial.torch_s)
                facts["openvino_ms_by_rows"] = _ms(denoiser.trial.openvino_s)
                facts["answers_apart"] = float(f"{denoiser.trial.apart:.2g}")
                if denoiser.trial.int8_apart is not None:
                    facts["int8_ms_by_rows"] = _ms(denoiser.trial.int8_s)
                    facts["int8_answers_apart"] = float(f"{denoiser.trial.int8_apart:.2g}")
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
            return self._compiled(denoiser, self._file_of(denoiser.choice, model_file))
        except (ConversionFailed, RuntimeError, OSError) as exc:
            self._give_up(denoiser, exc)
            return denoiser.components.load(denoiser.name)

    def _compiled(self, denoiser: _Denoiser, model_file: Path) -> OpenVinoDenoiser:
        size = denoiser.components.weights(text_encoders=()).denoiser
        if model_file.name == INT8_FILE:
            size //= self._device.dtype.itemsize
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
            self._take_over(denoiser, denoiser.trial, {"openvino": by_openvino})
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
        by_int8, int8_apart = None, None
        if self._wants_int8:
            by_int8, int8_apart = yield from self._in_8_bits(denoiser, model_file, by_torch)
        torch_s: dict[int, float] = {}
        openvino_s: dict[int, float] = {}
        int8_s: dict[int, float] = {}
        candidates = [(torch_s, by_torch), (openvino_s, by_openvino)]
        candidates += [] if by_int8 is None else [(int8_s, by_int8)]
        for n_rows in TRIED_ROWS:
            slowest_s = max([0.0, *(spent_s / rows for rows, spent_s in torch_s.items())]) * n_rows
            if torch_s and (n_rows > self._most_rows or slowest_s > _LONGEST_CALL_S):
                break
            changed = _with_rows(args, kwargs, n_rows)
            for n_round in range(_ROUNDS):
                for times, network in candidates:
                    for n_repeat in range(_REPEATS):
                        spent_s, _ = timed_call(network, *changed)
                        # The first call of a size pays for set-up inside the libraries, and so may the second; and the
                        # first after another library's call shares its core with threads that wait for more of those.
                        # By turns, torch's 16 rows took 60 ms, which take 28 in a row (2026-11-21).
                        if n_repeat > 1 or n_round:
                            times[n_rows] = min(spent_s, times.get(n_rows, spent_s))
                        yield
        trial = Trial(torch_s=torch_s, openvino_s=openvino_s, apart=apart, int8_s=int8_s, int8_apart=int8_apart)
        self._cache.keep_trial(denoiser.key, trial, dtype=self._device.dtype_name, n_threads=torch.get_num_threads())
        self._take_over(denoiser, trial, {"openvino": by_openvino, "int8": by_int8})

    def _in_8_bits(
        self, denoiser: _Denoiser, model_file: Path, by_torch: Any
    ) -> Generator[None, None, tuple[OpenVinoDenoiser | None, float]]:
        """The denoiser in 8 bits, None where it is too far from torch, and how far; a network call at a time."""
        import openvino

        learnt, compared = denoiser.noted[::2], denoiser.noted[1::2] or denoiser.noted
        model = openvino.Core().read_model(model_file)
        found = None
        calls = [inputs_of(denoiser.call, *args, **kwargs) for args, kwargs in learnt]
        for known in ranges(model, calls, n_threads=torch.get_num_threads()):
            found = known
            yield
        assert found is not None
        int8_file = self._file_of("int8", model_file)
        save_rounded(model, found, int8_file)
        yield
        by_int8 = self._compiled(denoiser, int8_file)
        yield
        apart = 0.0
        for args, kwargs in compared:
            _, expected = timed_call(by_torch, args, kwargs)
            _, answer = timed_call(by_int8, args, kwargs)
            apart = max(apart, _apart(answer, expected))
            yield
        return (by_int8 if apart <= _INT8_MOST_APART else None), apart

    @staticmethod
    def _file_of(choice: Choice, model_file: Path) -> Path:
        return model_file.with_name(INT8_FILE) if choice == "int8" else model_file

    def _take_over(self, denoiser: _Denoiser, trial: Trial, by: Mapping[str, OpenVinoDenoiser | None]) -> None:
        self._decide(denoiser, trial)
        if denoiser.choice != "torch":
            now = by.get(denoiser.choice)
            denoiser.components.serve(denoiser.name, lambda: self._opened(denoiser), now=now)

    def _chosen(self, trial: Trial) -> Choice:
        if self._wants_int8 and trial.int8_s and _int8_gain(trial) >= _MUST_WIN_BY:
            return "int8"
        return "openvino" if _gain(trial) >= _MUST_WIN_BY else "torch"

    def _decide(self, denoiser: _Denoiser, trial: Trial) -> None:
        denoiser.trial = trial
        rows = ", ".join(map(str, trial.torch_s))
        why = f"OpenVINO took {1 / _gain(trial):.2f} of torch's time (geometric mean at {rows} rows)"
        if self._wants_int8 and trial.int8_s:
            why = f"it took {1 / _int8_gain(trial):.2f} of the faster other executor's time (at {rows} rows)"
        elif self._wants_int8:
            why = f"its answers are {trial.int8_apart:.2g} away from torch's, at most {_INT8_MOST_APART} is allowed"
        self._settle(denoiser, self._chosen(trial), why)

    def _settle(self, denoiser: _Denoiser, choice: Choice, why: str) -> None:
        denoiser.choice, denoiser.why, denoiser.is_settled = choice, why, True
        denoiser.trying = denoiser.watched = denoiser.last_call = None
        denoiser.noted = []
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
            facts |= {"int8_s": dict(denoiser.trial.int8_s)} if denoiser.trial.int8_s else {}
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
    if device.weights is not None:
        raise InvalidValue(
            "weights", "OpenVINO keeps weights in its own format", hint=f"use executor torch with {device.weights}"
        )
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


def _keep(denoiser: _Denoiser, call: NotedCall) -> None:
    """Note every n-th call, so that all noise levels of the last pictures are among a few of them."""
    denoiser.n_calls += 1
    if denoiser.n_calls % denoiser.note_every:
        return
    n_rows = min(
        _MOST_NOTED_ROWS, max(len(value) for value in (*call[0], *call[1].values()) if isinstance(value, Tensor))
    )
    denoiser.noted.append(_with_rows(*call, n_rows))
    if len(denoiser.noted) > _MOST_NOTED:
        denoiser.noted = denoiser.noted[::2]
        denoiser.note_every *= 2


def _gain(trial: Trial) -> float:
    return _geometric_mean([trial.torch_s[rows] / max(trial.openvino_s[rows], 1e-9) for rows in trial.torch_s])


def _int8_gain(trial: Trial) -> float:
    """How much faster than the faster of the other two."""
    others = {rows: min(trial.torch_s[rows], trial.openvino_s[rows]) for rows in trial.int8_s}
    return _geometric_mean([others[rows] / max(trial.int8_s[rows], 1e-9) for rows in others])


def _geometric_mean(gains: list[float]) -> float:
    return math.exp(sum(math.log(gain) for gain in gains) / len(gains))


def _apart(answer: Tensor, expected: Tensor) -> float:
    distance = (answer.float() - expected.float()).pow(2).mean().sqrt()
    return float(distance / expected.float().pow(2).mean().sqrt().clamp_min(1e-12))


def _ms(seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(rows): round(spent_s * 1000, 1) for rows, spent_s in seconds.items()}
