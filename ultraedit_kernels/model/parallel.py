"""Tensor parallelism: one model, divided among several processes (ranks).

A column-parallel linear layer holds some rows of its weight [d_out, d_in] and gives as many of the
output's features; a row-parallel layer holds some columns, and its ranks' outputs are added up. So
between the two every feature is whole on every rank, inside the blocks each has its share of the
heads and of the width. Capture gathers keys and gradients, so that every rank solves for the same
change and applies its share of it: a delta does not depend on the number of ranks.

Under pipeline parallelism a rank has some of the layers. What it edits of the others it knows as a
weight of which it has no part.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_WELL, _PAUSE, _FAILED = range(3)


class RankError(RuntimeError):
    """Another rank has failed; it says why."""


class Ranks:
    """The ranks of one model.

    Every collective begins with the question whether all are well, and `together` ends with it. A
    rank that fails answers the one that the others come to next with no, once. So none waits for
    one that has given up.

    Args:
        data: process group of the model's tensors.
        control: another process group of the same ranks, for tensors on the CPU.
    """

    def __init__(self, data: dist.ProcessGroup, control: dist.ProcessGroup) -> None:
        self._data, self._control = data, control
        self.rank, self.size = dist.get_rank(control), dist.get_world_size(control)
        self.wants_pause: Callable[[], bool] = lambda: False
        """Asked on rank 0 before every collective; if so, `pause` is called on all ranks."""
        self.pause: Callable[[], None] = lambda: None
        self._told: BaseException | None = None
        """The last failure of this rank that the others know of."""

    def agree(self) -> None:
        """Return on all ranks, perhaps after pauses, or, if one is not well, raise RankError."""
        while self._ask(_PAUSE if self.rank == 0 and self.wants_pause() else _WELL) == _PAUSE:
            self.pause()

    def all(self, so: bool) -> bool:
        """Whether it is so on all ranks."""
        return self._ask(_WELL if so else _PAUSE) == _WELL

    def _ask(self, state: int) -> int:
        """The worst state of all ranks."""
        worst = torch.tensor([state], dtype=torch.int32)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._control)
        if worst == _FAILED:
            raise RankError("another rank has failed; nothing was changed")
        return int(worst)

    @contextmanager
    def together(self) -> Iterator[None]:
        """The block fails on all ranks if it fails on one."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise
        self._ask(_WELL)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others do, who stay out if it fails there.
        None enters unless all have come."""
        self._ask(_WELL)
        if self.rank:
            self._ask(_WELL)
            yield
        else:
            with self.together():
                yield

    def _tell(self, error: BaseException) -> None:
        """Let the others know, unless they do."""
        if isinstance(error, RankError) or error is self._told:
            return
        self._told = error
        with suppress(RankError):
            self._ask(_FAILED)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x."""
        total = x.clone(memory_format=torch.contiguous_format)
        self.agree()
        dist.all_reduce(total, group=self._data)
        return total

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' x, of equal shape, along a dimension."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.agree()
        dist.all_gather(parts, x, group=self._data)
        return torch.cat(parts, dim)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """One rank's x, of equal shape on all."""
        x = x.clone(memory_format=torch.contiguous_format)
        self.agree()
        dist.broadcast(x, group=self._data, group_src=source)
        return x

    def gather_objects(self, value: Any) -> list[Any]:
        """All ranks' values, which are pickled."""
        values = [None] * self.size
        self.agree()
        dist.all_gather_object(values, value, group=self._control)
        return values


