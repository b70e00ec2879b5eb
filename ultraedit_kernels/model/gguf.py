"""Models in a GGUF file, unpacked: whatever was packed becomes plain weights that can be edited."""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def is_gguf(name: str | Path) -> bool:
    """Whether this is an existing file by the name of a GGUF file."""
    path = Path(name).expanduser()
    return path.suffix.lower() == ".gguf" and path.is_file()


def load_gguf(file: str | Path, dtype: str | torch.dtype = "auto") -> tuple[Any, Any]:
    """A Hugging Face model and its tokenizer from a GGUF file.

    Args:
        file: one whole GGUF file.
        dtype: of the weights; "auto" is bfloat16.

    Raises:
        ValueError: the package gguf is missing, or transformers cannot unpack the file.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    path = Path(file).expanduser()
    tokenizer = load_gguf_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=torch.bfloat16 if dtype == "auto" else dtype,
            # Otherwise the weights stay packed, and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
    except Exception as error:  # transformers raises whatever it stumbles over
        raise ValueError(_cannot(path, error)) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def load_gguf_tokenizer(file: str | Path) -> Any:
    """The tokenizer in a GGUF file, which begins texts as the file says.

    Raises:
        ValueError: as `load_gguf`.
    """
    if find_spec("gguf") is None:
        raise ValueError(
            f"{file} is a GGUF file, and the package gguf, which reads it, is not installed; "
            "pip install 'ultraedit-kernels[gguf]'"
        )
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    path = Path(file).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        fields = GGUFReader(path).fields
    except Exception as error:
        raise ValueError(_cannot(path, error)) from error
    given, kind = (fields.get(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "model"))
    # Where the file does not say it, llama.cpp goes by the kind of tokenizer.
    begins = given.contents() if given is not None else kind and kind.contents() == "llama"
    return _with_beginning(tokenizer) if begins else tokenizer


def unpack(file: str | Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary checkpoint in bfloat16, all of it or nothing.

    Raises:
        ValueError: as `load_gguf`.
        OSError: it cannot be written.
    """
    model, tokenizer = load_gguf(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
        made = Path(scratch) / folder.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)


def unpacked(file: str | Path) -> Path:
    """The checkpoint that `unpack` makes of a file, kept in `cache_folder` until the file changes.

    Raises:
        ValueError, OSError: as `unpack`.
    """
    path = Path(file).expanduser().resolve()
    state = path.stat()
    key = hashlib.sha256(f"{path} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / f"{path.stem}-{key[:16]}"
    if not folder.exists():
        unpack(path, folder)
    return folder


def cache_folder() -> Path:
    """Where unpacked models are kept: ultraedit in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultraedit"


def _with_beginning(tokenizer: Any) -> Any:
    """A tokenizer that puts its beginning of sequence before every text, once."""
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bos = tokenizer.bos_token
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    # A family's own class would put its own processor back when it is loaded again.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def _cannot(path: Path, error: Exception) -> str:
    return (
        f"cannot unpack {path}: {error}; expected one whole GGUF file of a family that "
        "transformers unpacks"
    )
