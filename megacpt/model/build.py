"""A model on this rank: made on the meta device, sharded by FSDP2, then given memory. Weights come afterwards."""

import warnings

import torch
from megacpt_kernels.attention import resolve_backend
from megacpt_kernels.backend import use_triton

from megacpt.config.recipe import Parallel
from megacpt.errors import ConfigError
from megacpt.model.config import LlamaConfig
from megacpt.model.llama import Llama, ModelOptions
from megacpt.model.stage import StagePlan, plan_stages
from megacpt.parallel.fsdp import Sharding, shard
from megacpt.parallel.mesh import Mesh
from megacpt.parallel.pipeline.runtime import connect


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """Type of weights, moments and reduced gradients: at least fp32."""
    return torch.float64 if compute == torch.float64 else torch.float32


def sharding_of(parallel: Parallel) -> Sharding:
    """auto: weights stay gathered during a step under pipeline, where each is used for every micro-batch."""
    reshard = parallel.reshard_after_forward
    return Sharding(parallel.pipeline == 1 if reshard is None else reshard, parallel.prefetch)


def build_model(
    config: LlamaConfig,
    mesh: Mesh,
    compute: torch.dtype,
    options: ModelOptions,
    plan: StagePlan | None = None,
    sharding: Sharding | None = None,
) -> Llama:
    """This rank's stages with uninitialised weights, computing in `compute` on masters of at least fp32.

    Args:
        plan: which stages are whose; default one stage.
    """
    problems = []
    try:
        resolve_backend(options.attention_backend, mesh.device.type, compute)
    except ValueError as error:
        problems.append(f"kernels.attention: {error}")
    try:
        use_triton(options.operations, torch.empty(0, dtype=compute, device=mesh.device))
    except ValueError as error:
        problems.append(f"kernels.operations: {error}")
    if options.overlap == "symmetric_memory" and mesh.device.type != "cuda":
        problems.append(
            'parallel.overlap = "symmetric_memory": needs CUDA GPUs, this is a CPU. Use "chunked" or "none".'
        )
    if problems:
        raise ConfigError(problems)
    plan, sharding = plan or plan_stages(config.num_hidden_layers, Parallel()), sharding or Sharding()
    master = master_dtype(compute)
    with torch.device("meta"):
        model = Llama(config, mesh, master, options, plan)
    model.compute, model.sharding = compute, sharding
    shard(model, list(model.model.layers.values()), mesh, compute, master, sharding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to_empty(device=mesh.device)
    connect(plan.schedule(1), mesh)
    return model