@dataclass(frozen=True)
class Shard:
    """A rank's part of a weight [d_out, d_in]."""

    dim: int
    """The dimension that is divided: 0 in a column-parallel layer, 1 in a row-parallel one."""
    ranks: Ranks
    shape: tuple[int, int]
    """Of the whole weight."""
    owners: tuple[int, ...]
    """The ranks that have a part, in the order of the parts; the others' part is empty."""

    def cut(self, weight: Tensor) -> Tensor:
        """This rank's part of a weight [d_out, d_in]."""
        return self._own(weight, self.dim)

    def part(self, rows: Tensor, dim: int) -> Tensor:
        """This rank's columns of rows [n, d], whose d is dimension `dim` of the weight."""
        return rows if dim != self.dim else self._own(rows, 1).contiguous()

    def _own(self, x: Tensor, dim: int) -> Tensor:
        if self.ranks.rank not in self.owners:
            return x.narrow(dim, 0, 0)
        return x.chunk(len(self.owners), dim)[self.owners.index(self.ranks.rank)]

    def whole(self, rows: Tensor, dim: int) -> Tensor:
        """The same rows [n, d] on all ranks, from this rank's columns of them."""
        return self.ranks.all_gather(rows, 1) if dim == self.dim else self.ranks.broadcast(rows)


class ShardedWeight:
    """A rank's part of a weight, with as much of a tensor's interface as an editor uses.

    `shape` is that of the whole weight; the memory is that of the part.
    """

    def __init__(self, local: Tensor, shard: Shard) -> None:
        self.local, self.shard, self.shape = local, shard, shard.shape
        self.dtype, self.device = local.dtype, local.device

    def whole(self) -> Tensor:
        """The weight [d_out, d_in], gathered from all ranks."""
        shard, ranks = self.shard, self.shard.ranks
        if len(shard.owners) == ranks.size:
            return ranks.all_gather(self.local, shard.dim)
        shape = list(self.shape)
        shape[shard.dim] //= len(shard.owners)
        parts = [
            self.local if owner == ranks.rank else self.local.new_empty(shape)
            for owner in shard.owners
        ]
        sent = [ranks.broadcast(p, owner) for p, owner in zip(parts, shard.owners, strict=True)]
        return torch.cat(sent, shard.dim)

    def copy_(self, source: ShardedWeight | Tensor) -> ShardedWeight:
        """From the same part, or from a whole weight."""
        if isinstance(source, Tensor):
            source = ShardedWeight(self.shard.cut(source), self.shard)
        self.local.copy_(source.local)
        return self

    def clone(self) -> ShardedWeight:
        """The same part in memory of its own."""
        return ShardedWeight(self.local.clone(), self.shard)

    def to(self, device: Any, copy: bool = False) -> ShardedWeight:
        """The part on a device; with `copy` in memory of its own in any case."""
        return ShardedWeight(self.local.to(device, copy=copy), self.shard)

    def new_zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros of this shape on the part's device, in its dtype unless another is given."""
        return self.local.new_zeros(*shape, dtype=dtype)

    def detach(self) -> Tensor:
        """The part, without its gradient's history."""
        return self.local.detach()

    def numel(self) -> int:
        """How many numbers the part has."""
        return self.local.numel()


def shard_of(module: nn.Module) -> Shard | None:
    """How a linear module is divided; None if it is whole."""
    return getattr(module, "shard", None)


def ranks_of(model: nn.Module) -> Ranks | None:
    """The ranks among which a model is divided; None if it is whole."""
    return getattr(model, "ranks", None)


def together(model: nn.Module) -> AbstractContextManager[None]:
    """`Ranks.together` of the model's ranks, if it has some."""
    ranks = ranks_of(model)
    return nullcontext() if ranks is None else ranks.together()


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as [d_in, d_out], as GPT-2's linear layers do, which are
    transformers' Conv1D."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight that `weight_of` gives."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def weight_of(module: Any) -> Any:
    """The weight [d_out, d_in] of a linear module: a tensor, or a `ShardedWeight`. It is the
    module's own memory, transposed where the module keeps it so."""
    shard, part = shard_of(module), part_of(module)
    return part if shard is None else ShardedWeight(part, shard)


def part_of(module: Any) -> Tensor:
    """The weight [d_out, d_in] of a linear module, or this rank's part of it."""
    part: Tensor = module.weight.data
    return part.t() if is_transposed(module) else part


def whole(weight: Any) -> Tensor:
    """All of a weight, be it divided or not; to be called on all ranks."""
    plain: Tensor = weight.whole() if isinstance(weight, ShardedWeight) else weight
    return plain


