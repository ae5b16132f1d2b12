"""Model and optimizer of a stage of the plan, on this rank."""

from pathlib import Path

import torch
import torch.distributed as dist

from megacpt.checkpoint.load import stored_dtypes
from megacpt.config.resolve import ResolvedStage, RunPlan
from megacpt.model.build import build_model, master_dtype, sharding_of
from megacpt.model.decoder import Decoder, ModelOptions
from megacpt.model.hf import DTYPES, pretrained_dtypes
from megacpt.model.split import plan_pipeline
from megacpt.optim.adamw import AdamW
from megacpt.optim.trainable import set_trainable
from megacpt.parallel.consensus import ask_rank_0
from megacpt.parallel.mesh import build_mesh


def build(
    plan: RunPlan, stage: ResolvedStage, compute: torch.dtype, device: torch.device, exact: frozenset[str]
) -> tuple[Decoder, AdamW]:
    """Model and optimizer for a stage's layout, without values.

    Args:
        exact: parameters that can be held in `compute` until a stage trains them.
    """
    recipe, config, held = plan.recipe, plan.model, stage.trainable.held
    mesh = build_mesh(stage.layout(dist.get_world_size()), device)
    kernels = recipe.kernels
    options = ModelOptions(
        recipe.model.vocab_multiple,
        kernels.attention,
        kernels.deterministic,
        stage.parallel.overlap,
        kernels.operations,
        kernels.compile,
    )
    pipeline = plan_pipeline(config.num_hidden_layers, stage.parallel)
    model = build_model(config, mesh, compute, options, pipeline, sharding_of(stage.parallel), exact - held)
    rounded = recipe.optimizer.state_dtype == "bfloat16" and compute != torch.float64
    state = torch.bfloat16 if rounded else None
    decayed = [p.name for p in config.parameters if p.decay]
    return model, AdamW(dict(model.named_parameters()), kernels.optimizer, state, recipe.run.seed, decayed, held)


def set_up_stage(model: Decoder, optimizer: AdamW, stage: ResolvedStage) -> None:
    """What of a stage acts on a model that is built."""
    model.set_rope(stage.model.rope)
    model.set_activation_checkpointing(stage.parallel.activation_checkpointing)
    set_trainable(model, optimizer, stage.trainable)


def held_exactly(plan: RunPlan, checkpoint: Path | None, compute: torch.dtype) -> frozenset[str]:
    """Parameters that what they are read from holds in the type of the computation: until they are trained they need no other. Of a model
    from scratch there are none. Collective; rank 0 looks.

    Args:
        checkpoint: what is read; None: the base model.
    """
    if compute == master_dtype(compute) or not any(stage.frozen for stage in plan.stages):
        return frozenset()

    def look() -> frozenset[str]:
        found: dict[str, torch.dtype] = {}
        if checkpoint:
            found = stored_dtypes(checkpoint)
        elif base := plan.recipe.model.pretrained:
            found = {name: DTYPES[dtype] for name, dtype in pretrained_dtypes(plan.base, base).items()}
        return frozenset(name for name, dtype in found.items() if dtype == compute)

    return ask_rank_0(look)
