"""Whether vLLM serves what was published: trainers and operators may write to its weights, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ultraedit_kernels.integrations.vllm.twin.locate import storage

_WORDS = (torch.int64, torch.int32, torch.int16)


class Watch:
    """What was published, so that another's write is noticed.

    Args:
        live: edited module → the weight that vLLM serves from, see `Twin.live`.
        layers: vLLM's layers that compute from these.

    Attributes:
        foreign: whether vLLM was last found to serve something else, which is to be left alone.
        asleep: whether the weights cannot be read.
    """

    def __init__(self, live: Mapping[str, Any], layers: Iterable[nn.Module]) -> None:
        self._live = live
        self._places = [(layer, storage(layer.weight)) for layer in layers]
        self.asleep = False
        self.note()

    def note(self) -> None:
        """What is served now is right."""
        self.foreign = False
        self._seen = {name: fingerprint(weight) for name, weight in self._live.items()}

    def look(self) -> bool:
        """See whether `foreign`. Reads every weight once, unless they are asleep."""
        if not self.asleep:
            self.foreign = not self._holds()
        return self.foreign

    def check(self, version: int) -> None:
        """Raise RuntimeError if vLLM serves other weights than this version's, which it did."""
        if self.look():
            raise RuntimeError(
                f"the engine's weights are not those of version {version}: something else has "
                "written to them, such as a weight transfer or load_weights, or they were not "
                "loaded yet since a level-2 sleep; nothing was changed. reload_weights, or restart "
                f"the server, to serve version {version}; to edit the new weights, serve a "
                "checkpoint of them with a state directory of its own"
            )

    def _holds(self) -> bool:
        """Whether vLLM still serves what was noted, from the same memory."""
        for layer, place in self._places:
            weight: Any = layer._parameters.get("weight")
            if weight is None or weight.is_meta or storage(weight) != place:
                return False
        return all(
            torch.equal(fingerprint(weight), self._seen[name])
            for name, weight in self._live.items()
        )


def fingerprint(weight: Any) -> Tensor:
    """Sums of a weight's bits along its rows as they lie in memory, int64; of a divided weight, of
    this rank's part. Whoever loads other weights changes it; it proves nothing, as a digest does,
    and costs one read on the weight's own device."""
    part: Tensor = getattr(weight, "local", weight).detach()
    if not part.numel():  # of another pipeline stage
        return part.new_zeros(0, dtype=torch.int64)
    if part.stride(0) == 1 and part.stride(1) != 1:
        part = part.t()
    bits = part.contiguous()
    row = bits.shape[1] * bits.element_size()
    word = next((w for w in _WORDS if not (row | bits.data_ptr()) % w.itemsize), torch.uint8)
    return bits.view(word).sum(1, dtype=torch.int64)
