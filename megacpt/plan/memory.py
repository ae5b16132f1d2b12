"""What a rank takes of its card's memory in a step: a walk over its pipeline actions, by formula. Imports no torch.

What a layer keeps is what the Functions of model/ and parallel/ save; what a step holds besides follows FSDP2: masters and moments of
what is or was trained in shards, weights gathered in the type of the computation, gradients of what is trained in fp32. Within 2 % of the
step itself where both were counted, tensor by tensor: 8B on 8 ranks, 70B on 256, 405B on 8,192 and 16,384, and with frozen layers
(tests/plan/test_step_memory.py). Not in it: CUDA's context, NCCL's buffers and fragmentation, for which `RESERVE_GIB` is left free.

Shapes of a rank: T tokens of a micro-batch over cp, t = T / tp, h hidden, q features of its queries, k of its keys, f of the MLP.
"""

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from megacpt.config.layout import Layout, token_unit
from megacpt.config.sections.parallel import Parallel
from megacpt.config.trainable import Trainable
from megacpt.family.base import (
    ATTENTION_OUTPUT,
    DOWN,
    FIRST_NORM,
    GATE_AND_UP,
    QUERIES_KEYS_VALUES,
    SECOND_NORM,
    STEPS,
    ModelConfig,
)
from megacpt.model.split import PipelinePlan, plan_pipeline
from megacpt.parallel.pipeline.schedule import Schedule
from megacpt.parallel.pipeline.simulate import input_of, lower_to_ops

GIB = 2**30
CARD_GIB = 79.1
"""What torch reports of an 80 GB card (H100, A100)."""
RESERVE_GIB = 4.0
"""Left free for CUDA's context, NCCL's communicators (0.5 GiB for two GPUs: NVIDIA/nccl issue 964) and fragmentation."""
CHUNK_LOGITS = 1 << 29
"""Of the head on a GPU (megacpt_kernels.linear_cross_entropy)."""


