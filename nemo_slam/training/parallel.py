"""How several processes share the work: DistributedDataParallel, or weights in shards by PyTorch's ``fully_shard``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from omegaconf import DictConfig

from nemo_slam.config import ConfigError

STRATEGIES = ("ddp", "fsdp2")


@dataclass(frozen=True)
class ParallelConfig:
    """Attributes:
    strategy: ``ddp``, all weights on every GPU, or ``fsdp2``, weights, gradients and optimizer state in shards: for a
        model that does not fit otherwise.
    bucket_megabytes: gradients that DDP sums in one message.
    static_graph: tells DDP that all steps use the same parameters, which they do: every rank runs every module. Null:
        where gradients are not accumulated. With accumulation DDP fails at it (an internal assertion, seen in 2.13).
    gradient_as_bucket_view: gradients lie in DDP's messages, instead of being copied there.
    timeout_seconds: a message between ranks that takes longer ends the run. Longer than any pause that is no fault,
        such as the writing of a checkpoint.
    lost_after_seconds: a rank that gives no sign of life for so long is lost, and the run ends. Longer than any pause
        of a healthy machine; one that is merely slow gives signs.
    """

    strategy: str = "ddp"
    bucket_megabytes: int = 25
    static_graph: bool | None = None
    gradient_as_bucket_view: bool = True
    timeout_seconds: int = 1800
    lost_after_seconds: int = 30

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        if self.bucket_megabytes < 1 or self.timeout_seconds < 1:
            raise ValueError(
                f"bucket_megabytes and timeout_seconds must be positive, got {self.bucket_megabytes} and "
                f"{self.timeout_seconds}"
            )
        if self.lost_after_seconds < 10:
            raise ValueError(f"lost_after_seconds must be at least 10, got {self.lost_after_seconds}")


def processes(trainer: Mapping[str, Any]) -> int:
    """How many processes the arguments of a trainer ask for."""
    devices = trainer["devices"]
    if devices in ("auto", -1, "-1"):
        on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        count = torch.cuda.device_count() if on_gpu else 1
    else:
        listed = devices.strip(",").split(",") if isinstance(devices, str) and "," in devices else devices
        count = int(listed) if isinstance(listed, (int, str)) else len(listed)
    return count * int(trainer["num_nodes"])


def refuse_strangers(trainer: Trainer) -> None:
    """Processes that a launcher has started but that do not know of each other would be as many runs in one folder.

    Lightning itself compares only where it sees several devices: not where ``trainer.devices`` is 1, or ``auto`` on a
    CPU or where each process sees its own GPU alone.

    Raises:
        ConfigError: there are several, and this is a trainer of one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = int(os.environ.get("WORLD_SIZE", 1))
    elif "SLURM_PTY_PORT" in os.environ:  # the shell of `srun --pty -n 8 bash` is one of eight, and the others end
        return
    else:
        started = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if started > 1 and trainer.world_size == 1:
        raise ConfigError(
            f"torchrun or srun has started {started} processes, and each would be a run of its own: set "
            "trainer.devices to the number of processes on a machine, trainer.num_nodes to that of machines, and let "
            "each process see all GPUs of its machine. Where srun is to start several runs, each with a name of its "
            "own: env -u SLURM_STEP_NUM_TASKS python ..."
        )


def of_every_rank(value: Any) -> list[Any]:
    """Each rank's value, on all ranks, in their order; all of them must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def make_strategy(config: ParallelConfig, trainer: DictConfig) -> Strategy | str:
    """The ``strategy`` argument of Lightning's trainer."""
    timeout = timedelta(seconds=config.timeout_seconds)
    if config.strategy == "fsdp2":
        return ShardedStrategy(processes(trainer), timeout)
    if processes(trainer) == 1:
        return "auto"
    accumulates = int(trainer["accumulate_grad_batches"]) > 1
    if config.static_graph and accumulates:
        raise ValueError(
            "parallel.static_graph=true does not go with trainer.accumulate_grad_batches above 1, where "
            "DistributedDataParallel fails: use null or false"
        )
    return ReplicatedStrategy(
        bucket_cap_mb=config.bucket_megabytes,
        static_graph=not accumulates if config.static_graph is None else config.static_graph,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        timeout=timeout,
    )


class ReplicatedStrategy(DDPStrategy):
    """DDP; on a CPU each parameter's gradient is a message of its own, so that a resume is exact to the last bit.

    The order in which more than two ranks' numbers are added depends on where in a message they lie, and DDP sorts its
    messages anew after the first step of every start. On GPUs speed matters more.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.root_device.type == "cpu":
            self.model.register_comm_hook(None, sum_each)


def sum_each(state, bucket):  # DDP compares annotations with its own, and these would be strings
    """A hook of DDP instead of a sum over all of a `GradBucket`: the mean over ranks, parameter by parameter."""
    works = [dist.all_reduce(gradient.div_(dist.get_world_size()), async_op=True) for gradient in bucket.gradients()]
    done = torch.futures.collect_all([work.get_future() for work in works])
    return done.then(lambda _: bucket.buffer())


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for ``fully_shard``, with checkpoints in one file, as those of the other strategies."""

    def __init__(self, ranks: int, timeout: timedelta):
        super().__init__(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )

    def connect(self, model: LightningModule) -> None:
        """Lightning shards nothing itself: it asks for a hook of the model, which is the same for all our models."""
        super().connect(model)
        vars(model)["configure_model"] = lambda: shard(model, self.device_mesh["data_parallel"])

    def load_checkpoint(self, checkpoint_path: Any) -> dict[str, Any]:
        """Lightning's goes around the checkpoint's own reader, and so around its look for damage."""
        reader: Any = self.checkpoint_io  # ours, which `StepCheckpoint` has set
        reader.refuse_damaged(checkpoint_path)
        return super().load_checkpoint(checkpoint_path)


def shard(model: LightningModule, mesh: Any) -> None:
    """Each Conformer layer is a unit that is gathered when it runs; the rest is one more unit, there all step long."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):  # Lightning calls the hook again, for each of fit and validate
        return
    for encoder in (model.speech_encoder, model.multimodal_encoder):
        for layer in encoder.layers.children():
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole_weights(model: LightningModule) -> Iterator[None]:
    """``model.state_dict()`` is that of a model in one piece within this block, on rank 0. All ranks must enter it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    vars(model)["state_dict"] = lambda *args, **kwargs: weights
    try:
        yield
    finally:
        del vars(model)["state_dict"]
