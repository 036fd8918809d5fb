"""`python -m sdfleet` does what `sdfleet` does."""

from __future__ import annotations

from sdfleet.cli.main import main

if __name__ == "__main__":
    main()
