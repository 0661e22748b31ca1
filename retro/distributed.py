"""The processes (ranks) that train one model together under torchrun, and the network cut into parts for them.

A process that torchrun did not start is alone: nothing is exchanged, and every number is what it would be without this module.

What ranks tell each other goes over gloo on the CPU; gradients and weights go over NCCL where there are GPUs.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from retro.bert import BertEncoder
from retro.data import Batch
from retro.errors import ConfigError, RetroError, TrainingError
from retro.model import Retro

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train together. All of them call the same methods in the same order."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def part(self, first: int, count: int) -> tuple[int, int]:
        """This rank's part of `count` numbers from `first` on, as first and count: contiguous, in the order of the ranks."""
        begin, end = self.rank * count // self.size, (self.rank + 1) * count // self.size
        return first + begin, end - begin

    def total(self, *values: float) -> list[float]:
        """Sums over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total(float(flag))[0] > 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Calls a function on every rank; where it raises a RetroError on some, all ranks stop.

        Raises:
            RetroError: On the first rank that has one; so it is reported once.
            SystemExit: On all others.
        """
        if self.size == 1:
            return function()
        result, error = None, None
        try:
            result = function()
        except RetroError as raised:
            error = raised
        failed = [rank for rank, fails in enumerate(self.gather(error is not None)) if fails]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise SystemExit(1)
        return result  # type: ignore[return-value]

    def on_first(self, function: Callable[[], T]) -> T:
        """Calls a function on the first rank only and gives its result to all; errors as in `together`."""
        if self.size == 1:
            return function()
        return self.gather(self.together(lambda: function() if self.is_first else None))[0]  # type: ignore[return-value]


ALONE = Ranks()


def rank_of_environment() -> int:
    """This process's number as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def joined(device: torch.device, *, timeout_s: float) -> Iterator[Ranks]:
    """Meets the other processes that torchrun started, if it did.

    Args:
        device: As `rank_device` gives it.
        timeout_s: How long ranks wait for each other before they give up.

    Raises:
        TrainingError: Another rank has ended or does not answer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    rank, lost = rank_of_environment(), False
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
        yield Ranks(rank=rank, size=dist.get_world_size())
    except RuntimeError as error:
        lost = _is_about_connections(error)
        if not lost:
            raise
        raise TrainingError(
            f"rank {rank} has lost the others: one of them has ended, see its message, or did not answer within "
            f"{timeout_s:g} s (train.timeout_s). Start the same command again to go on from the newest checkpoint"
        ) from error
    finally:
        if dist.is_initialized() and not lost:  # NCCL would wait for the lost rank once more
            dist.destroy_process_group()
        # A thread of gloo lets go of the last tensors a moment later, and aborts the process where Python is already ending.
        time.sleep(0.2)


def _is_about_connections(error: RuntimeError) -> bool:
    """gloo says with a plain RuntimeError what NCCL and the store say with errors of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def rank_device(name: str, resolve: Callable[[str], torch.device]) -> torch.device:
    """The device of this rank: each one's own GPU, or the CPU.

    Args:
        name: auto, cpu or cuda; under torchrun not cuda:N.
        resolve: Gives the device of a name to a process that is alone.

    Raises:
        ConfigError: There are fewer GPUs than ranks on this machine, or one GPU is named for several ranks.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = resolve(name)
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"device = {name!r} names one GPU for all ranks: use cuda or auto, each rank takes its own")
    count = torch.cuda.device_count()
    if local_size > count:
        raise ConfigError(f"{local_size} ranks on a machine with {count} GPUs: start torchrun --nproc-per-node {count}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


# --- the network in parts -----------------------------------------------------------------------------------------


def shard(model: Retro, device: torch.device, dtype: torch.dtype) -> None:
    """Cuts the network's parameters into one part for each rank (FSDP2), which holds no more outside a forward or backward pass.

    Each layer is a unit that is put together when it is due; the tables, the output and the last norms are another, whole during
    the pass. With bfloat16 the layers' matrices travel as bfloat16 and all else as float32, so that a pass computes what it
    computes on a single rank under autocast. Gradients are summed in float32.

    Args:
        model: On the CPU; its parameters are moved to the device part by part.
        device: Of this rank.
        dtype: Of the matrix products.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if isinstance(model.encoder, BertEncoder):
        model.encoder.grouped = False
    for layer in [*model.layers, *(model.encoder.layers if model.encoder is not None else ())]:
        if dtype == torch.bfloat16:
            for norm in layer.modules():
                if isinstance(norm, (nn.RMSNorm, nn.LayerNorm)):
                    fully_shard(norm, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=narrow if dtype == torch.bfloat16 else exact)
    fully_shard(model, mesh=mesh, mp_policy=exact)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this rank may hold a part only."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, as the part of it that another one is of."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def whole_state(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """All weights on the first rank's CPU, gathered one after the other; nothing on the others."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if ranks.is_first:
            state[name] = gathered.cpu()
    return state


def with_same_work(batch: Batch, ranks: Ranks) -> Batch:
    """A batch with which every rank calls the same modules, without which they would wait for each other for ever.

    Where another rank's batch has neighbors and this one's has none, a sequence is added that has a neighbor but no token: the
    encoder and CCA read it, and neither loss nor gradients change.
    """
    if ranks.size == 1 or batch.neighbors_BLKR is None or batch.keep_BLKR is None:
        return batch
    has_neighbors = bool(batch.keep_BLKR.any())
    if not ranks.any(has_neighbors) or has_neighbors:
        return batch
    tensors = {name: F.pad(x, (0,) * (2 * x.ndim - 1) + (1,)) for name, x in batch.tensors().items()}
    tensors["document_BL"][-1] = -1
    tensors["keep_BLKR"][-1, 0, 0, 0] = True
    return replace(batch, **tensors)