@dataclass(frozen=True)
class Job:
    """One stage of a recipe on one layout.

    Attributes:
        parallel: the stage's own, with `micro_batch_tokens` and `activation_checkpointing`.
        reduce: "step" or "micro_batch". width: bytes of an element of the computation. state: bytes of one moment.
        trainable: what is trained, and held for training; None: everything.
        exact: whether what was never trained is held in the type of the computation.
    """

    config: ModelConfig
    parallel: Parallel
    layout: Layout
    seq_len: int
    micro_batches: int
    reduce: str
    vocab_multiple: int = 128
    width: int = 2
    state: int = 4
    trainable: Trainable | None = None
    exact: bool = True

    @property
    def tokens(self) -> int:
        """T."""
        return self.parallel.tokens_at_once // self.layout.context

    @functools.cached_property
    def plan(self) -> PipelinePlan:
        return plan_pipeline(self.config.num_hidden_layers, self.parallel)

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that have gradients."""
        return self.trainable.names if self.trainable else frozenset(self.config.shapes())

    @property
    def held(self) -> frozenset[str]:
        """Names of the parameters that have masters and moments."""
        return self.trainable.held if self.trainable else frozenset(self.config.shapes())

    @functools.cached_property
    def lowest(self) -> int:
        """Where a backward ends: the depth of the lowest trained parameter (`ModelConfig.depth`)."""
        return min(self.config.depth(p) for p in self.config.parameters if p.name in self.trained)

    @functools.cached_property
    def first_trained(self) -> int:
        """The first pipeline stage that has a backward."""
        return min(self.plan.stage_of(p) for p in self.config.parameters if p.name in self.trained)

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule(self.micro_batches, self.first_trained)

    @functools.cached_property
    def _trained_steps(self) -> dict[int, dict[str, set[int]]]:
        """By layer: the steps of which a weight of a product is trained, and those of which anything is."""
        found: dict[int, dict[str, set[int]]] = {}
        for p in self.config.parameters:
            if p.layer is not None and p.name in self.trained:
                steps = found.setdefault(p.layer, {"weights": set(), "all": set()})
                steps["all"].add(p.step)
                if p.role == "matmul":
                    steps["weights"].add(p.step)
        return found

    def trains(self, layer: int | None, step: int, what: str = "weights") -> bool:
        """Whether a weight of a layer's step, or with "all" anything of it, is trained. No layer: one of which everything is."""
        return layer is None or step in self._trained_steps.get(layer, {what: ()})[what]

    @functools.cached_property
    def features(self) -> tuple[int, int, int]:
        """(q, k, f)."""
        config, tensor = self.config, self.parallel.tensor
        keys = max(1, config.num_key_value_heads // tensor) * config.head_dim
        return config.num_attention_heads * config.head_dim // tensor, keys, config.intermediate_size // tensor


@dataclass(frozen=True)
class Peak:
    """Bytes at the fullest moment of a rank's step, by what holds them."""

    rank: int = 0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def gib(self) -> float:
        return sum(self.parts.values()) / GIB

    def __str__(self) -> str:
        shown = {name: size / GIB for name, size in self.parts.items() if size >= 0.05 * GIB}
        return ", ".join(f"{name} {size:.1f}" for name, size in sorted(shown.items(), key=lambda item: -item[1]))


def stage_parameters(
    config: ModelConfig,
    plan: PipelinePlan,
    parallel: Parallel,
    vocab_multiple: int,
    names: Collection[str] | None = None,
) -> list[tuple[int, int]]:
    """(of its layers, of embedding, last norm and head) of each pipeline stage, on one tensor rank, before FSDP shards them.

    Args:
        names: those that count; default all.
    """
    last, layers, ends = len(plan.layers) - 1, [0] * len(plan.layers), [0] * len(plan.layers)
    stage_of = {layer: stage for stage, own in enumerate(plan.layers) for layer in own}
    for parameter in config.parameters:
        if names is not None and parameter.name not in names:
            continue
        size = math.prod(parameter.padded(vocab_multiple))
        if not parameter.is_whole(parallel.tensor):
            size //= parallel.tensor
        if parameter.layer is not None:
            layers[stage_of[parameter.layer]] += size
            continue
        tied = config.tie_word_embeddings and last
        for stage in ({0, last} if tied else {0}) if parameter.role == "lookup" else {last}:
            ends[stage] += size
    return list(zip(layers, ends, strict=True))


def rank_parameters(
    config: ModelConfig,
    plan: PipelinePlan,
    parallel: Parallel,
    vocab_multiple: int,
    names: Collection[str] | None = None,
) -> list[int]:
    """Parameters that each pipeline rank computes with, on one tensor rank, before FSDP shards them. Arguments as above."""
    totals = [0] * plan.ranks
    for stage, (layers, ends) in enumerate(stage_parameters(config, plan, parallel, vocab_multiple, names)):
        totals[plan.placement[stage]] += layers + ends
    counts = names is None or config.embedding in names
    if (
        config.tie_word_embeddings and counts and len(plan.layers) > 1 and not plan.splits_ends
    ):  # both ends use one copy
        totals[plan.placement[0]] -= config.padded_vocab(vocab_multiple) * config.hidden_size // parallel.tensor
    return totals


def kept_bytes(job: Job, mode: str | None = None, layer: int | None = None) -> int:
    """What one layer keeps of one micro-batch from forward to backward: the table of docs/parallel.md.

    An input of products is kept for their weights' gradients, anything else for gradients of what came before it.

    Args:
        mode: of activation checkpointing; default the job's.
        layer: its number; None: one that is trained.
    """
    tokens, local, hidden = job.tokens, job.tokens // job.layout.tensor, job.config.hidden_size
    (q, k, f), width = job.features, job.width
    attention = tokens * (2 * q + 2 * k) * width + 4 * tokens * job.config.num_attention_heads // job.layout.tensor
    mode = mode or job.parallel.activation_checkpointing
    if layer is not None and layer < job.lowest:
        return 0
    if mode == "full":
        return local * hidden * width
    if mode == "selective":  # the block's input, outputs of products (not of the last) and attention
        return 2 * local * hidden * width + attention + 2 * tokens * f * width
    norm, has_gradient = (
        local * hidden * width + 4 * local,
        layer is None or job.lowest < layer,
    )  # a norm's input and 1 / rms
    normed = tokens * (q + k) * (width + 4 / job.config.head_dim) * job.config.has_head_norms
    inputs = {
        QUERIES_KEYS_VALUES: local * hidden,
        ATTENTION_OUTPUT: tokens * q,
        GATE_AND_UP: local * hidden,
        DOWN: tokens * f,
    }
    between = {
        FIRST_NORM: norm,
        QUERIES_KEYS_VALUES: attention + int(normed),
        SECOND_NORM: norm,
        GATE_AND_UP: 2 * tokens * f * width,
    }
    kept = 0
    for step in STEPS:
        attends = step == ATTENTION_OUTPUT and has_gradient  # attention keeps its result already
        kept += inputs.get(step, 0) * width * (job.trains(layer, step) and not attends)
        has_gradient = has_gradient or job.trains(layer, step, "all")
        kept += between.get(step, 0) * has_gradient
    return kept


def peak(job: Job) -> Peak:
    """Of the pipeline rank that needs most."""
    return max((peak_of_rank(job, rank) for rank in range(job.layout.pipeline)), key=lambda found: found.gib)


def peak_of_rank(job: Job, rank: int) -> Peak:
    """The fullest moment of one pipeline rank, on the first of its data, context and tensor ranks."""
    walk = _Walk(job, rank)
    best = Peak(rank)
    for action in job.schedule.ranks[rank]:
        walk.begin(action.kind, action.stage)
        now = Peak(rank, walk.held())
        best = max(best, now, key=lambda found: found.gib)
        walk.end(action.kind, action.stage)
    return best


class _Walk:
    """The memory of a rank between actions."""

    def __init__(self, job: Job, rank: int):
        self.job, self.plan = job, job.plan
        self.last = len(self.plan.layers) - 1
        self.mine = self.plan.of(rank)
        common = job.config, self.plan, job.parallel, job.vocab_multiple
        sizes, trained = stage_parameters(*common), stage_parameters(*common, job.trained)
        self.layers = {stage: sizes[stage][0] for stage in self.mine}
        self.ends = {stage: sizes[stage][1] for stage in self.mine}
        self.layer = max(sizes[s][0] // max(1, len(self.plan.layers[s])) for s in self.mine)
        self.trained_layers = {stage: trained[stage][0] for stage in self.mine}
        self.trained_ends = {stage: trained[stage][1] for stage in self.mine}
        self.trained_layer = max(
            (self._trained_in(layer) for s in self.mine for layer in self.plan.layers[s]), default=0
        )
        self.total, self.trained_total, self.held_total = (
            rank_parameters(*common, names)[rank] for names in (None, job.trained, job.held)
        )
        self.shards = job.layout.data_shard * job.layout.context
        self.root = self.total - sum(self.layers.values())
        holds_lowest = any(job.lowest in self.plan.layers[stage] for stage in self.mine)  # whose input has no gradient
        root = self.trained_total - sum(self.trained_layers.values())
        self.reduced_last = self._trained_in(job.lowest) if holds_lowest else root
        chosen = job.parallel.reshard_after_forward
        self.frees = job.layout.pipeline == 1 if chosen is None else chosen
        self.every = job.reduce == "micro_batch"
        schedule = job.schedule
        actions = schedule.ranks[rank]
        self.left = Counter(action.stage for action in actions if action.kind in "BW")
        self.forwards = Counter(action.stage for action in actions if action.kind == "F")
        self.messages = _most_waiting(schedule, rank) + 1  # and one that is sent
        self.used, self.activations, self.sharded, self.reducing, self.temporary = set(), 0.0, 0.0, 0.0, 0.0
        self.accumulated: dict[int, float] = {}
        self.kept = {stage: self._kept(stage) for stage in self.mine}
        self.deferred = {stage: self._deferred(stage) for stage in self.mine}
        self.start_of = {stage: self._start(stage) for stage in self.mine}

    def _trained_in(self, layer: int) -> int:
        job = self.job
        mine = (p for p in job.config.parameters if p.layer == layer and p.name in job.trained)
        return sum(math.prod(p.shape) // (1 if p.is_whole(job.parallel.tensor) else job.parallel.tensor) for p in mine)

    def held(self) -> dict[str, float]:
        job, hidden, width = self.job, self.job.config.hidden_size, self.job.width
        local, untrained = job.tokens // job.layout.tensor, min(4, width) if job.exact else 4
        return {
            "weights": (4 * self.held_total + untrained * (self.total - self.held_total)) / self.shards,
            "moments": 2 * job.state * self.held_total / self.shards,
            "gathered weights": self._gathered(),
            "activations": self.activations,
            "gradients": self.sharded + sum(self.accumulated.values()) + self.reducing,
            "messages": self.messages * local * hidden * width if job.layout.pipeline > 1 else 0,
            "rotary tables": 4 * job.seq_len * job.config.head_dim,
            "temporary": self.temporary,
        }

    def begin(self, kind: str, stage: int) -> None:
        """To the action's fullest moment."""
        width = self.job.width
        self.used.add(stage)
        if kind == "F":
            self.activations += self.kept[stage]
            self.temporary = self._gathered_keys() * bool(self.layers[stage])
            return
        start = self.start_of[stage]
        if kind == "I":
            self.temporary = start
            return
        self.left[stage] -= 1
        layers, ends = self.trained_layers[stage], self.trained_ends[stage]
        freed = self.kept[stage] if kind == "B" else self.deferred[stage]
        done = -freed + (0.35 * self.trained_layer if self.layers[stage] else ends) * width
        if self.every:
            done = self.trained_layer * (width + 8) - freed
        elif stage not in self.accumulated:  # a stage's fp32 gradients appear with its first backward
            done += 4.0 * (layers + ends)
        if not self.every and not self.left[stage]:
            done = max(done, 4.0 * self.trained_layer * bool(layers) - freed)
        self.temporary = max(start if kind == "B" else 0, done)

    def end(self, kind: str, stage: int) -> None:
        """Past the action."""
        self.temporary = 0.0
        if kind == "F":
            self.forwards[stage] -= 1
            return
        if kind == "I":
            self.activations -= self.kept[stage] - self.deferred[stage]
            return
        self.activations -= self.kept[stage] if kind == "B" else self.deferred[stage]
        layers = 4.0 * self.trained_layers[stage]
        if self.every:  # FSDP keeps the input of the last reduction until the next
            self.sharded, self.reducing = 4.0 * self.trained_total / self.shards, 4.0 * self.reduced_last
            return
        self.reducing = 0.0
        self.accumulated.setdefault(stage, layers + 4.0 * self.trained_ends[stage])
        if not self.left[stage]:
            self.accumulated[stage] -= layers
            self.sharded += layers / self.shards
            self.reducing = 4.0 * self.trained_layer * bool(layers)

    def _gathered(self) -> float:
        """Weights in the type of the computation, of the stages that have run; with FSDP freeing them, two layers and the ends."""
        width = self.job.width
        if self.frees:
            ends = sum(self.ends[stage] for stage in self.used)
            return (min(ends, self.root) + 2 * self.layer) * width

        def needed_again(s: int) -> int:
            return self.left[s] if s >= self.job.first_trained else self.forwards[s]

        alive = sum(self.layers[s] * bool(self.every or needed_again(s)) + self.ends[s] for s in self.used)
        return min(alive, self.total) * width

    def _kept(self, stage: int) -> float:
        """What a stage keeps of a micro-batch: its layers, the final norm's, and with the rank's first stage the inputs."""
        job, tokens, local = self.job, self.job.tokens, self.job.tokens // self.job.layout.tensor
        if stage < job.first_trained:
            return 0
        kept = sum(kept_bytes(job, None, layer) for layer in self.plan.layers[stage])
        if stage == 0:
            kept += 8 * tokens
        if stage == self.last:
            kept += 2 * local * job.config.hidden_size * job.width + 4 * local
        if stage == self.mine[0]:
            kept += 36 * tokens + (24 * job.parallel.tokens_at_once if job.layout.context > 1 else 0)
        return kept

    def _deferred(self, stage: int) -> float:
        """What a split backward keeps for the weights' gradients: inputs of the products, and their gradients."""
        job, tokens, local = self.job, self.job.tokens, self.job.tokens // self.job.layout.tensor
        (q, _, f), hidden = job.features, job.config.hidden_size
        inputs = {
            QUERIES_KEYS_VALUES: local * hidden,
            ATTENTION_OUTPUT: tokens * q,
            GATE_AND_UP: local * hidden,
            DOWN: tokens * f,
        }
        kept = 0
        for layer in self.plan.layers[stage]:
            kept += sum(size for step, size in inputs.items() if job.trains(layer, step))
            kept += tokens * hidden * (job.trains(layer, ATTENTION_OUTPUT) + job.trains(layer, DOWN))
        for p in job.config.parameters:  # column-parallel: features of this rank
            if (
                p.layer in self.plan.layers[stage]
                and p.name in job.trained
                and (p.role, p.split) == ("matmul", "column")
            ):
                kept += tokens * (p.unit if p.is_whole(job.parallel.tensor) else p.shape[0] // job.parallel.tensor)
        return job.width * kept

    def _gathered_keys(self) -> float:
        """Gathered K and V and the rank's slices of them."""
        job = self.job
        return 8 * job.parallel.tokens_at_once * job.features[1] * job.width if job.layout.context > 1 else 0

    def _start(self, stage: int) -> float:
        """Temporaries of a backward's fullest moment before its weights' gradients are put away."""
        backward = self._backward() * bool(self.layers[stage])
        if stage != self.last:
            return backward
        freed = (
            2 * self.layer * self.job.width * self.frees
        )  # no layer's weights are gathered while the loss is computed
        return max(backward, self._loss() - freed)

    def _backward(self) -> float:
        """Temporaries of one layer's backward: gathered gradient and tokens, gradients of features, the weights' own gradients, and
        what a recomputation brings back."""
        job, tokens, hidden, width = self.job, self.job.tokens, self.job.config.hidden_size, self.job.width
        q, k, f = job.features
        wide = tokens * hidden * width if job.layout.tensor > 1 else 0
        mlp = 2 * wide + 2 * tokens // job.layout.tensor * hidden * width + 3 * tokens * f * width
        attention = wide + tokens * (3 * q + 2 * k) * width + self._gathered_keys()
        return max(mlp, attention) + self.trained_layer * width + max(0, kept_bytes(job, "none") - kept_bytes(job))

    def _loss(self) -> float:
        """Head and loss: a piece of the logits, the head's gradient, gathered tokens."""
        job, tokens, tensor = self.job, self.job.tokens, self.job.layout.tensor
        hidden, width = job.config.hidden_size, job.width
        rows = job.config.padded_vocab(job.vocab_multiple) // tensor
        piece = min(tokens, max(64 // tensor * tensor, CHUNK_LOGITS // rows))
        gathered = 2 * piece * hidden * width if tensor > 1 else 0
        name = job.config.embedding if job.config.tie_word_embeddings else job.config.family.head
        head = rows * hidden * (4 if piece < tokens else width) * (name in job.trained)
        before = any(p.name in job.trained for p in job.config.parameters if p.name != name)
        return piece * rows * width + head + gathered + tokens // tensor * hidden * width * before


def _most_waiting(schedule: Schedule, rank: int) -> int:
    """Most receives that a rank's program has posted and not used."""
    waiting = most = 0
    for op in lower_to_ops(schedule, rank):
        if op.kind == "receive":
            waiting += 1
            most = max(most, waiting)
        elif op.kind == "run" and (tensor := input_of(op.action, schedule)):
            waiting -= schedule.placement[tensor[1]] != rank
    return most


def remedies(job: Job, card_gib: float) -> list[str]:
    """What would bring a job under a card's memory: up to three keys with the need under each, the least change first."""
    found = [(text, peak(other).gib) for text, other in _alternatives(job)]
    fitting = [f"{text} ({gib:.1f} GiB)" for text, gib in found if gib + RESERVE_GIB <= card_gib]
    return fitting[:3]


def _alternatives(job: Job) -> Iterable[tuple[str, Job]]:
    modes = ["none", "selective", "full"]
    own = job.parallel.activation_checkpointing
    smaller = _smaller_micro_batch(job)
    for mode in modes[modes.index(own) :]:
        changed = replace(job, parallel=job.parallel.model_copy(update={"activation_checkpointing": mode}))
        words = [] if mode == own else [f'activation_checkpointing = "{mode}"']
        if words:
            yield words[0], changed
        if smaller:
            tokens = {"micro_batch_tokens": smaller}
            more = replace(
                changed, parallel=changed.parallel.model_copy(update=tokens), micro_batches=_more_micro_batches(job, smaller)
            )  # fmt: skip
            yield " and ".join([*words, f"micro_batch_tokens = {smaller}"]), more
    if job.state == 4:
        yield 'optimizer.state_dtype = "bfloat16"', replace(job, state=2)
    if job.reduce == "step":
        yield 'precision.reduce = "micro_batch"', replace(job, reduce="micro_batch")
    wider = replace(job.layout, data_shard=2 * job.layout.data_shard)
    yield f"{wider.world_size} GPUs", replace(job, layout=wider, micro_batches=-(-job.micro_batches // 2))


def _smaller_micro_batch(job: Job) -> int | None:
    """Half of the rows, if there is more than one."""
    rows = job.parallel.tokens_at_once // job.seq_len
    half = rows // 2 * job.seq_len
    return half if rows > 1 and half % token_unit(job.layout.tensor, job.layout.context) == 0 else None


def _more_micro_batches(job: Job, micro_batch_tokens: int) -> int:
    return -(-job.micro_batches * job.parallel.tokens_at_once // micro_batch_tokens)
