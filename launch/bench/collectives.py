"""Collectives of one training step by axis, counted and measured in bytes sent by the busiest rank, beside the analytic minimum.
Ends with 1 if any rank makes one collective or sends one byte more (or less) than the formula says.

    python launch/bench/collectives.py [--layouts "tp2 cp2 pp2" "dp4" …]

The formula, for each rank, with M micro-batches of T tokens, Tc = T / cp, t = Tc / tp, L layers of the rank's stages, e bytes
an element (n ranks on an axis: a gather of shards of b bytes, and a reduce-scatter to them, send (n - 1) b each):
  tp    a layer and micro-batch: 2 gathers and 2 reduce-scatters of t h e forward (one pair for attention, one for the MLP), the
        transposed ones backward, and 2 gathers again in place of keeping their Tc h e; embedding: 1 and 1; head: 1 and 1 for each
        chunk of logits, and one gather of three fp32 numbers a token; a step: one sum of what tp replicates.
  cp    a layer and micro-batch: K and V in one gather of Tc 2 kv d e forward, again backward, one fp32 reduce-scatter.
  fsdp  a step: one gather and one fp32 reduce-scatter of each block and of the rest ("step", weights not freed in between).
  pp    a micro-batch and edge between ranks: t h e forward, as much backward.
  scalars: the loss over data, context and pipeline; the squared norm over shards, context, tensor and pipeline.
"""

import argparse
import ast
import math
import os
import sys
import tempfile
from collections import Counter

os.environ["OMP_NUM_THREADS"] = "1"
AXES = {"tp": "tensor", "cp": "context", "pp": "pipeline", "dp": "data_shard", "v": "virtual_stages"}
HIDDEN, FFN, LAYERS, HEADS, KV, VOCAB, TOKENS, MICRO_BATCHES = 128, 256, 8, 8, 4, 512, 256, 4
DEFAULT = ["dp4", "tp4", "cp4", "pp4", "pp2 v2", "tp2 pp2", "tp2 cp2 pp2", "cp2 dp2", "tp2 dp2 pp2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=DEFAULT)
    options = parser.parse_args()
    print("| layout | axis | collectives | minimum | bytes sent | minimum |\n|---|---|---|---|---|---|")
    bad = False
    for layout in options.layouts:
        for axis, found in run(layout).items():
            bad |= found["wrong"]
            shown = [found["count"], found["least"], found["bytes"], found["least_bytes"]]
            print(f"| {layout} | {axis} | " + " | ".join(f"{value:,}" for value in shown) + " |", flush=True)
    sys.exit(1 if bad else 0)


def run(layout: str) -> dict[str, dict]:
    """By axis: what the busiest rank did and should do, and whether any rank differs."""
    import torch.distributed.tensor  # noqa: F401  (once, for all ranks that are forked from here)
    import torch.multiprocessing as mp

    import megacpt.model.run  # noqa: F401

    degrees = {word.rstrip("0123456789"): int(word.lstrip("abcdefghijklmnopqrstuvwxyz")) for word in layout.split()}
    size = math.prod(n for axis, n in degrees.items() if axis != "v")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_main, (size, folder, degrees), nprocs=size, start_method="fork")
        rows = [ast.literal_eval(open(f"{folder}/{rank}").read()) for rank in range(size)]
    out = {}
    for axis in sorted({key[0] for counts, _ in rows for key in counts}):

        def total(table, i, axis=axis):
            return sum(value[i] for key, value in table.items() if key[0] == axis)

        found, least = max(rows, key=lambda row: total(row[0], 1))
        out[axis] = {
            "count": total(found, 0),
            "least": total(least, 0),
            "bytes": total(found, 1),
            "least_bytes": total(least, 1),
            "wrong": any(
                {k: v for k, v in a.items() if k[0] == axis} != {k: v for k, v in b.items() if k[0] == axis}
                for a, b in rows
            ),
        }
    return out


def rank_main(rank: int, size: int, folder: str, degrees: dict[str, int]) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist

    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.data.loader import Batch, StepCounts
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.run import forward_backward
    from megacpt.model.split import plan_pipeline
    from megacpt.optim.clip import grad_norm
    from megacpt.parallel.mesh import build_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    parallel = Parallel(**{AXES[axis]: n for axis, n in degrees.items()}, reshard_after_forward=False)
    layout = Layout(1, parallel.data_shard or 1, parallel.pipeline, parallel.context, parallel.tensor)
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
            "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
            "hidden_act": "silu", "max_position_embeddings": TOKENS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        "bench",
    )  # fmt: skip
    mesh = build_mesh(layout, torch.device("cpu"))
    plan = plan_pipeline(LAYERS, parallel)
    model = build_model(config, mesh, torch.float32, ModelOptions(), plan, sharding_of(parallel))
    initialize(model, config, 1)
    random = np.random.default_rng(mesh.data_rank)
    batches = []
    for _ in range(MICRO_BATCHES):
        tokens = random.integers(0, VOCAB, (1, TOKENS))
        at = np.arange(TOKENS)[None]
        batches.append(Batch(tokens, np.roll(tokens, -1, 1), at, np.array([0]), np.array([0, 1]), [""]))
    counts = watch(mesh)
    labels, rows = MICRO_BATCHES * TOKENS * layout.data, MICRO_BATCHES * layout.data
    forward_backward(model, batches, StepCounts(labels, labels, rows), "step")
    grad_norm(model.counted_parameters(), mesh)
    wanted = expected(config, parallel, layout, plan, mesh)
    found = {key: value for key, value in counts.items() if value[0]}
    with open(f"{folder}/{rank}", "w") as file:
        file.write(repr((found, {key: value for key, value in wanted.items() if value[0]})))
    dist.barrier()
    os._exit(0)


