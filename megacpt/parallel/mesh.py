"""The device mesh. Ranks keep Llama 3's order, (dp_replicate, dp_shard, pp, cp, tp) with tp fastest; the mesh itself is
laid out (pp, dp_replicate, dp_shard, cp, tp), because the axes that FSDP flattens must be neighbours.

cp ranks hold the same weights and different tokens, so FSDP shards over dp_shard x cp.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megacpt.config.layout import Layout
from megacpt.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """What layers and the loop ask of the layout. Axis names: pp, dp_replicate, dp_shard, cp, tp."""

    layout: Layout
    device: torch.device
    full: DeviceMesh
    fsdp: DeviceMesh
    """What `fully_shard` gets: the flattened dp_shard x cp, behind dp_replicate when that is above 1."""
    channels: dict[tuple[str, str], dist.ProcessGroup]
    """Pipeline: a group over the stages' ranks by (activation | gradient, up | down). A P2P operation has a communicator
    of its own for each pair of ranks of a group: so for each directed edge and kind."""
    ends: dist.ProcessGroup | None
    """The first and the last pipeline rank, if this is one of them."""

    @functools.cached_property
    def axes(self) -> dict[str, DeviceMesh]:
        """Each axis by name. Kept: slicing a mesh takes the host a while."""
        return {name: self.full[name] for name in self.full.mesh_dim_names}

    @functools.cached_property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        return {name: axis.get_group() for name, axis in self.axes.items()}

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """This rank's place on each axis."""
        return {name: axis.get_local_rank() for name, axis in self.axes.items()}

    @property
    def tensor(self) -> DeviceMesh:
        return self.axes["tp"]

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return self.groups["tp"]

    @property
    def tensor_rank(self) -> int:
        return self.ranks["tp"]

    @property
    def context_group(self) -> dist.ProcessGroup:
        return self.groups["cp"]

    @property
    def context_rank(self) -> int:
        return self.ranks["cp"]

    @property
    def pipeline_rank(self) -> int:
        return self.ranks["pp"]

    @property
    def data_rank(self) -> int:
        """Which rows this rank reads, 0 … layout.data - 1."""
        return self.ranks["dp_replicate"] * self.layout.data_shard + self.ranks["dp_shard"]

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """Sums, in place, what ranks with different tokens hold: over the data and context axes, and over the pipeline,
        where all but the last rank hold zeros."""
        return self.sum_over(("dp_replicate", "dp_shard", "cp", "pp"), x)

    def sum_over(self, axes: Sequence[str], x: Tensor) -> Tensor:
        """Sums, in place, over some axes."""
        for axis in axes:
            if self.groups[axis].size() > 1:
                dist.all_reduce(x, group=self.groups[axis])
        return x


def device_of_process() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start_process_group(device: torch.device, timeout_seconds: float = 600) -> None:
    """Joins the group that torchrun describes, or makes one of this process alone.

    Raises:
        ConfigError: for settings of the environment under which parallelism breaks.
    """
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise ConfigError(
            [
                "CUDA_DEVICE_MAX_CONNECTIONS = 1: forces all streams into one queue, so that FSDP's and the pipeline's "
                "communication waits for computation. It is Megatron's setting for tensor parallelism; unset it here."
            ],
            "the environment",
        )
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own store
        store = dist.TCPStore(
            address, port, size, is_master=rank == 0 and not served, timeout=timeout, multi_tenant=not served
        )
        # After torchrun restarted its processes in place, the keys of the attempt before are still there.
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def share(name: str, text: str) -> str:
    """Rank 0's text, on all ranks, by the rendezvous that they met at. Once for each name."""
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set(f"megacpt/{name}", text)
    return store.get(f"megacpt/{name}").decode()


def restart_process_group(device: torch.device, generation: str, timeout_seconds: float) -> None:
    """Ends all groups and begins anew, for another layout, on the rendezvous that is there. Collective.

    A plain initialisation would meet the old group's keys and hang under torchrun: each generation has its own prefix, inside the one
    before.
    """
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(generation, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def rank_grid(layout: Layout) -> Tensor:
    """Ranks by (pp, dp_replicate, dp_shard, cp, tp): rank = tp + TP (cp + CP (pp + PP dp)), Llama 3, figure 5."""
    shape = (layout.data_replicate, layout.data_shard, layout.pipeline, layout.context, layout.tensor)
    return torch.arange(layout.world_size).view(shape).permute(2, 0, 1, 3, 4).contiguous()


def picture(layout: Layout) -> str:
    """The layout in lines of text: a line for each data replica and pipeline stage, brackets around ranks that share tensors."""
    grid, lines = rank_grid(layout), []
    for replicate in range(layout.data_replicate):
        for shard in range(layout.data_shard):
            for stage in range(layout.pipeline):
                groups = ["[" + " ".join(map(str, row)) + "]" for row in grid[stage, replicate, shard].tolist()]
                name = f"data {replicate * layout.data_shard + shard}, pipeline {stage}"
                lines.append(f"  {name}: " + " ".join(groups))
    shown = lines if len(lines) <= 16 else [*lines[:15], f"  … {len(lines) - 15} more like these"]
    return "\n".join([f"{layout}; [ranks that share tensors] side by side share the context", *shown])


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh over all ranks of the process group, whose size must be the layout's."""
    world = dist.get_world_size()
    assert world == layout.world_size, f"{layout} needs {layout.world_size} ranks, the process group has {world}"
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    full = DeviceMesh(device.type, rank_grid(layout), mesh_dim_names=names, backend_override=_backends(device, names))
    flat = full["dp_shard", "cp"]._flatten("fsdp")
    fsdp = DeviceMesh._concatenate([full["dp_replicate"], flat]) if layout.data_replicate > 1 else flat
    channels, ends = {}, None
    if layout.pipeline > 1:
        columns = rank_grid(layout).view(layout.pipeline, -1).t().tolist()
        for kind in ("activation", "gradient"):
            for direction in ("up", "down"):
                channels[kind, direction] = dist.new_subgroups_by_enumeration(columns)[0]
        ends = dist.new_subgroups_by_enumeration([[column[0], column[-1]] for column in columns])[0]
    return Mesh(layout, device, full, fsdp, channels, ends)


def _backends(device: torch.device, names: tuple[str, ...]):
    """High-priority streams for the axes whose collectives stand between two products."""
    if device.type != "cuda":
        return None
    high = lambda: ("nccl", dist.ProcessGroupNCCL.Options(is_high_priority_stream=True))
    return tuple(high() if name in ("cp", "tp") else (None, None) for name in names)


def set_timeout(seconds: float) -> None:
    """How long a collective of any group may wait for its ranks, from now on."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
