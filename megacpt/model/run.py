"""Runs a model on micro-batches under any layout: with gradients for a step, without for losses. One process is a pipeline
of one rank and one stage: the same lines."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from megacpt import heartbeat
from megacpt.data.loader import Batch, StepCounts
from megacpt.errors import ConfigError
from megacpt.family.base import ModelConfig
from megacpt.model.decoder import Decoder, Inputs
from megacpt.model.inputs import to_inputs
from megacpt.objective.base import Objective
from megacpt.objective.next_token import NEXT_TOKEN
from megacpt.parallel import fsdp
from megacpt.parallel.pipeline.runtime import execute
from megacpt.parallel.pipeline.schedule import Action, Schedule
from megacpt.parallel.sharded import local_part
from megacpt.parallel.tensor import DeferredWeightGrads, compute_deferred, sum_replicated_gradients


def forward_backward(
    model: Decoder,
    micro_batches: Sequence[Batch],
    counts: StepCounts,
    reduce: str,
    objective: Objective = NEXT_TOKEN,
) -> Tensor:
    """Accumulates the gradients of the step's loss. Returns the objective's sums, the loss first, [len(objective.sums)] on the device,
    summed over ranks and divided by the step's normaliser.

    Args:
        counts: of the whole step over all ranks; each micro-batch's sums are divided by what the objective makes of them.
        reduce: "step" reduces gradients with a stage's last micro-batch, "micro_batch" with each.
    """
    schedule = model.plan.schedule(len(micro_batches), model.first_trained)
    scale = 1.0 / objective.normalizer(counts)
    work = _Gradients(model, schedule, micro_batches, objective, scale, reduce == "micro_batch")
    execute(schedule, work, model.mesh)
    fsdp.finish(model, model.all_blocks(), model.sharding)
    sum_replicated_gradients(list(model.parameters()), model.mesh.tensor_group)
    sum_tied_gradients(model)
    return model.mesh.sum_over_tokens(work.total)


@torch.no_grad()
def forward_losses(
    model: Decoder, count: int, batch_of: Callable[[int], Batch], use: Callable[[int, Inputs, Tensor, Tensor], None]
) -> None:
    """Forward only: `use(i, inputs, losses, right)` for each of `count` micro-batches, on the ranks of the last stage.

    Args:
        batch_of: makes a micro-batch by its number.
        use: losses are [T], 0 without label; right, bool [T], where the label is the most probable.
    """
    schedule = model.plan.schedule(count).forward_only()
    execute(schedule, _Losses(model, schedule, batch_of, use), model.mesh)
    fsdp.free_weights([model, *model.all_blocks()])


def sum_tied_gradients(model: Decoder) -> None:
    """Adds the gradients of the embedding on the first rank and of its copy, the head, on the last."""
    table = dict(model.named_parameters()).get(model.config.embedding)
    if model.config.tie_word_embeddings and model.plan.splits_ends and table is not None and table.requires_grad:
        assert table.grad is not None, f"{model.config.embedding} has no gradient on an end of the pipeline"
        dist.all_reduce(local_part(table.grad), group=model.mesh.ends)


def _within_window(batch: Batch, config: ModelConfig) -> None:
    """Raises:
    ConfigError: if a document is longer than what the model's tokens see: attention here is full.
    """
    longest = max(np.diff(np.append(batch.document_starts, batch.tokens.size)))
    if problem := config.window_problem(longest):
        raise ConfigError([f"a document of {longest} tokens: {problem}"], "the data")


class _Work:
    """Inputs of micro-batches, from this rank's first use of one to its last."""

    def __init__(self, model: Decoder, schedule: Schedule, batch_of: Callable[[int], Batch]):
        self.model, self.dtype, self.batch_of = model, model.compute, batch_of
        self.last_stage = schedule.num_stages - 1
        self.uses = Counter(action.micro_batch for action in schedule.ranks[model.mesh.pipeline_rank])
        self.inputs: dict[int, Inputs] = {}

    def inputs_of(self, micro_batch: int) -> Inputs:
        if micro_batch not in self.inputs:
            batch = self.batch_of(micro_batch)
            if isinstance(batch, Batch):  # of a run that trains, rows within the window were asked for before it began
                _within_window(batch, self.model.config)
            self.inputs[micro_batch] = to_inputs(batch, self.model.mesh)
        return self.inputs[micro_batch]

    def used(self, micro_batch: int) -> None:
        self.uses[micro_batch] -= 1
        if not self.uses[micro_batch]:
            self.inputs.pop(micro_batch, None)

    def shape(self, micro_batch: int) -> tuple[int, int]:
        tokens = len(self.inputs_of(micro_batch).tokens)
        return tokens // self.model.mesh.layout.tensor, self.model.config.hidden_size


