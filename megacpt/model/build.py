"""A model on this rank: made on the meta device, sharded by FSDP2, then given memory. Weights come afterwards."""

import warnings
from collections.abc import Collection

import torch
from megacpt_kernels.attention import resolve_backend
from megacpt_kernels.backend import find_apex, use_triton
from megacpt_kernels.device import profile_of

from megacpt.config.sections.kernels import Kernels
from megacpt.config.sections.parallel import Parallel
from megacpt.errors import ConfigError
from megacpt.family.base import ModelConfig
from megacpt.model.decoder import Decoder, ModelOptions
from megacpt.model.split import PipelinePlan, plan_pipeline
from megacpt.parallel import fsdp
from megacpt.parallel.fsdp import Sharding, shard
from megacpt.parallel.mesh import Mesh, open_groups
from megacpt.parallel.pipeline.runtime import connect


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """Type of weights, moments and reduced gradients: at least fp32."""
    return torch.float64 if compute == torch.float64 else torch.float32


def sharding_of(parallel: Parallel) -> Sharding:
    """auto: weights stay gathered during a step under pipeline, where each is used for every micro-batch."""
    reshard = parallel.reshard_after_forward
    return Sharding(parallel.pipeline == 1 if reshard is None else reshard, parallel.prefetch)


def chosen_kernels(kernels: Kernels, device: torch.device, compute: torch.dtype) -> dict[str, str]:
    """What runs under a recipe's `[kernels]`, each auto resolved.

    Raises:
        ConfigError: for every one that is named and cannot run here, at once.
    """
    like, master = (
        torch.empty(0, dtype=compute, device=device),
        torch.empty(0, dtype=master_dtype(compute), device=device),
    )

    def name(backend: str, x: torch.Tensor) -> str:
        return "triton" if use_triton(backend, x) else "torch"

    resolve = {
        "attention": lambda: resolve_backend(kernels.attention, profile_of(device), compute),
        "operations": lambda: name(kernels.operations, like),
        "optimizer": lambda: (
            find_apex(device.type) and "apex" if kernels.optimizer == "apex" else name(kernels.optimizer, master)
        ),
    }
    chosen, problems = {}, []
    for key, what in resolve.items():
        try:
            chosen[key] = what()
        except ValueError as error:
            problems.append(f"kernels.{key}: {error}")
    if problems:
        raise ConfigError(problems)
    return chosen


def build_model(
    config: ModelConfig,
    mesh: Mesh,
    compute: torch.dtype,
    options: ModelOptions,
    plan: PipelinePlan | None = None,
    sharding: Sharding | None = None,
    without_master: Collection[str] = (),
) -> Decoder:
    """This rank's stages with uninitialised weights, computing in `compute` on masters of at least fp32.

    Args:
        plan: which stages are whose; default one stage.
        without_master: names of parameters that are held in `compute` alone. They are not trained before `set_trainable` names them.
    """
    wanted = {"attention": options.attention_backend, "operations": options.operations}
    chosen_kernels(Kernels.model_validate(wanted), mesh.device, compute)
    if options.overlap == "symmetric_memory" and mesh.device.type != "cuda":
        raise ConfigError(
            ['parallel.overlap = "symmetric_memory": needs CUDA GPUs, this is a CPU. Use "chunked" or "none".']
        )
    plan, sharding = plan or plan_pipeline(config.num_hidden_layers, Parallel()), sharding or Sharding()
    master = master_dtype(compute)
    with torch.device("meta"):
        model = Decoder(config, mesh, lambda name: compute if name in without_master else master, options, plan)
    model.compute, model.sharding = compute, sharding
    shard(model, model.all_blocks(), mesh, compute, master, sharding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to_empty(device=mesh.device)
    open_groups(mesh)
    connect(plan.schedule(1), mesh)
    return model


def set_trainable(model: Decoder, names: Collection[str]) -> None:
    """These parameters of the whole model, and no others, are trained from now on. Between steps; the same on all ranks.

    Nothing below the lowest of them has a backward: no block of a stage, and no pipeline stage.
    """
    lowest = min((p for p in model.config.parameters if p.name in names), key=model.config.depth)
    blocks = model.model.blocks()
    fsdp.set_trainable(model, list(blocks.values()), names, master_dtype(model.compute))
    model.first_trained = model.plan.stage_of(lowest)
    has_backward = [block for layer, block in blocks.items() if layer >= model.config.depth(lowest)]
    fsdp.prefetch_in_backward(has_backward, model.sharding)
