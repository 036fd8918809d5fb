"""What only the engine's process can know is refused like everything else: one line, exit code 2, no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


# Slow for the engine's process, which imports torch and diffusers.
@pytest.mark.slow
def test_a_format_that_the_device_cannot_compute_is_one_line(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--dtype", "float16", "-o", "x.png"]
    done = subprocess.run(
        [sys.executable, "-m", "sdfleet", "generate", "a cat", *options],
        cwd=tmp_path,
        env={**os.environ, "SD_HOME": str(tmp_path)},  # noqa: TID251 - tests set the stage
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: dtype: float16 arithmetic on a CPU is emulated, hundreds of times slower; use bfloat16 or float32\n"
    )
    assert not list(tmp_path.glob("*.png"))
