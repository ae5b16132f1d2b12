"""What a rank takes of its card's memory in a step: a walk over its pipeline actions, by formula. Imports no torch.

What a layer keeps is what the Functions of model/ and parallel/ save; what a step holds besides follows FSDP2: masters and moments in
shards, weights gathered in the type of the computation, gradients in fp32. Within 2 % of the step itself where both were counted, tensor by
tensor: 8B on 8 ranks, 70B on 256, 405B on 8,192 and 16,384 (tests/plan/test_step_memory.py). Not in it: CUDA's context, NCCL's buffers and
fragmentation, for which `RESERVE_GIB` is left free.

Shapes of a rank: T tokens of a micro-batch over cp, t = T / tp, h hidden, q features of its queries, k of its keys, f of the MLP.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megacpt.config.layout import Layout, token_unit
from megacpt.config.sections.parallel import Parallel
from megacpt.family.base import ModelConfig
from megacpt.model.split import PipelinePlan, plan_pipeline
from megacpt.parallel.pipeline.schedule import Schedule
from megacpt.parallel.pipeline.simulate import lower, needed

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

    @property
    def tokens(self) -> int:
        """T."""
        return self.parallel.tokens_at_once // self.layout.context

    @property
    def plan(self) -> PipelinePlan:
        return plan_pipeline(self.config.num_hidden_layers, self.parallel)

    @property
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
    config: ModelConfig, plan: PipelinePlan, parallel: Parallel, vocab_multiple: int
) -> list[tuple[int, int]]:
    """(of its layers, of embedding, last norm and head) of each pipeline stage, on one tensor rank, before FSDP shards them."""
    last, layers, ends = len(plan.layers) - 1, [0] * len(plan.layers), [0] * len(plan.layers)
    for parameter in config.parameters:
        size = math.prod(parameter.padded(vocab_multiple))
        if not parameter.is_whole(parallel.tensor):
            size //= parallel.tensor
        if parameter.layer is not None:
            layers[next(stage for stage, own in enumerate(plan.layers) if parameter.layer in own)] += size
            continue
        tied = config.tie_word_embeddings and last
        for stage in ({0, last} if tied else {0}) if parameter.role == "lookup" else {last}:
            ends[stage] += size
    return list(zip(layers, ends, strict=True))


def rank_parameters(config: ModelConfig, plan: PipelinePlan, parallel: Parallel, vocab_multiple: int) -> list[int]:
    """Parameters that each pipeline rank computes with, on one tensor rank, before FSDP shards them."""
    totals = [0] * plan.ranks
    for stage, (layers, ends) in enumerate(stage_parameters(config, plan, parallel, vocab_multiple)):
        totals[plan.placement[stage]] += layers + ends
    if config.tie_word_embeddings and len(plan.layers) > 1 and not plan.splits_ends:  # both ends use one copy
        totals[plan.placement[0]] -= config.padded_vocab(vocab_multiple) * config.hidden_size // parallel.tensor
    return totals


def kept_bytes(job: Job, mode: str | None = None) -> int:
    """What one layer keeps of one micro-batch from forward to backward: the table of docs/parallel.md.

    Args:
        mode: of activation checkpointing; default the job's.
    """
    tokens, local, hidden = job.tokens, job.tokens // job.layout.tensor, job.config.hidden_size
    (q, k, f), width = job.features, job.width
    attention = tokens * (2 * q + 2 * k) * width + 4 * tokens * job.config.num_attention_heads // job.layout.tensor
    match mode or job.parallel.activation_checkpointing:
        case "none":  # inputs of two norms and of what follows them; attention; gate, up and their product; two 1 / rms
            normed = tokens * (q + k) * (width + 4 / job.config.head_dim) * job.config.has_head_norms
            return 4 * local * hidden * width + attention + 3 * tokens * f * width + 8 * local + int(normed)
        case "selective":  # the block's input, outputs of products (not of the last) and attention
            return 2 * local * hidden * width + attention + 2 * tokens * f * width
    return local * hidden * width


def peak(job: Job) -> Peak:
    """Of the pipeline rank that needs most."""
    return max((peak_of_rank(job, rank) for rank in range(job.layout.pipeline)), key=lambda found: found.gib)


def peak_of_rank(job: Job, rank: int) -> Peak:
    """The fullest moment of one pipeline rank, on the first of its data, context and tensor ranks."""
    walk = _Walk(job, rank)
    best = Peak(rank)
    for action in job.plan.schedule(job.micro_batches).ranks[rank]:
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
        sizes = stage_parameters(job.config, self.plan, job.parallel, job.vocab_multiple)
        self.layers = {stage: sizes[stage][0] for stage in self.mine}
        self.ends = {stage: sizes[stage][1] for stage in self.mine}
        self.layer = max(sizes[s][0] // max(1, len(self.plan.layers[s])) for s in self.mine)
        total = rank_parameters(job.config, self.plan, job.parallel, job.vocab_multiple)[rank]
        self.shards, self.total = job.layout.data_shard * job.layout.context, total
        self.root = total - sum(self.layers.values())
        chosen = job.parallel.reshard_after_forward
        self.frees = job.layout.pipeline == 1 if chosen is None else chosen
        self.every = job.reduce == "micro_batch"
        schedule = self.plan.schedule(job.micro_batches)
        actions = schedule.ranks[rank]
        self.left = Counter(action.stage for action in actions if action.kind in "BW")
        self.messages = _most_waiting(schedule, rank) + 1  # and one that is sent
        self.used, self.activations, self.sharded, self.reducing, self.temporary = set(), 0.0, 0.0, 0.0, 0.0
        self.accumulated: dict[int, float] = {}

    def held(self) -> dict[str, float]:
        job, hidden, width = self.job, self.job.config.hidden_size, self.job.width
        local = job.tokens // job.layout.tensor
        return {
            "weights": 4 * self.total / self.shards,
            "moments": 2 * job.state * self.total / self.shards,
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
            self.activations += self._kept(stage)
            self.temporary = self._gathered_keys() * bool(self.layers[stage])
            return
        start = max(self._backward() * bool(self.layers[stage]), self._loss() if stage == self.last else 0)
        if kind == "I":
            self.temporary = start
            return
        self.left[stage] -= 1
        freed = self._kept(stage) if kind == "B" else self._deferred(stage)
        done = -freed + (0.35 * self.layer if self.layers[stage] else self.ends[stage]) * width
        if self.every:
            done = self.layer * (width + 8) - freed
        elif stage not in self.accumulated:  # a stage's fp32 gradients appear with its first backward
            done += 4.0 * (self.layers[stage] + self.ends[stage])
        if not self.every and not self.left[stage]:
            done = max(done, 4.0 * self.layer * bool(self.layers[stage]) - freed)
        self.temporary = max(start if kind == "B" else 0, done)

    def end(self, kind: str, stage: int) -> None:
        """Past the action."""
        self.temporary = 0.0
        if kind == "F":
            return
        if kind == "I":
            self.activations -= self._kept(stage) - self._deferred(stage)
            return
        self.activations -= self._kept(stage) if kind == "B" else self._deferred(stage)
        layers = 4.0 * self.layers[stage]
        if self.every:  # FSDP keeps the input of the last reduction until the next
            self.sharded, self.reducing = 4.0 * self.total / self.shards, 4.0 * self.root
            return
        self.reducing = 0.0
        self.accumulated.setdefault(stage, layers + 4.0 * self.ends[stage])
        if not self.left[stage]:
            self.accumulated[stage] -= layers
            self.sharded += layers / self.shards
            self.reducing = 4.0 * self.layer * bool(layers)

    def _gathered(self) -> float:
        """Weights in the type of the computation, of the stages that have run; with FSDP freeing them, two layers and the ends."""
        width = self.job.width
        if self.frees:
            ends = sum(self.ends[stage] for stage in self.used)
            return (min(ends, self.root) + 2 * self.layer) * width
        alive = sum(self.layers[s] * bool(self.every or self.left[s]) + self.ends[s] for s in self.used)
        return min(alive, self.total) * width

    def _kept(self, stage: int) -> float:
        """What a stage keeps of a micro-batch: its layers, the final norm's, and with the rank's first stage the inputs."""
        job, tokens, local = self.job, self.job.tokens, self.job.tokens // self.job.layout.tensor
        kept = len(self.plan.layers[stage]) * kept_bytes(job)
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
        (q, k, f), hidden = job.features, job.config.hidden_size
        return len(self.plan.layers[stage]) * job.width * (
            2 * local * hidden + tokens * (q + f) + tokens * (q + 2 * k + 2 * f + 2 * hidden)
        )  # fmt: skip

    def _gathered_keys(self) -> float:
        """Gathered K and V and the rank's slices of them."""
        job = self.job
        return 8 * job.parallel.tokens_at_once * job.features[1] * job.width if job.layout.context > 1 else 0

    def _backward(self) -> float:
        """Temporaries of one layer's backward: gathered gradient and tokens, gradients of features, the weights' own gradients, and
        what a recomputation brings back."""
        job, tokens, hidden, width = self.job, self.job.tokens, self.job.config.hidden_size, self.job.width
        q, k, f = job.features
        wide = tokens * hidden * width if job.layout.tensor > 1 else 0
        mlp = 2 * wide + 2 * tokens // job.layout.tensor * hidden * width + 3 * tokens * f * width
        attention = wide + tokens * (3 * q + 2 * k) * width + self._gathered_keys()
        return max(mlp, attention) + self.layer * width + max(0, kept_bytes(job, "none") - kept_bytes(job))

    def _loss(self) -> float:
        """Head and loss: a piece of the logits, the head's gradient, gathered tokens."""
        job, tokens, tensor = self.job, self.job.tokens, self.job.layout.tensor
        hidden, width = job.config.hidden_size, job.width
        rows = job.config.padded_vocab(job.vocab_multiple) // tensor
        piece = min(tokens, max(64 // tensor * tensor, CHUNK_LOGITS // rows))
        gathered = 2 * piece * hidden * width if tensor > 1 else 0
        head = rows * hidden * (4 if piece < tokens else width)
        return piece * rows * width + head + gathered + tokens // tensor * hidden * width


def _most_waiting(schedule: Schedule, rank: int) -> int:
    """Most receives that a rank's program has posted and not used."""
    waiting = most = 0
    for op in lower(schedule, rank):
        if op.kind == "receive":
            waiting += 1
            most = max(most, waiting)
        elif op.kind == "run" and (tensor := needed(op.action, schedule)):
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
