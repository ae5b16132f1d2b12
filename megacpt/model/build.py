"""A model on this rank: made on the meta device, sharded by FSDP2, then given memory. Weights come afterwards."""

import warnings

import torch
from megacpt_kernels.attention import resolve_backend
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megacpt.errors import ConfigError
from megacpt.model.config import LlamaConfig
from megacpt.model.llama import Llama, ModelOptions
from megacpt.parallel.mesh import Mesh


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """Type of weights, moments and reduced gradients: at least fp32."""
    return torch.float64 if compute == torch.float64 else torch.float32


def build_model(config: LlamaConfig, mesh: Mesh, compute: torch.dtype, options: ModelOptions) -> Llama:
    """The model with uninitialised weights, computing in `compute` on masters of at least fp32.

    Gradients are sums over ranks and micro-batches: the loss carries the global normalisation.
    """
    try:
        resolve_backend(options.attention_backend, mesh.device.type, compute)
    except ValueError as error:
        raise ConfigError([f"kernels.attention: {error}"]) from None
    master = master_dtype(compute)
    with torch.device("meta"):
        model = Llama(config, mesh, master, options)
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == master else compute, reduce_dtype=master, cast_forward_inputs=False
    )
    for block in model.model.layers.values():
        fully_shard(block, mesh=mesh.fsdp, mp_policy=policy)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to_empty(device=mesh.device)
    return model
