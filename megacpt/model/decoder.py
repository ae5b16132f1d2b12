"""The decoder on the parallel layers: one for all families. What a family adds (biases, norms of heads) is there where its table has the
parameter. Parameter names are Hugging Face's; layers carry their global index.

Shapes: T tokens of a micro-batch on this cp rank (all rows one after another), t = T / tp local tokens, h hidden, heads and kv_heads
of this tp rank, d head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megacpt_kernels import add_rms_norm, rms_norm, rope_qk, swiglu
from torch import Tensor, nn

from megacpt.family.base import ModelConfig
from megacpt.family.rope import RopeConfig
from megacpt.model.rope import RopeTables
from megacpt.model.split import PipelinePlan
from megacpt.parallel.context import ContextPlan, Gather, context_attention
from megacpt.parallel.cross_entropy import linear_cross_entropy, log_probs, token_losses
from megacpt.parallel.fsdp import Sharding
from megacpt.parallel.items import Items
from megacpt.parallel.mesh import Mesh
from megacpt.parallel.recompute import Kept
from megacpt.parallel.tensor import (
    DeferredWeightGrads,
    NamedParameter,
    TensorAxis,
    column_parallel,
    embedding,
    local_with_grad,
    outside_graphs,
    row_parallel,
)


@dataclass(frozen=True)
class ModelOptions:
    """How a model is run, beside its shape."""

    vocab_multiple: int = 128
    attention_backend: str = "auto"
    deterministic: bool = False
    overlap: str = "none"
    operations: str = "auto"
    compile: bool = False


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device.

    Attributes:
        tokens: int64 [T]. labels: int64 [T], -100 without. positions: int32 [T].
        plan: documents, and under context parallelism whose keys. longest: rows of the rotary tables that are needed.
        weights: float32 [T], how heavy each label is in the loss, 0 without. items: what the documents belong to.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    plan: ContextPlan
    longest: int
    weights: Tensor
    items: Items


Rotary = tuple[Tensor, Tensor, Tensor]
"""cos and sin fp32 [positions, d / 2], and each token's position int32 [T]."""


