"""The rules of the house that no linter knows: where things may stand, and what may be loaded when."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "sdfleet"
SOURCES = sorted(SRC.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

HARD_LIMIT_LINES = 800
FORBIDDEN_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "schemas", "services", "managers", "manager"}

# Where a handler may catch everything: it keeps the cause once and answers someone. File -> most such handlers.
BROAD_HANDLERS = {
    "api/limits.py": 1,  # the caller gets an answer in its dialect and the log has the cause
    "cli/console.py": 1,  # the last word to the person at the terminal
    "doctor/examining.py": 1,  # one check falls over and says so, the others are told
    "engine/child.py": 1,  # the parent hears why the process ends
    "engine/engine.py": 2,  # one picture fails, its neighbours go on: a call for several, an action for one
    "fleet/node.py": 1,  # one job fails with its cause, and the router hears it
    "fleet/transport.py": 1,  # one message fails, the others go on
    "jobs/drawer.py": 1,  # one job fails, the others go on
    "jobs/webhooks.py": 1,  # one delivery is given up, the others go on
}

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft"}
SLOW_TO_START = HEAVY | {"numpy", "PIL", "fastapi", "sqlalchemy", "huggingface_hub"}


def test_an_upper_room_never_is_imported_by_a_lower_one() -> None:
    """The contracts stand in pyproject.toml; a room that is in no layer fails here too."""
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True))",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without `__init__.py` is invisible to import-linter, and so to the layers."""
    folders = {path.parent for path in SOURCES}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_every_room_but_engine_and_train_is_forbidden_to_import_torch() -> None:
    rooms = {f"sdfleet.{path.stem}" for path in SRC.glob("*.py") if path.stem != "__init__"}
    rooms |= {f"sdfleet.{path.parent.name}" for path in SRC.glob("*/__init__.py")}
    contracts = _pyproject()["tool"]["importlinter"]["contracts"]
    listed = next(set(c["source_modules"]) for c in contracts if c["id"] == "torch-stays-below")
    assert rooms - {"sdfleet.engine", "sdfleet.train"} == listed


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_the_hard_limit(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= HARD_LIMIT_LINES, f"{n_lines} lines: find the second noun in it and give it its own file"


def test_no_file_or_folder_has_a_name_that_says_nothing() -> None:
    named = {path for path in SRC.rglob("*") if path.suffix in {".py", ""} and path.stem in FORBIDDEN_NAMES}
    assert [str(path.relative_to(ROOT)) for path in sorted(named)] == []


def test_everything_is_caught_only_where_someone_is_answered() -> None:
    found: dict[str, int] = {}
    for path in SOURCES:
        n_broad = sum(_catches_everything(node) for node in ast.walk(_tree(path)))
        if n_broad:
            found[path.relative_to(SRC).as_posix()] = n_broad
    too_many = {name: n for name, n in found.items() if n > BROAD_HANDLERS.get(name, 0)}
    assert too_many == {}, "name the errors you expect; the allowed places are listed in this file"


def test_the_fleet_reads_neither_pickles_nor_code() -> None:
    """What a node or a router is sent by the other is data, whoever sends it."""
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "torch", "joblib", "code", "importlib", "runpy"}
    calls = {"eval", "exec", "compile", "__import__"}
    found = []
    for path in [*(SRC / "fleet").rglob("*.py"), SRC / "plain.py"]:
        for node in ast.walk(_tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in calls or modules & {name.split(".")[0] for name in names}:
                found.append(f"{path.relative_to(SRC)}:{getattr(node, 'lineno', 0)}")
    assert found == []


def test_only_settings_reads_the_environment() -> None:
    readers = {
        path.relative_to(SRC).as_posix()
        for path in SOURCES
        for node in ast.walk(_tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"})
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in a.name for a in node.names))
    }
    assert readers <= {"settings.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SRC)))
def test_importing_a_file_only_defines_things(path: Path) -> None:
    """A bare call, a loop or a `with` at the top level is work that runs on import."""
    defining = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    naming = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.If
    for node in _tree(path).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        # Typer's way to say which commands there are.
        is_command = isinstance(node, ast.Expr) and ast.unparse(node).startswith(("app.command(", "app.add_typer("))
        fits = is_docstring or is_command or isinstance(node, defining | naming)
        assert fits, f"line {node.lineno} works on import"


@pytest.mark.parametrize("module", ["sdfleet.cli.main", "sdfleet.runtime", "sdfleet.backends.local"])
def test_the_parent_process_never_loads_torch(module: str, tmp_path: Path) -> None:
    loaded = _loaded_modules(f"import {module}", cwd=tmp_path)
    assert module in loaded
    assert loaded & HEAVY == set()


def test_a_picture_of_the_built_in_model_needs_none_of_the_slow_libraries(tmp_path: Path) -> None:
    """They are two thirds of what diffusers' own first picture takes; our networks do without them."""
    fields = {
        "job_id": "job", "family": "sd", "prompt": "a red circle", "negative_prompt": "", "width_px": 128,
        "height_px": 128, "steps": 2, "guidance": 3.0, "seed": 1, "n_images": 1, "sampler": "dpm++_2m karras",
    }  # fmt: skip
    lines = [
        "from sdfleet import starter",
        "from sdfleet.domain import Drawing",
        "from sdfleet.engine.child import main",
        "from sdfleet.engine.engine import Engine",
        "from sdfleet.engine.events import EngineOptions, PictureDone",
        "engine = Engine(EngineOptions(device='cpu', n_threads=1))",
        f"engine.submit(Drawing(checkpoint=str(starter.weights_path()), **{fields}))",
        "told = []",
        "while not engine.is_idle: told += engine.step()",
        "assert any(isinstance(event, PictureDone) for event in told), told",
    ]
    loaded = _loaded_modules("\n    ".join(lines), cwd=tmp_path)
    compilers = {"scipy", "sympy", "torch._dynamo", "torch._inductor"}
    assert "torch" in loaded
    assert loaded & (HEAVY - {"torch"} | compilers | {"pydantic", "sqlalchemy"}) == set()


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(flag: str, tmp_path: Path) -> None:
    run = f"import runpy; sys.argv = ['sdfleet', {flag!r}]; runpy.run_module('sdfleet', run_name='__main__')"
    loaded = _loaded_modules(run, cwd=tmp_path)
    assert "sdfleet.cli.main" in loaded
    assert loaded & SLOW_TO_START == set()


def test_one_picture_at_the_command_line_loads_no_part_of_a_server(tmp_path: Path) -> None:
    loaded = _loaded_modules("import sdfleet.cli.generate, sdfleet.compose, sdfleet.storage.outputs", cwd=tmp_path)
    assert "sdfleet.runtime" in loaded
    assert loaded & {"sqlalchemy", "fastapi", "httpx", "prometheus_client", "huggingface_hub"} == set()


def test_a_server_of_one_machine_loads_nothing_of_a_fleet(tmp_path: Path) -> None:
    loaded = _loaded_modules("import sdfleet.api.app, sdfleet.cli.main, sdfleet.cli.serve", cwd=tmp_path)
    assert "sdfleet.compose.house" in loaded
    assert {name for name in loaded if name.startswith("sdfleet.fleet")} == set()
    assert loaded & {"nats", "nkeys", "zeroconf", "ifaddr", "cryptography"} == set()


def test_importing_the_rooms_leaves_no_trace(tmp_path: Path) -> None:
    rooms = ["domain", "errors", "settings", "observe", "catalog", "storage", "backends", "runtime", "cli.main"]
    run = "; ".join(f"import sdfleet.{room}" for room in rooms)
    run += "; import logging; assert not logging.getLogger().handlers; import threading"
    run += "; assert threading.active_count() == 1"
    _loaded_modules(run, cwd=tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    project = _pyproject()["project"]
    wanted = sum(project["optional-dependencies"].values(), start=project["dependencies"])
    pinned = {_normal(line) for line in pins}
    assert [name for name in wanted if _normal(name) not in pinned] == []
    assert [name for name in pinned if name.startswith("nvidia")] == []


def test_texts_name_no_developer_folder_and_no_package_registry() -> None:
    folders = r"(?<![\w./:~-])/(?:home/[a-z]+|Users/[A-Za-z]+|root|work|opt)/"
    hosts = r"\b(?:pypi|pythonhosted|npmjs|crates|download\.pytorch)\.(?:org|com|io)\b"
    unwanted = re.compile(f"{folders}|{hosts}")
    found = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()[:100]}"
        for path in _texts()
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if unwanted.search(line)
    ]
    assert found == []


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _normal(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return name.group().lower().replace("_", "-").replace(".", "-")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _catches_everything(node: ast.AST) -> bool:
    broad = {"Exception", "BaseException"}
    if isinstance(node, ast.ExceptHandler):
        last = node.body[-1]
        if isinstance(last, ast.Raise) and last.exc is None:
            return False  # it tidies up and lets everything through
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        return any(kind is None or (isinstance(kind, ast.Name) and kind.id in broad) for kind in kinds)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        return any(isinstance(kind, ast.Name) and kind.id in broad for kind in node.args)
    return False


def _loaded_modules(code: str, *, cwd: Path) -> set[str]:
    """Names in sys.modules, and their first parts, after `code` ran in a fresh interpreter."""
    script = f"import json, sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    script += "sys.stdout.flush(); print(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = set(json.loads(done.stdout.splitlines()[-1]))
    return names | {name.split(".")[0] for name in names}


def _texts() -> Iterator[Path]:
    """Every text file of the project that could be committed."""
    places = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", ".ci")]
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".cfg", ".ini", ".sh", ".css", ".js", ".html", ""}
    not_ours = {"__pycache__", ".git"}  # the second is a file in a worktree
    for path in [*ROOT.glob("*"), *(path for place in places for path in place.rglob("*"))]:
        if path.is_file() and path.suffix in kinds and not_ours.isdisjoint(path.relative_to(ROOT).parts):
            yield path
