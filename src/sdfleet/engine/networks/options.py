"""A component's config.json, read strictly: what a network here does not know, it must not be built from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def understood(
    config: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]],
    idle: Collection[str] = (),
) -> dict[str, Any] | None:
    """The config's values over `defaults`; None when it asks for something that is in none of the tables.

    fixed: options that a network knows only with these values, and so need not look at. A list that repeats one value
    is that value. idle: options that change no answer, whatever they say. Names with an underscore in front are notes
    of whoever saved the file.

    >>> understood({"width": 8, "_class_name": "A"}, defaults={"width": 4, "depth": 1}, fixed={})
    {'width': 8, 'depth': 1}
    >>> understood({"tilt": [0, 0], "dropout": 0.5}, defaults={}, fixed={"tilt": [0]}, idle=["dropout"])
    {}
    >>> understood({"tilt": [0, 1]}, defaults={}, fixed={"tilt": [0]}) is None
    True
    >>> understood({"colour": "red"}, defaults={}, fixed={"tilt": [0]}) is None
    True
    """
    read = dict(defaults)
    for name, value in config.items():
        if name.startswith("_") or name in idle:
            continue
        if name in fixed:
            if _single(value) not in fixed[name]:
                return None
        elif name not in defaults or (value is None and defaults[name] is not None):
            return None
        else:
            read[name] = value
    return read


def per_block(value: Any, n_blocks: int) -> tuple[int, ...] | None:
    """One whole number for each block, from one for all or a list; None where that is not what it is.

    >>> per_block(8, 3), per_block([5, 10], 2), per_block([5, [1, 2]], 2)
    ((8, 8, 8), (5, 10), None)
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * n_blocks
    is_plain = len(values) == n_blocks and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    return values if is_plain else None


def _single(value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
        return value[0]
    return value
