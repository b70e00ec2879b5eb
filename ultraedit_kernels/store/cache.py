"""What was gathered about a model, kept for its next start: files named by a digest of what they
depend on.

The directory is `ULTRAEDIT_CACHE`, else `ultraedit` in `XDG_CACHE_HOME`, else `~/.cache/ultraedit`;
an empty `ULTRAEDIT_CACHE` keeps nothing. Files may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ultraedit_kernels.model.gguf import cache_folder
from ultraedit_kernels.store import files

logger = logging.getLogger(__name__)


def directory() -> Path | None:
    """Where the files are; None if none are to be kept."""
    given = os.environ.get("ULTRAEDIT_CACHE")
    if given is not None:
        return Path(given) if given else None
    return cache_folder()


def load(
    depends_on: Mapping[str, Any], model: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata that were kept; None if there are none that can be read.

    Args:
        depends_on: JSON-able, all that they depend on besides the model.
        model: module → digest of its untouched weight.
    """
    path = _path(depends_on, model)
    if path is None or not path.is_file():
        return None
    try:
        with files.reading(path, model) as (tensors, metadata):
            return tensors, metadata
    except (OSError, ValueError) as error:
        logger.warning("%s; what it held is gathered anew", error)
        path.unlink(missing_ok=True)
        return None


def save(
    depends_on: Mapping[str, Any],
    model: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Keep tensors and metadata, see `load`; a warning if that is impossible."""
    path = _path(depends_on, model)
    if path is None or path.exists():
        return
    own = path.with_suffix(f".{os.getpid()}")  # another process may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(own, tensors, metadata, model)
        os.replace(own, path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the next start gathers it anew", path, error)


def _path(depends_on: Mapping[str, Any], model: Mapping[str, str]) -> Path | None:
    where = directory()
    if where is None:
        return None
    text = json.dumps([dict(depends_on), dict(model)], sort_keys=True)
    return where / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
