"""One step of an objective under any layout, against autograd through transformers' model: sums and every gradient, float64."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from layout_runs import AXES, world_size
from ranks import on_ranks
from samples import tiny_config
from torch import Tensor

SEQ_LEN, MICRO_BATCHES = 48, 4
RAW = tiny_config(num_hidden_layers=4)
"""Deep enough for two pipeline ranks with two stages each."""
LENGTHS = [[17, 1, 9, 15, 6], [48], [3, 20, 13, 12], [5, 5, 5, 5, 5, 5, 5, 13]]
"""Documents of the row of each micro-batch: of one token, of the whole row, and cut over context ranks."""
ITEMS = [[0, 3, 0, 2, 1], [0], [1, 0, 0, 1], [0, 1, 2, 3, 3, 2, 1, 4]]
"""Items of one document and of several that do not stand side by side; one has no label."""


@dataclass(frozen=True)
class Focal:
    """sum over items of f(m) / items, m the weighted mean log-probability of an item's labels, f(m) = -(1 - e^m)^2 m: items that are
    learnt count less (Lin et al. 2017, arXiv 1708.02002, equation 4, for items in place of classes)."""

    sums: ClassVar[tuple[str, ...]] = ("loss", "mean_log_prob")
    needs_log_probs: ClassVar[bool] = True

    def normalizer(self, counts) -> float:
        return float(counts.items or 1)

    def weights(self, log_p: Tensor | None, targets, group):
        from megacpt.objective.base import Weighted
        from megacpt.parallel import items as room

        assert log_p is not None
        given = targets.weights.double()
        total = room.item_sums(given, targets.items, group).clamp(min=1e-300)  # without weight: mean 0, loss 0
        mean = room.item_sums(given * log_p, targets.items, group) / total
        slope = focal_slope(mean) / total
        sums = torch.stack([focal(mean).sum(), mean.sum()])
        return Weighted(-given * room.spread_to_tokens(slope, targets.items), room.counted_once(sums, group))


def focal(mean: Tensor) -> Tensor:
    return -((1 - mean.exp()) ** 2) * mean


def focal_slope(mean: Tensor) -> Tensor:
    """df/dm."""
    p = mean.exp()
    return 2 * (1 - p) * p * mean - (1 - p) ** 2


def batches(with_items: bool) -> list[Any]:
    """Micro-batches of one row each, the same everywhere. Weights with zeros, NaN where no label is, without items of both signs."""
    from megacpt.data.loader import IGNORE, Batch

    made = []
    for number, (lengths, item) in enumerate(zip(LENGTHS, ITEMS, strict=True)):
        random = np.random.default_rng(number)
        tokens = random.integers(0, RAW["vocab_size"], SEQ_LEN)
        ends = np.cumsum(lengths)
        labels = np.append(tokens[1:], IGNORE)
        labels[ends - 1] = IGNORE
        positions = np.concatenate([np.arange(n) for n in lengths])
        weights = random.uniform(-0.5, 2.0, SEQ_LEN).astype(np.float32)
        weights[random.random(SEQ_LEN) < 0.3] = 0
        weights[labels == IGNORE] = np.nan
        made.append(
            Batch(
                tokens[None], labels[None], positions[None], ends - lengths, np.array([0, len(lengths)]), [""],
                (np.abs(weights) if with_items else weights)[None],
                np.array(item, np.int32) if with_items else None,
            )
        )  # fmt: skip
    return made


def counts_of(made: list[Any]) -> Any:
    """The step's totals, from the batches themselves."""
    from megacpt.data.loader import StepCounts

    labels = sum(int((batch.labels >= 0).sum()) for batch in made)
    weight = sum(float(weights_of(batch).sum()) for batch in made)
    items = sum(len(np.unique(items_of(batch)[weights_of(batch) != 0])) for batch in made)
    return StepCounts(labels, weight, items)


def weights_of(batch) -> np.ndarray:
    """float64 [T], 0 where no label is."""
    weights = np.ones(SEQ_LEN) if batch.weights is None else batch.weights[0].astype(np.float64)
    return np.where(batch.labels[0] >= 0, weights, 0.0)


def items_of(batch) -> np.ndarray:
    """int [T]: the item of each token."""
    lengths = np.diff(np.append(batch.document_starts, SEQ_LEN))
    return np.repeat(np.arange(len(lengths)) if batch.item is None else batch.item, lengths)


