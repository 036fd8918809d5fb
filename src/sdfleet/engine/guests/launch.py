"""The first file that runs in a guest's virtual environment: `venv/bin/python -I launch.py --engine module:attribute`.

sdfleet is not installed there, and its folder's parent must not be on the path: that is our own site-packages, whose
huggingface_hub and numpy a guest would take for its own. So the one package is put where imports look first. `-I` keeps
the user's PYTHONPATH, and the folder of this file, out as well.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    _folder = Path(__file__).resolve().parents[2]
    _spec = importlib.util.spec_from_file_location(
        "sdfleet", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    if _spec is None or _spec.loader is None:
        sys.exit(f"{_folder} is no package")
    _package = importlib.util.module_from_spec(_spec)
    sys.modules["sdfleet"] = _package
    _spec.loader.exec_module(_package)

    from sdfleet.engine.child import main

    sys.exit(main())
