"""Engines of other projects, from the parent's side: their virtual environments, and the backends over them.

venv.py         makes, checks and removes a virtual environment, from the pins in *.toml
backend.py      the backend over one of them
ways.py         what the choice between backends is told of them
"""
