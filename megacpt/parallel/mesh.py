"""The device mesh. Ranks keep Llama 3's order, (dp_replicate, dp_shard, pp, cp, tp) with tp fastest; the mesh itself is
laid out (pp, dp_replicate, dp_shard, cp, tp), because the axes that FSDP flattens must be neighbours.

cp ranks hold the same weights and different tokens, so FSDP shards over dp_shard x cp.

A process makes the groups that it is in and no others, about ten, however many ranks there are. They compute, on a GPU by NCCL
alone; the one group that carries objects is gloo's (`object_group`), made when it is first asked for, and its pairs connect when
they first talk. The device is not bound to the process group: a bound one would open one communicator for all messages of a group.
"""

# torch.distributed offers its stores without naming them as exports:
# pyright: reportPrivateImportUsage=false

import functools
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megacpt import compat
from megacpt.config.layout import Layout
from megacpt.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """What layers and the loop ask of the layout. Axis names: pp, dp_replicate, dp_shard, cp, tp."""

    layout: Layout
    device: torch.device
    tensor: DeviceMesh
    """The tp axis, on which parameters are DTensors."""
    fsdp: DeviceMesh
    """What `fully_shard` gets: the flattened dp_shard x cp, behind dp_replicate when that is above 1."""
    groups: dict[str, dist.ProcessGroup]
    """By axis. Axes of one rank share a group."""
    channels: dict[tuple[str, str], dist.ProcessGroup]
    """Pipeline: a group over the stages' ranks by (activation | gradient, up | down). A P2P operation has a communicator
    of its own for each pair of ranks of a group: so for each directed edge and kind."""
    ends: dist.ProcessGroup | None
    """The first and the last pipeline rank, if this is one of them."""

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """This rank's place on each axis."""
        return {name: group.rank() for name, group in self.groups.items()}

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
    # gloo opens a connection to every other rank of a group at once, unless it is told to do so when two first talk.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    raise_file_limit(int(os.environ.get("WORLD_SIZE", "1")))
    backend, timeout = _backend(device), timedelta(seconds=timeout_seconds)
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


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def files_needed(world_size: int) -> int:
    """Open files of the process that needs most: rank 0 has a connection to each rank for the plans of checkpoints, and one for
    the rendezvous if it serves it; data, libraries and NCCL take the rest."""
    return 512 + 2 * world_size


def raise_file_limit(world_size: int) -> int:
    """As far as is needed and allowed. Returns what this process may open."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = most == resource.RLIM_INFINITY
    wanted = files_needed(world_size) if unlimited else min(files_needed(world_size), most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        limit = wanted
    return limit


def share(name: str, text: str) -> str:
    """Rank 0's text, on all ranks, by the rendezvous that they met at. Once for each name."""
    store = compat.default_store()
    if dist.get_rank() == 0:
        store.set(f"megacpt/{name}", text)
    return store.get(f"megacpt/{name}").decode()


