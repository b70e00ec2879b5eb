"""What an operator sets for the /v1/edits routes: keys and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

KEYS_VARIABLE = "ULTRAEDIT_API_KEY"
"""Environment variable with the edit keys, separated by commas: vLLM logs its options."""


def edit_keys(environ: Mapping[str, str]) -> list[str]:
    """The edit keys of the environment."""
    return [key for part in environ.get(KEYS_VARIABLE, "").split(",") if (key := part.strip())]


def require_key(keys: Sequence[str], without_key: bool) -> None:
    """Raise ValueError where everybody could edit and nobody has agreed to that."""
    if not keys and not without_key:
        raise ValueError(
            "/v1/edits has no key: everybody who reaches the port could change the model; give "
            f"--edit-api-key or --api-key (or set {KEYS_VARIABLE} or VLLM_API_KEY), or agree to it "
            "with --edit-without-key (setting without_key)"
        )


@dataclass(frozen=True)
class RouteSettings:
    """Settings of the routes; the editor's are elsewhere.

    Attributes:
        without_key: serve although no key is asked for.
        audit_prompts: whether audit lines hold prompts and targets.
        max_body_mib: size of a JSON body, MiB.
        max_delta_mib: size of a delta file, MiB.
        max_edits: edits of one request.
        max_prompts: prompts of one edit: its own, rephrases and locality prompts together.
    """

    without_key: bool = False
    audit_prompts: bool = True
    max_body_mib: int = 8
    max_delta_mib: int = 1024
    max_edits: int = 256
    max_prompts: int = 64

    @classmethod
    def take(cls, settings: dict[str, Any]) -> RouteSettings:
        """Ours out of all `settings`, which lose them. Raises ValueError for a bad one."""
        given = {f.name: settings.pop(f.name) for f in fields(cls) if f.name in settings}
        for name, value in given.items():
            flag = isinstance(getattr(cls, name), bool)
            if flag != isinstance(value, bool) or not isinstance(value, int) or value < (not flag):
                expected = "true or false" if flag else "a whole number from 1"
                raise ValueError(f"setting {name} is {value!r}, expected {expected}")
        return cls(**given)