def watch(mesh) -> dict[tuple[str, str], tuple[int, int]]:
    """Counts, from now on, (calls, bytes sent) by (axis, operation)."""
    import torch.distributed as dist

    from megacpt.parallel import collectives

    axes = {mesh.groups[axis]: axis for axis in ("tp", "cp", "pp", "dp_shard")}
    axes |= dict.fromkeys(mesh.channels.values(), "pp") | {mesh.ends: "pp"}
    flat = mesh.fsdp.get_group() if mesh.fsdp.ndim == 1 else None
    counts: dict[tuple[str, str], tuple[int, int]] = {}

    def counted(original, operation: str, inside):
        def call(*args, **kwargs):
            group = kwargs.get("group")
            size = group.size() if group is not None else dist.get_world_size()
            if size > 1:
                two = operation in ("gather", "reduce-scatter")  # (output, input)
                named = next((kwargs[name] for name in ("input_tensor", "input", "tensor") if name in kwargs), None)
                tensor = named if named is not None else args[1 if two else 0]
                axis = inside or axes.get(group) or ("fsdp" if group is flat else "?")
                bytes_of = tensor.numel() * tensor.element_size()
                sent = {
                    "gather": (size - 1) * bytes_of,
                    "reduce-scatter": (size - 1) * bytes_of // size,
                    "all-reduce": 2 * (size - 1) * bytes_of // size,
                    "send": bytes_of,
                }[operation]
                calls, total = counts.get((axis, operation), (0, 0))
                counts[axis, operation] = calls + 1, total + sent
            return original(*args, **kwargs)

        return call

    collectives._all_gather = counted(collectives._all_gather, "gather", None)
    collectives._reduce_scatter = counted(collectives._reduce_scatter, "reduce-scatter", None)
    for name, operation, inside in (
        ("all_gather_single", "gather", "fsdp"),
        ("all_gather_into_tensor", "gather", "fsdp"),
        ("reduce_scatter_single", "reduce-scatter", "fsdp"),
        ("reduce_scatter_tensor", "reduce-scatter", "fsdp"),
        ("all_reduce", "all-reduce", None),
        ("isend", "send", None),
    ):
        if hasattr(dist, name):
            setattr(dist, name, counted(getattr(dist, name), operation, inside))
    return counts


def expected(config, parallel, layout, plan, mesh) -> dict[tuple[str, str], tuple[int, int]]:
    """The formula at the top of this file, for this rank."""
    from megacpt_kernels.linear_cross_entropy import _chunk

    from megacpt.plan.check import rank_parameters

    tp, cp, pp, m, e = layout.tensor, layout.context, layout.pipeline, MICRO_BATCHES, 4
    rank = mesh.pipeline_rank
    stages = plan.of(rank)
    layers = sum(len(plan.layers[stage]) for stage in stages)
    first, last = 0 in stages, len(plan.layers) - 1 in stages
    context_tokens = TOKENS // cp
    t = context_tokens // tp
    out: Counter = Counter()
    sent: Counter = Counter()

    def add(axis: str, operation: str, count: int, bytes_each: int) -> None:
        out[axis, operation] += count
        sent[axis, operation] += count * bytes_each

    sharers = layout.data_shard * cp
    if tp > 1:
        part = (tp - 1) * t * HIDDEN * e
        add("tp", "gather", m * (6 * layers + first), part)
        add("tp", "reduce-scatter", m * (4 * layers + first), part)
        if last:
            step = max(1, _chunk(type("W", (), {"shape": (VOCAB // tp,), "is_cuda": False}), None) // tp)
            for begin in range(0, t, step):
                rows = min(step, t - begin)
                add("tp", "gather", m, (tp - 1) * rows * HIDDEN * e)
                add("tp", "reduce-scatter", m, (tp - 1) * rows * HIDDEN * e)
                add("tp", "gather", m, (tp - 1) * 3 * tp * rows * 4)
        add("tp", "all-reduce", 1, 2 * (tp - 1) * (2 * layers + last) * HIDDEN * 4 // sharers // tp)
    if cp > 1:
        part = (cp - 1) * context_tokens * 2 * (KV // tp) * (HIDDEN // HEADS)
        add("cp", "gather", 2 * m * layers, part * e)
        add("cp", "reduce-scatter", m * layers, part * 4)
    if sharers > 1:
        whole = rank_parameters(config, plan, parallel, 128)[rank] * 4
        groups = layers + bool(first or last)
        add("fsdp", "gather", groups, 0)
        add("fsdp", "reduce-scatter", groups, 0)
        sent["fsdp", "gather"] = sent["fsdp", "reduce-scatter"] = (sharers - 1) * whole // sharers
    if pp > 1:
        for stage in stages:

            def edge(other):
                return 0 <= other < len(plan.layers) and plan.placement[other] != rank

            add("pp", "send", m * (edge(stage + 1) + edge(stage - 1)), t * HIDDEN * e)
    for axis, size, scalars in (("dp_shard", layout.data_shard, 2), ("cp", cp, 2), ("pp", pp, 2), ("tp", tp, 1)):
        if size > 1:
            loss = 2 * (size - 1) * 4 // size
            norm = 2 * (size - 1) * 8 // size
            out[axis, "all-reduce"] += scalars
            sent[axis, "all-reduce"] += (loss if scalars == 2 else 0) + norm
    return {key: (out[key], sent[key]) for key in out}


if __name__ == "__main__":
    main()