def restart_process_group(device: torch.device, generation: str, timeout_seconds: float) -> None:
    """Ends all groups and begins anew, for another layout, on the rendezvous that is there. Collective.

    A plain initialisation would meet the old group's keys and hang under torchrun: each generation has its own prefix, inside the one
    before.
    """
    store, rank, size = compat.default_store(), dist.get_rank(), dist.get_world_size()
    meet(device)
    dist.destroy_process_group()
    dist.init_process_group(
        _backend(device),
        store=dist.PrefixStore(generation, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def meet(device: torch.device) -> None:
    """Waits until all ranks are here."""
    token = torch.zeros(1, device=device)
    dist.all_reduce(token)
    token.item()


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
    grid = rank_grid(layout)
    made: dict[tuple, dist.ProcessGroup] = {}

    def group_of(axis: str, ranks: Sequence[int]) -> dist.ProcessGroup:
        return _own_group(made, axis, ranks, device)

    here = [int(place) for place in (grid == dist.get_rank()).nonzero()[0]]
    groups = {}
    for i, axis in enumerate(AXES):
        groups[axis] = group_of(axis, grid[tuple(slice(None) if j == i else p for j, p in enumerate(here))].tolist())
    flat = group_of("fsdp", grid[here[0], here[1], :, :, here[4]].flatten().tolist())
    full = DeviceMesh.from_group(
        [groups["pp"], groups["dp_replicate"], flat, groups["tp"]],
        device.type,
        mesh=grid.flatten(2, 3),
        mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
    )
    fsdp = full["dp_replicate", "fsdp"] if layout.data_replicate > 1 else full["fsdp"]
    channels, ends = {}, None
    if layout.pipeline > 1:
        column = grid[(slice(None), *here[1:])].tolist()
        for kind in ("activation", "gradient"):
            for direction in ("up", "down"):
                channels[kind, direction] = group_of(f"{kind}_{direction}", column)
        at_an_end = here[0] in (0, layout.pipeline - 1)
        # Ranks between make one, too, of themselves: a group's name holds the number of groups before it.
        group = group_of("ends", [column[0], column[-1]] if at_an_end else [dist.get_rank()])
        ends = group if at_an_end else None
    return Mesh(layout, device, full["tp"], fsdp, groups, channels, ends)


AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""In the order of `rank_grid`."""


def _own_group(
    made: dict[tuple, dist.ProcessGroup], axis: str, ranks: Sequence[int], device: torch.device
) -> dist.ProcessGroup:
    """This rank's group of an axis, of which the other ranks make theirs at the same time. All make as many groups in the same
    order, whatever is in them.

    Args:
        made: what there is for this mesh. What need not be apart is shared: axes of one rank, of all ranks (the default group), and
            dp_shard with fsdp without context parallelism. Messages have groups of their own; cp and tp, whose collectives stand
            between two products, have streams of high priority.
    """
    high, apart = axis in ("cp", "tp") and len(ranks) > 1, axis not in (*AXES, "fsdp")
    if len(ranks) == dist.get_world_size() and not (high or apart):
        return default_group()
    key = (*ranks, "high" if high else axis if apart else "")
    if key not in made:
        timeout, options = compat.timeout_of(default_group()), None
        if device.type == "cuda":
            options = compat.nccl_options(high, timeout)
        made[key] = _member(
            dist.new_group(
                ranks, timeout, pg_options=options, use_local_synchronization=True, group_desc=f"mesh_{axis}"
            )
        )
    return made[key]


def default_group() -> dist.ProcessGroup:
    """All ranks, the group that `start_process_group` made."""
    assert dist.group.WORLD is not None, "no process group has been started"
    return dist.group.WORLD


def _member(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """A group of which this rank is one; torch gives others a number in its place."""
    assert isinstance(group, dist.ProcessGroup), f"rank {dist.get_rank()} is not in a group that it makes: {group}"
    return group


def open_groups(mesh: Mesh) -> None:
    """Opens the communicators of all axes, which NCCL does with a group's first collective, holding up the hosts of all its ranks.
    All ranks call it and open them in the same order."""
    token = torch.zeros(1, device=mesh.device)
    for group in dict.fromkeys([*mesh.groups.values(), mesh.fsdp.get_group("fsdp"), mesh.ends]):
        if group is not None and group.size() > 1:
            dist.all_reduce(token, group=group)


def object_group() -> dist.ProcessGroup:
    """All ranks' group for Python objects: what they plan and how it went when they save and load. It is made when it is first asked
    for, by all ranks, and there is one, so who uses it waits for the save that is under way.

    Collectives over all ranks that hold a tensor, or few bytes, take the default group.
    """
    name = f"objects of group {default_group().group_name}"  # not of one that this process has inherited by a fork
    for group in compat.process_groups():
        if group.group_desc == name:
            return group
    return _member(dist.new_group(timeout=compat.timeout_of(default_group()), backend="gloo", group_desc=name))


def set_timeout(seconds: float) -> None:
    """How long a collective of any group may wait for its ranks, from now on, in groups that are made later, too."""
    for group in compat.process_groups():
        compat.set_timeout(group, timedelta(seconds=seconds))
