"""How a turn is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """How a turn is computed. `presets.PAPER` holds the published values."""

    lr: float | Literal["auto"] = "auto"
    """Step size, or "auto": per edit, what removes a share of its loss to first order."""
    step: float = 0.4
    """That share. Small steps disturb less and take more rounds."""
    rounds: int = 24
    """Most steps per turn; the loop ends as soon as every edit holds. With one step nothing is
    checked, and every edit takes it, as published."""
    ridge: float = 1.0
    """λ of the ridge regression."""
    margin: float = 4.2
    """Logits by which every target token must lead its runner-up for an edit to hold. A serving
    engine rounds differently than the side pass, and a wider lead carries over to other phrasings;
    an edit that brings k rephrases needs less of it, and is asked for 1 / (k + 1)."""
    repairs: int = 200
    """Most watched sequences that a turn runs through the model at a time because it threatens
    them, and as many earlier edits because it is their turn; those that broke are repaired."""
    batch_size: int = 32
    """Sequences per capture batch, over whose answer tokens the loss is averaged."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of the weights, see `operations.rank_k_update_`; the number of the turn is the seed."""

    @property
    def closed_loop(self) -> bool:
        """Whether a turn looks at what its steps did."""
        return self.rounds > 1

    @property
    def most_checked(self) -> int:
        """Most watched sequences to check at a time."""
        return self.repairs if self.closed_loop else 0