class Table:
    """Makes the places of a model's parameters, as its family's table says.

    Attributes:
        axis: the tensor axis that all of them are on.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype_of: Callable[[str], torch.dtype], options: ModelOptions):
        self.config, self.mesh, self.dtype_of, self.vocab_multiple = (
            config,
            mesh.tensor,
            dtype_of,
            options.vocab_multiple,
        )
        self.axis = TensorAxis(mesh.tensor_group, options.overlap)
        self.parameters = {parameter.name: parameter for parameter in config.parameters}

    def place(self, module: str) -> NamedParameter:
        """For `module`.weight and .bias."""
        weight, bias = self.parameters[f"{module}.weight"], self.parameters.get(f"{module}.bias")
        return NamedParameter(weight, bias, self.vocab_multiple, self.mesh, self.dtype_of)

    def optional_place(self, module: str) -> NamedParameter | None:
        """The same; None if the table has no such weight."""
        return self.place(module) if f"{module}.weight" in self.parameters else None


class Attention(nn.Module):
    def __init__(self, name: str, table: Table, mesh: Mesh, options: ModelOptions):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (table.place(f"{name}.{letter}_proj") for letter in "qkv")
        self.o_proj = table.place(f"{name}.o_proj")
        self.q_norm, self.k_norm = table.optional_place(f"{name}.q_norm"), table.optional_place(f"{name}.k_norm")
        self.head_dim, self.eps, self.options = table.config.head_dim, table.config.rms_norm_eps, options
        self.axis, self.context_group = table.axis, mesh.context_group

    @outside_graphs  # collectives between its products: it stays outside the graphs of a compiled block
    def forward(self, x: Tensor, rotary: Rotary, gather: Gather, later: DeferredWeightGrads | None) -> Tensor:
        options, kept = self.options, gather.kept

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(1, (-1, self.head_dim))

        def rotated(k: Tensor) -> Tensor:
            return rope_qk(k[:, :0], self._normed(k, self.k_norm), *rotary, backend=options.operations)[1]

        made = [self.k_proj, self.v_proj, self.q_proj]
        start = (2, lambda k, v: gather.start(heads(k), heads(v), rotated))  # travels while the queries are computed
        k, v, q = map(heads, column_parallel(x, made, self.axis, later, start, kept))
        q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        q, k = rope_qk(q, k, *rotary, backend=options.operations)
        out = context_attention(q, k, v, gather, options.attention_backend, options.deterministic)
        return row_parallel(out.flatten(1), self.o_proj, self.axis, later, gather.start_again, kept)

    def _normed(self, heads: Tensor, norm: NamedParameter | None) -> Tensor:
        """[T, heads, d], each head divided by its root mean square, times the weight that all heads and ranks share."""
        if norm is None:
            return heads
        rows = rms_norm(heads.flatten(0, 1), local_with_grad(norm.weight), self.eps, self.options.operations)
        return rows.view_as(heads)


class MLP(nn.Module):
    def __init__(self, name: str, table: Table, options: ModelOptions):
        super().__init__()
        self.gate_proj, self.up_proj = table.place(f"{name}.gate_proj"), table.place(f"{name}.up_proj")
        self.down_proj = table.place(f"{name}.down_proj")
        self.axis, self.operations = table.axis, options.operations

    def forward(self, x: Tensor, kept: Kept, later: DeferredWeightGrads | None) -> Tensor:
        gate, up = column_parallel(x, [self.gate_proj, self.up_proj], self.axis, later, kept=kept)
        hidden = swiglu(gate, up, self.operations)
        return row_parallel(hidden, self.down_proj, self.axis, later, kept=kept, last=True)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), on [t, h]."""

    def __init__(self, name: str, table: Table, mesh: Mesh, options: ModelOptions):
        super().__init__()
        self.input_layernorm = table.place(f"{name}.input_layernorm")
        self.self_attn = Attention(f"{name}.self_attn", table, mesh, options)
        self.post_attention_layernorm = table.place(f"{name}.post_attention_layernorm")
        self.mlp = MLP(f"{name}.mlp", table, options)
        self.eps, self.operations = table.config.rms_norm_eps, options.operations
        self.run = torch.compile(self._run) if options.compile else self._run
        self.recompute = "none"

    def _run(self, x: Tensor, rotary: Rotary, gather: Gather, later: DeferredWeightGrads | None) -> Tensor:
        before, after = (
            local_with_grad(self.input_layernorm.weight),
            local_with_grad(self.post_attention_layernorm.weight),
        )
        out = self.self_attn(rms_norm(x, before, self.eps, self.operations), rotary, gather, later)
        normed, x = add_rms_norm(out, x, after, self.eps, self.operations)
        return x + self.mlp(normed, gather.kept, later)

    def forward(self, x: Tensor, rotary: Rotary, plan: ContextPlan, later: DeferredWeightGrads | None) -> Tensor:
        kept = Kept(self.recompute)
        return kept.run(self.run, x, rotary, Gather(plan, self.self_attn.context_group, kept), later)


class Trunk(nn.Module):
    """Holds the parameters under Hugging Face's prefix `model.`, those of this rank's stages; `Decoder` runs them."""

    def __init__(self, table: Table, mesh: Mesh, options: ModelOptions, plan: PipelinePlan):
        super().__init__()
        stages = plan.of(mesh.pipeline_rank)
        is_first, is_last = 0 in stages, len(plan.layers) - 1 in stages
        if is_first or (is_last and table.config.tie_word_embeddings):
            self.embed_tokens = table.place("model.embed_tokens")
        layers = [i for stage in stages for i in plan.layers[stage]]
        self.layers = nn.ModuleDict({str(i): Block(f"model.layers.{i}", table, mesh, options) for i in layers})
        if is_last:
            self.norm = table.place("model.norm")

    def blocks(self) -> dict[int, Block]:
        """By the number of the layer."""
        found: dict[int, Block] = {}
        for layer, block in self.layers.items():
            assert isinstance(block, Block), f"layer {layer} is a {type(block).__name__}"
            found[int(layer)] = block
        return found


