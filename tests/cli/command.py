"""The console script, on the bundled model."""

from __future__ import annotations

from pathlib import Path

import torch

from ultraedit_kernels import Editor, cli

MODEL = Path(__file__).parents[2] / "bench" / "tiny-facts"
TURN_SIZE = 8
"""Of the 20 edits, so that there are three turns."""


def load(path: Path):
    """Model and tokenizer."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model, transformers.AutoTokenizer.from_pretrained(path)


def run(*arguments: object) -> int:
    """The exit status of `ultraedit` with these arguments."""
    return cli.main([str(argument) for argument in arguments])


def same_weights(editor: Editor, model: torch.nn.Module, within: float = 0) -> bool:
    """Whether the edited weights of both differ by no more than `within`."""
    return all(
        torch.allclose(weight, model.get_parameter(f"{name}.weight"), rtol=0, atol=within)
        for name, weight in editor.weights.items()
    )
