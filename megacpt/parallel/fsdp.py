"""FSDP2: what is sharded how, and when gradients are reduced. What its insides are called stands in compat.py.

Autograd's own end of backward never ends a step: with a pipeline many backwards run, and with a split backward the last
gradients come outside autograd. `take_gradients` and `finish` do it by hand, as torch's pipelining does.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megacpt.compat import end_fsdp_backward, fsdp_groups, reread_fsdp_parameters
from megacpt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sharding:
    """Attributes:
    reshard_after_forward: whether blocks free their weights between forward and backward.
    prefetch: blocks whose weights are gathered ahead.
    """

    reshard_after_forward: bool = True
    prefetch: int = 1


def _sharded(modules: Iterable[nn.Module]) -> Iterator[FSDPModule]:
    """The same modules: `fully_shard` gave them another class, which no annotation of theirs says."""
    for module in modules:
        assert isinstance(module, FSDPModule), f"{type(module).__name__} is not sharded"
        yield module


def shard(
    root: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, compute: torch.dtype, master: torch.dtype, how: Sharding
) -> None:
    """Shards each block and what else `root` holds. The root's own weights stay gathered during a step.

    Gradients are sums over ranks, reduced in `master`. FSDP2 takes parameters that are not trained in the same groups, also in the type of
    the computation: types are asked of those that are trained.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == master else compute, reduce_dtype=master, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=how.reshard_after_forward)
    fully_shard(root, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded([*blocks, root]):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reshard_after_backward(how.reshard_after_forward and module is not root, recurse=False)
        module.set_requires_gradient_sync(False, recurse=False)
    (sharded_root,) = _sharded([root])
    sharded_root.set_is_last_backward(False)
    sharded = list(_sharded(blocks))
    for i, block in enumerate(sharded):
        block.set_modules_to_forward_prefetch(sharded[i + 1 : i + 1 + how.prefetch])
    prefetch_in_backward(blocks, how)


def prefetch_in_backward(blocks: Sequence[nn.Module], how: Sharding) -> None:
    """Backward gathers the weights of some of these blocks ahead, and of no other."""
    sharded = list(_sharded(blocks))
    for i, block in enumerate(sharded):
        ahead = sharded[max(0, i - how.prefetch) : i][::-1]
        block.set_modules_to_backward_prefetch(ahead or [block])  # with none named FSDP takes the one that ran before


@torch.no_grad()
def set_trainable(root: nn.Module, blocks: Sequence[nn.Module], names: Collection[str], master: torch.dtype) -> None:
    """The named parameters, and no others, get gradients from now on. One that was held in a narrower type gets a master. Between steps."""
    modules = dict(root.named_modules())
    for name, parameter in list(root.named_parameters()):
        place, _, own = name.rpartition(".")
        if name in names and parameter.dtype != master:
            setattr(modules[place], own, nn.Parameter(parameter.detach().to(master)))
        else:
            parameter.requires_grad_(name in names)
    for module in _sharded([*blocks, root]):
        reread_fsdp_parameters(module)


def sync_gradients(modules: Iterable[nn.Module], on: bool) -> None:
    """Whether the next gradients of these modules are reduced, or only accumulated."""
    for module in _sharded(modules):
        module.set_requires_gradient_sync(on, recurse=False)


def free_after_backward(modules: Iterable[nn.Module]) -> None:
    """The next backward of these modules is their last in this step: it frees their weights."""
    for module in _sharded(modules):
        module.set_reshard_after_backward(True, recurse=False)


def take_gradients(modules: Iterable[nn.Module]) -> None:
    """Accumulates, and reduces if `sync_gradients` said so, gradients that came outside autograd."""
    for module in _sharded(modules):
        for group in fsdp_groups(module):
            group.post_backward()


def finish(root: nn.Module, blocks: Sequence[nn.Module], how: Sharding) -> None:
    """Ends the step: reduces what is not yet reduced, waits for reductions, frees weights, and is ready for the next."""
    sync_gradients([*blocks, root], True)
    free_after_backward([*blocks, root])
    (sharded,) = _sharded([root])
    sharded.set_is_last_backward(True)
    end_fsdp_backward(sharded)
    sharded.set_is_last_backward(False)
    for module in _sharded([*blocks, root]):
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_backward(how.reshard_after_forward and module is not root, recurse=False)


def free_weights(modules: Iterable[nn.Module]) -> None:
    """After a forward without backward."""
    for module in _sharded(modules):
        module.reshard()
