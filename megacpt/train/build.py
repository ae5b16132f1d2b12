"""Model and optimizer of a stage of the plan, on this rank."""

import torch
import torch.distributed as dist

from megacpt.config.resolve import ResolvedStage, RunPlan
from megacpt.model.build import build_model, sharding_of
from megacpt.model.decoder import Decoder, ModelOptions
from megacpt.model.split import plan_pipeline
from megacpt.optim.adamw import AdamW
from megacpt.parallel.mesh import build_mesh


def build(plan: RunPlan, stage: ResolvedStage, compute: torch.dtype, device: torch.device) -> tuple[Decoder, AdamW]:
    """Model and optimizer for a stage's layout, without values."""
    recipe, config = plan.recipe, plan.model
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
    model = build_model(config, mesh, compute, options, pipeline, sharding_of(stage.parallel))
    rounded = recipe.optimizer.state_dtype == "bfloat16" and compute != torch.float64
    state = torch.bfloat16 if rounded else None
    decayed = [p.name for p in config.parameters if p.decay]
    return model, AdamW(dict(model.named_parameters()), kernels.optimizer, state, recipe.run.seed, decayed)


def set_up_stage(model: Decoder, optimizer: AdamW, stage: ResolvedStage) -> None:
    """What of a stage acts on a model that is built."""
    model.set_rope(stage.model.rope)
    model.set_activation_checkpointing(stage.parallel.activation_checkpointing)
