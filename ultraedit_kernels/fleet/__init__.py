"""Servers as a program sees them: a client of one, and changes that go to many."""

from importlib.util import find_spec

for _name in ("httpx", "pydantic"):
    if find_spec(_name) is None:
        raise ImportError(
            f"{_name} is not installed; pip install 'ultraedit-kernels[client]'", name=_name
        )