class _Gradients(_Work):
    def __init__(
        self,
        model: Decoder,
        schedule: Schedule,
        micro_batches: Sequence[Batch],
        objective: Objective,
        scale: float,
        every_micro_batch: bool,
    ):
        super().__init__(model, schedule, micro_batches.__getitem__)
        mine = schedule.ranks[model.mesh.pipeline_rank]
        self.split = any(action.kind == "W" for action in mine)
        self.left = Counter(action.stage for action in mine if action.kind in "BW")
        self.first_trained = schedule.first_trained
        self.forwards = Counter(action.stage for action in mine if action.kind == "F")
        self.objective, self.scale, self.every_micro_batch = objective, scale, every_micro_batch
        wide = torch.float64 if model.compute == torch.float64 else torch.float32
        self.total = torch.zeros(len(objective.sums), dtype=wide, device=model.mesh.device)
        self.graphs: dict[tuple[int, int], tuple] = {}
        self.later: dict[tuple[int, int], DeferredWeightGrads] = {}
        if every_micro_batch:
            fsdp.sync_gradients([model], True)

    def run(self, action: Action, received: Tensor | None) -> Tensor | None:
        result = getattr(self, {"F": "_forward", "W": "_weights"}.get(action.kind, "_backward"))(action, received)
        self.used(action.micro_batch)
        heartbeat.reach("after_forward" if action.kind == "F" else "after_backward")
        return result

    def _forward(self, action: Action, received: Tensor | None) -> Tensor | None:
        if action.stage < self.first_trained:
            return self._forward_only(action, received)
        key = action.stage, action.micro_batch
        x = None if received is None else received.detach().requires_grad_(action.stage > self.first_trained)
        if self.split:
            self.later[key] = DeferredWeightGrads()
        out = self.model(action.stage, x, self.inputs_of(action.micro_batch), self.later.get(key))
        if action.stage == self.last_stage:
            self.graphs[key] = x, out
            return None
        self.graphs[key] = x, get_gradient_edge(out)  # the graph without its output: that goes to the next stage
        return out.detach()

    @torch.no_grad()
    def _forward_only(self, action: Action, received: Tensor | None) -> Tensor:
        """Of a stage below all that is trained: nothing waits for a backward, and its weights go with its last micro-batch."""
        out = self.model(action.stage, received, self.inputs_of(action.micro_batch))
        self.forwards[action.stage] -= 1
        if not self.forwards[action.stage]:
            fsdp.free_weights(self.model.blocks(action.stage))
        return out

    def _backward(self, action: Action, received: Tensor | None) -> Tensor | None:
        """All gradients, or with a split backward those of the inputs. The last stage runs head and loss first."""
        if action.kind == "B":
            self._sync(action.stage)
        x, out = self.graphs.pop((action.stage, action.micro_batch))
        if action.stage == self.last_stage:
            self._loss(out, self.inputs_of(action.micro_batch)).backward()
        else:
            torch.autograd.backward([out], [received])
        return None if x is None else x.grad

    def _loss(self, out: Tensor, inputs: Inputs) -> Tensor:
        """What has the gradient of the micro-batch's loss; adds its sums to the step's."""
        log_p = self.model.log_probs(out, inputs) if self.objective.needs_log_probs else None
        weighted = self.objective.weights(log_p, inputs, self.model.mesh.context_group)
        loss = self.model.loss(out, inputs, weighted.weights, self.scale)
        sums = loss.detach().view(1) if weighted.sums is None else weighted.sums * self.scale
        assert sums.shape == self.total.shape, f"{tuple(sums.shape)} sums for the names {self.objective.sums}"
        self.total += sums
        return loss

    def _weights(self, action: Action, received: None) -> None:
        self._sync(action.stage)
        compute_deferred(self.later.pop((action.stage, action.micro_batch)))
        blocks = self.model.blocks(action.stage)
        fsdp.take_gradients(blocks)
        fsdp.sync_gradients(blocks, False)

    def _sync(self, stage: int) -> None:
        """The gradients that come now are the stage's last, or are reduced with every micro-batch."""
        self.left[stage] -= 1
        last = not self.left[stage]
        if last:
            fsdp.free_after_backward(self.model.blocks(stage))
        if last or self.every_micro_batch:
            fsdp.sync_gradients(self.model.blocks(stage), True)


class _Losses(_Work):
    def __init__(self, model: Decoder, schedule: Schedule, batch_of: Callable[[int], Batch], use: Callable):
        super().__init__(model, schedule, batch_of)
        self.use = use

    def run(self, action: Action, received: Tensor | None) -> Tensor | None:
        inputs = self.inputs_of(action.micro_batch)
        out = self.model(action.stage, received, inputs)
        if action.stage == self.last_stage:
            self.use(action.micro_batch, inputs, *self.model.token_losses(out, inputs))
            out = None
        self.used(action.micro_batch)
        heartbeat.reach("evaluate")
        return out
