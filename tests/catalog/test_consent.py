"""Who may say yes to a download."""

from __future__ import annotations

import ast
from pathlib import Path

SRC = Path(__file__).parents[2] / "src/sdfleet"
# The question of the command line (and its setting), the API's call that confirms a plan (and its setting), and a node
# that hears from its router that such a call was made for it.
MAY_SAY_YES = {"cli/pulling.py", "api/pulling.py", "fleet/stock.py"}


def test_only_the_command_line_the_api_and_a_node_that_was_told_make_a_consent() -> None:
    makers = {
        path.relative_to(SRC).as_posix()
        for path in SRC.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"Consent", "from_prompt"}
    }
    assert makers == MAY_SAY_YES