def norm(weight: Any) -> Tensor:
    """Frobenius norm of all of a weight, float32."""
    if not isinstance(weight, ShardedWeight):
        length: Tensor = weight.float().norm()
        return length
    square: Tensor = weight.shard.ranks.all_reduce(weight.local.float().square().sum())
    return square.sqrt()


def same(weight: Any, tensor: Tensor) -> Tensor:
    """Rank 0's tensor, if the weight is divided: sums on a GPU may differ in their last bits."""
    return weight.shard.ranks.broadcast(tensor) if isinstance(weight, ShardedWeight) else tensor


def agree(weights: Mapping[str, Any], found: bool) -> bool:
    """Whether something was found on all ranks."""
    missing = torch.tensor(float(not found))
    for weight in weights.values():
        if isinstance(weight, ShardedWeight):
            return not weight.shard.ranks.all_reduce(missing.to(weight.device)).item()
    return found


def fingerprint(model: Any) -> str:
    """SHA-256, hexadecimal, of the model's configuration and of a few numbers of each parameter; of
    a rank's part, if they are divided among ranks."""
    state = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        few = flat[:: max(1, len(flat) // 16)][:16].double().cpu()
        state.update(name.encode() + few.numpy().tobytes())
    return state.hexdigest()


def local_config(config: Any, size: int) -> Any:
    """The Hugging Face configuration of a rank's share of the heads and of the MLP's width.

    With fewer key and value heads than ranks, several ranks hold the same head. The vocabulary
    stays as it is: `shard_embedding` and `shard_head` divide it.

    Raises:
        ValueError: heads or width cannot be divided by the number of ranks.
    """
    config = copy.deepcopy(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "intermediate_size", None) or 0
    for what, number in (("attention heads", heads), ("features in the MLP", width)):
        if number % size:
            raise ValueError(f"{number} {what} cannot be divided among {size} ranks")
    if kv_heads % size and size % kv_heads:
        raise ValueError(f"{kv_heads} key-value heads cannot be divided among {size} ranks")
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_attention_heads = heads // size
    config.num_key_value_heads = max(1, kv_heads // size)
    config.intermediate_size = width // size
    return config


def shard_linear(module: Any, dim: int, ranks: Ranks) -> None:
    """Make an `nn.Linear` with a rank's part of the weight column-parallel (0) or row-parallel (1).

    A column-parallel module has its part of the bias, a row-parallel one all of it.
    """

    def columns(x: Tensor) -> Tensor:
        return nn.functional.linear(_Enter.apply(x, ranks), module.weight, module.bias)

    def rows(x: Tensor) -> Tensor:
        y: Tensor = _Sum.apply(nn.functional.linear(x, module.weight), ranks)
        return y if module.bias is None else y + module.bias

    d_out, d_in = module.weight.shape
    shape = (d_out, d_in * ranks.size) if dim else (d_out * ranks.size, d_in)
    module.forward = rows if dim else columns
    module.shard = Shard(dim, ranks, shape, tuple(range(ranks.size)))


def shard_embedding(module: Any, ranks: Ranks) -> None:
    """Make an embedding with a rank's part of the vocabulary give the features of all tokens."""
    whole_forward, rows = module.forward, module.weight.shape[0]
    module.padding_idx = None  # matters to gradients of the weight only

    def forward(ids: Tensor) -> Tensor:
        local = ids - ranks.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        features = whole_forward(local.masked_fill(elsewhere, 0))
        return ranks.all_reduce(features.masked_fill(elsewhere[..., None], 0))

    module.forward = forward


def shard_head(module: Any, vocabulary: int, ranks: Ranks) -> None:
    """Make a head with a rank's part of the vocabulary give all logits, without the padding's."""

    def forward(x: Tensor) -> Tensor:
        part = nn.functional.linear(_Enter.apply(x, ranks), module.weight, module.bias)
        logits: Tensor = _Gather.apply(part, ranks)
        return logits[..., :vocabulary]

    module.forward = forward


class _Enter(torch.autograd.Function):
    """The same on every rank → each rank's own use of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.all_reduce(grad), None


class _Sum(torch.autograd.Function):
    """Each rank's own → their sum on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Each rank's features → all features on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_gather(x, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.ranks.size, -1)[ctx.ranks.rank], None