def of_autograd(model, name: str, made: list[Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The sums and every gradient, by autograd through log-softmax of transformers' model, document by document."""
    counts, loss, extra = counts_of(made), torch.zeros((), dtype=torch.float64), 0.0
    for batch in made:
        tokens, labels = torch.from_numpy(batch.tokens[0]), torch.from_numpy(batch.labels[0])
        edges = [*batch.document_starts.tolist(), SEQ_LEN]
        rows = [
            model(tokens[None, a:b], position_ids=torch.arange(b - a)[None]).logits[0]
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        log_p = torch.cat(rows).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        weights = torch.from_numpy(weights_of(batch))
        if name == "next_token":
            loss = loss - (weights * log_p).sum() / counts.weight
            continue
        for item in np.unique(items_of(batch)):
            mine = torch.from_numpy((items_of(batch) == item) & (batch.labels[0] >= 0))
            if weights[mine].sum() > 0:
                mean = (weights[mine] * log_p[mine]).sum() / weights[mine].sum()
                loss, extra = loss + focal(mean) / counts.items, extra + mean.item() / counts.items
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return [loss.item()] if name == "next_token" else [loss.item(), extra], gradients


def on_layout(layout: str, name: str, made: list[Any], weights: dict[str, Tensor], breakage: str, reduce: str) -> Any:
    """On every rank: (the sums, its shards of every gradient by name with their places)."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.family.read import parse_config
    from megacpt.model import run
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import fill_shard
    from megacpt.model.split import plan_pipeline
    from megacpt.objective.next_token import NEXT_TOKEN
    from megacpt.parallel.mesh import build_mesh

    objective = {"next_token": NEXT_TOKEN, "focal": Focal()}[name]
    if breakage:
        BREAKAGES[breakage]()
    words = [word for word in layout.split() if word.rstrip("0123456789") in AXES]
    degrees = {AXES[word.rstrip("0123456789")]: int(word.lstrip("abcdefghijklmnopqrstuvwxyz")) for word in words}
    schedule = next((word for word in layout.split() if word not in words), "1f1b")
    parallel = Parallel(**degrees, schedule=schedule)
    sizes = {key: value for key, value in degrees.items() if key != "virtual_stages"}
    mesh, plan = build_mesh(Layout(**sizes), torch.device("cpu")), plan_pipeline(RAW["num_hidden_layers"], parallel)
    config = parse_config(RAW, "test")
    model = build_model(config, mesh, torch.float64, ModelOptions(), plan, sharding_of(parallel))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            fill_shard(parameter, config.shapes()[key], lambda box, key=key: weights[key][box])
    counts = counts_of(made)
    sums = run.forward_backward(model, made[mesh.data_rank :: mesh.layout.data], counts, reduce, objective)
    shards = {}
    for key, parameter in model.named_parameters():
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        shards[key] = offset, parameter.grad._local_tensor.clone()
    return sums.tolist(), shards


def distance(
    layout: str, name: str, made: list[Any], model, expected: tuple, breakage: str = "", reduce: str = "step"
) -> dict[str, float]:
    """The largest relative differences of sums and of gradients from autograd."""
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    ranks = on_ranks(world_size(layout), on_layout, layout, name, made, weights, breakage, reduce)
    sums, gradients = expected
    assert all(found == ranks[0][0] for found, _ in ranks), "ranks report different sums"
    shifts = [abs(a - b) / abs(b) for a, b in zip(ranks[0][0], sums, strict=True)]
    return {"sums": max(shifts), "gradients": gradients_apart([shards for _, shards in ranks], gradients)}


def gradients_apart(ranks: list[dict[str, tuple]], gradients: dict[str, Tensor]) -> float:
    """The largest relative difference of the ranks' shards, each with its offset by name, from whole gradients."""
    worst = 0.0
    assert {key for shards in ranks for key in shards} == gradients.keys(), "not all gradients are there"
    for key, whole in gradients.items():
        covered = torch.zeros(whole.shape, dtype=torch.bool)
        for offset, part in (shards[key] for shards in ranks if key in shards):
            box = tuple(slice(at, at + size) for at, size in zip(offset, part.shape, strict=True))
            covered[box] = True
            rows = len(whole[box])  # the vocabulary's padding has none
            assert not part[rows:].any(), f"{key}: padding rows have a gradient"
            worst = max(worst, ((part[:rows] - whole[box]).norm() / whole.norm()).item())
        assert covered.all(), f"{key}: no rank holds some of it"
    return worst


def _own_tokens_only() -> None:
    """cp: an item's sum is that of this rank's tokens."""
    from megacpt.parallel import items

    items.gather_tokens = lambda x, group: x


def _constant_slope() -> None:
    """Every item is as heavy as any other: the plain mean by item."""
    globals()["focal_slope"] = lambda mean: torch.full_like(mean, -1.0)


def _documents_alone() -> None:
    """Documents that belong together are looked at one by one."""
    from megacpt.model import run

    original = run.to_inputs
    run.to_inputs = lambda batch, mesh: original(replace(batch, item=None), mesh)


def _weights_of_neighbours() -> None:
    """Each token has the weight of the one before."""
    from megacpt.model.decoder import Decoder

    original = Decoder.loss
    Decoder.loss = lambda self, x, inputs, weights, scale: original(
        self, x, inputs, weights.nan_to_num(0.0).roll(1), scale
    )


def _counted_by_all() -> None:
    """cp: every context rank reports the whole of an item's sum."""
    from megacpt.parallel import items

    items.counted_once = lambda values, group: values


def _number_of_labels() -> None:
    """The step is divided by the number of its labels, whatever they weigh."""
    from megacpt.objective.next_token import NextToken

    NextToken.normalizer = lambda self, counts: counts.labels


BREAKAGES = {
    "own tokens only": _own_tokens_only,
    "constant slope": _constant_slope,
    "documents alone": _documents_alone,
    "weights of neighbours": _weights_of_neighbours,
    "counted by all": _counted_by_all,
    "number of labels": _number_of_labels,
}
