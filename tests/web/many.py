"""A gallery of very many pictures, made in a moment: rows as the store writes them, and links to one file."""

from __future__ import annotations

import os
from dataclasses import replace

from sqlalchemy import insert

from sdfleet.domain import LOCAL_OWNER, OutputId
from sdfleet.storage import job_rows
from sdfleet.storage.tables import outputs
from tests.api.serving import Running


def multiply(here: Running, *, n: int) -> None:
    """Put `n - 1` newer pictures before the only one of a server; place i from the top has the prompt "picture <i>"."""
    (output,), _ = here.call(here.house.store.outputs())
    source = here.house.files.path(output)
    copies = [
        replace(output, id=OutputId(f"copy{i:06d}-0"), prompt=f"picture {i}", created_s=output.created_s + n - i)
        for i in reversed(range(n - 1))
    ]
    for copy in copies:
        path = here.house.files.path(copy)
        path.parent.mkdir(exist_ok=True)  # of the day after, perhaps
        os.link(source, path)
    rows = [job_rows.output_row(copy, owner=LOCAL_OWNER) for copy in copies]
    here.call(here.house.store._database.write(lambda connection: connection.execute(insert(outputs), rows).rowcount))
