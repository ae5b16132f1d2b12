"""FSDP2: what is sharded how, and when gradients are reduced. What its insides are called stands in compat.py.

Autograd's own end of backward never ends a step: with a pipeline many backwards run, and with a split backward the last
gradients come outside autograd. `take_gradients` and `finish` do it by hand, as torch's pipelining does.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megacpt.compat import end_fsdp_backward, fsdp_groups
from megacpt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sharding:
    """Attributes:
    reshard_after_forward: whether blocks free their weights between forward and backward.
    prefetch: blocks whose weights are gathered ahead.
    """

    reshard_after_forward: bool = True
    prefetch: int = 1


def shard(
    root: nn.Module, blocks: list[nn.Module], mesh: Mesh, compute: torch.dtype, master: torch.dtype, how: Sharding
) -> None:
    """Shards each block and what else `root` holds. The root's own weights stay gathered during a step.

    Gradients are sums over ranks, reduced in `master`.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == master else compute, reduce_dtype=master, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=how.reshard_after_forward)
    fully_shard(root, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
    for module in [*blocks, root]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reshard_after_backward(how.reshard_after_forward and module is not root, recurse=False)
        module.set_requires_gradient_sync(False, recurse=False)
    root.set_is_last_backward(False)
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + how.prefetch])
        block.set_modules_to_backward_prefetch(blocks[max(0, i - how.prefetch) : i][::-1])


def sync_gradients(modules: Iterable[FSDPModule], on: bool) -> None:
    """Whether the next gradients of these modules are reduced, or only accumulated."""
    for module in modules:
        module.set_requires_gradient_sync(on, recurse=False)


def free_after_backward(modules: Iterable[FSDPModule]) -> None:
    """The next backward of these modules is their last in this step: it frees their weights."""
    for module in modules:
        module.set_reshard_after_backward(True, recurse=False)


def take_gradients(modules: Iterable[FSDPModule]) -> None:
    """Accumulates, and reduces if `sync_gradients` said so, gradients that came outside autograd."""
    for module in modules:
        for group in fsdp_groups(module):
            group.post_backward()


def finish(root: FSDPModule, blocks: list[FSDPModule], how: Sharding) -> None:
    """Ends the step: reduces what is not yet reduced, waits for reductions, frees weights, and is ready for the next."""
    sync_gradients([*blocks, root], True)
    free_after_backward([*blocks, root])
    root.set_is_last_backward(True)
    end_fsdp_backward(root)
    root.set_is_last_backward(False)
    for module in [*blocks, root]:
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_backward(how.reshard_after_forward and module is not root, recurse=False)


def free_weights(modules: Iterable[FSDPModule]) -> None:
    """After a forward without backward."""
    for module in modules:
        module.reshard()