class Decoder(nn.Module):
    """This rank's stages of the model; made on the meta device, see build.py. Run by run.py.

    Args:
        dtype_of: by name, of the parameters as made (masters and what needs none), not of the computation.

    Attributes:
        first_trained: the first pipeline stage that has a backward.
        compute: the type of the computation. sharding: of the weights. Both by build.py.
    """

    compute: torch.dtype
    sharding: Sharding

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        dtype_of: Callable[[str], torch.dtype],
        options: ModelOptions,
        plan: PipelinePlan,
    ):
        super().__init__()
        self.config, self.mesh, self.options, self.plan = config, mesh, options, plan
        table = Table(config, mesh, dtype_of, options)
        self.axis = table.axis
        self.model = Trunk(table, mesh, options, plan)
        self.lm_head = table.optional_place("lm_head") if len(plan.layers) - 1 in plan.of(mesh.pipeline_rank) else None
        built = {name for name, _ in self.named_parameters()}
        mine = {int(layer) for layer in self.model.layers}
        missing = [p.name for p in config.parameters if p.layer in mine and p.name not in built]
        assert not missing, f"the decoder has no place for {missing}"
        self.first_trained = 0
        self.set_rope(config.rope)

    def set_rope(self, rope: RopeConfig) -> None:
        """The rotary embedding from now on."""
        self.rope = RopeTables(rope, self.config.head_dim, self.mesh.device)

    def set_activation_checkpointing(self, mode: str) -> None:
        """none, selective or full: what each block keeps until its backward, see parallel/recompute.py."""
        for block in self.all_blocks():
            block.recompute = mode

    def counted_parameters(self) -> list[nn.Parameter]:
        """All of this rank's but the copy of the embedding that is the head at the other end of the pipeline."""
        copy = self.config.tie_word_embeddings and 0 not in self.plan.of(self.mesh.pipeline_rank)
        return [p for name, p in self.named_parameters() if not (copy and name == self.config.embedding)]

    def blocks(self, stage: int) -> list[Block]:
        """The blocks of one of this rank's stages."""
        mine = self.model.blocks()
        return [mine[i] for i in self.plan.layers[stage]]

    def all_blocks(self) -> list[Block]:
        """The blocks of this rank."""
        return list(self.model.blocks().values())

    def forward(self, stage: int, x: Tensor | None, inputs: Inputs, later: DeferredWeightGrads | None = None) -> Tensor:
        """Runs a stage: the first begins with the embedding, the last ends with the final norm.

        Args:
            x: [t, h] from the stage before, None for the first.
            later: takes the weight gradients that backward leaves for later.
        Returns:
            [t, h].
        """
        if stage == 0:
            x = embedding(
                inputs.tokens, self.model.embed_tokens.weight, self.mesh.tensor_group, self.options.operations
            )
        rotary = (*self.rope.up_to(inputs.longest), inputs.positions)
        for block in self.blocks(stage):
            x = block(x, rotary, inputs.plan, later)
        assert x is not None, f"stage {stage} got nothing from the one before"
        if stage == len(self.plan.layers) - 1:
            x = rms_norm(x, local_with_grad(self.model.norm.weight), self.config.rms_norm_eps, self.options.operations)
        return x

    def loss(self, x: Tensor, inputs: Inputs, weights: Tensor, scale: float) -> Tensor:
        """scale * sum of the token losses, each times its weight [T], a scalar, from the last stage's [t, h]. The last stage must have
        run."""
        size, operations = self.config.vocab_size, self.options.operations
        return linear_cross_entropy(x, self.head, inputs.labels, size, self.axis, weights, scale, operations)

    def log_probs(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Log-probability of each label [T], 0 without one. No gradient."""
        return log_probs(x, self.head, inputs.labels, self.config.vocab_size, self.axis, self.options.operations)

    def token_losses(self, x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(loss of each token [T], 0 without label; whether its label is the most probable). No gradient."""
        return token_losses(x, self.head, inputs.labels, self.config.vocab_size, self.axis, self.options.operations)

    @property
    def head(self) -> NamedParameter:
        """The place of the head's weight, on the last stage: the embedding's where they are tied."""
        return self.lm_head or self.model.embed_tokens
