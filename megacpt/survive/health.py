"""Numbers that must not reach the weights, weights that must be the same, ranks that are slow."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.config.sections.health import Health
from megacpt.errors import NumbersError, ReplicaError
from megacpt.model.decoder import Decoder
from megacpt.optim.adamw import AdamW
from megacpt.parallel.finite import not_finite
from megacpt.parallel.mesh import Mesh
from megacpt.parallel.sharded import is_replicated, local_part


@dataclass(frozen=True)
class StepStats:
    """What spikes are seen by."""

    loss: float
    grad_norm: float


def spike_thresholds(accepted: Sequence[tuple[float, float]], rules: Health) -> StepStats:
    """The largest loss and norm of an update that is made: median + spike_mads · 1.4826 · MAD of the steps accepted last. A step that
    was skipped is not among them, so a spike does not raise its own limit."""
    if rules.spike_mads is None or len(accepted) < rules.spike_window // 4:
        return StepStats(float("inf"), float("inf"))
    return StepStats(*(_limit(values, rules.spike_mads) for values in zip(*accepted, strict=True)))


def _limit(values: Sequence[float], mads: float) -> float:
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    return middle + mads * max(spread, 1e-3 * abs(middle))


def add_accepted_step(
    accepted: Sequence[tuple[float, float]], stats: StepStats, rules: Health
) -> list[tuple[float, float]]:
    """(loss, norm) of the steps accepted last with one more, in four digits, so that all layouts remember the same."""
    if rules.spike_mads is None:
        return list(accepted)
    return [*accepted, (float(f"{stats.loss:.3e}"), float(f"{stats.grad_norm:.3e}"))][-rules.spike_window :]


def check_finite(optimizer: AdamW, step: int) -> None:
    """Weights and moments are numbers, before they are given out. Collective; the host waits once.

    Raises:
        NumbersError: on all ranks, naming the tensors.
    """
    if names := not_finite(named_tensors(optimizer)):
        more = f"\n  … {len(names) - 20} more" if len(names) > 20 else ""
        raise NumbersError(
            f"after step {step}, {len(names)} tensors hold inf or nan:\n  "
            + "\n  ".join(names[:20])
            + more
            + "\nNothing of it was saved: every checkpoint that is there is finite. Lower the learning rate or lengthen its warm-up and "
            "start again. A resume may change lr, betas and clip_norm of the stage that it stands in; the rest needs a new run."
        )


def weight_sums(optimizer: AdamW) -> dict[str, Tensor]:
    """By name of each tensor that this rank holds a part of: a checksum of its bits, int64 scalars on the device."""
    return {name: checksum(local_part(tensor).detach()) for name, tensor in named_tensors(optimizer).items()}


def named_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """Weights and moments, by kind and name."""
    kinds = {"model": optimizer.parameters, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    return {f"{kind}.{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}


_PIECE = 1 << 22


def checksum(tensor: Tensor) -> Tensor:
    """The bits of the elements as integers, each times an odd number of its place, summed modulo 2^64. An odd factor can be undone, so any
    change of one element is seen; changes of several cancel out only by chance."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(-1).view(kinds[tensor.element_size()])
    places = 2 * torch.arange(min(_PIECE, bits.numel()), device=bits.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for begin in range(0, bits.numel(), _PIECE):
        piece = bits[begin : begin + _PIECE].long()
        total = total * 0x9E3779B1 + (piece * places[: len(piece)]).sum()
    return total


def check_replicas(optimizer: AdamW, model: Decoder, step: int) -> None:
    """Compares what several ranks hold alike: everything over dp_replicate, over tp what it replicates, and the two copies of tied
    embeddings at a pipeline's ends. Collective.

    Raises:
        ReplicaError: on all ranks, naming tensors and the ranks that differ from the others.
    """
    mesh, sums = model.mesh, weight_sums(optimizer)
    replicated = [name for name in sums if is_replicated(optimizer.parameters[name.partition(".")[2]])]
    tied = [name for name in sums if name.partition(".")[2] == model.config.embedding]
    shared = [(mesh.groups["dp_replicate"], list(sums)), (mesh.groups["tp"], replicated)]
    if mesh.ends is not None and model.config.tie_word_embeddings and model.plan.splits_ends and tied:
        shared.append((mesh.ends, tied))
    problems = [problem for group, names in shared for problem in _differences(sums, names, group)]
    if dist.get_world_size() > 1 and _any(bool(problems), mesh):
        everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, problems)
        problems = sorted({problem for some in everywhere for problem in some})
    if problems:
        raise ReplicaError(step, problems)


def _differences(sums: dict[str, Tensor], names: list[str], group: dist.ProcessGroup) -> list[str]:
    """One line for each of some tensors that is not the same on all ranks of a group."""
    if group.size() == 1 or not names:
        return []
    mine = torch.stack([sums[name] for name in names])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)
    if (table == table[0]).all():
        return []
    ranks, problems = dist.get_process_group_ranks(group), []
    for i, name in enumerate(names):
        found = table[:, i].tolist()
        common, count = Counter(found).most_common(1)[0]
        odd = [ranks[j] for j, value in enumerate(found) if value != common]
        if odd and 2 * count > len(found):
            problems.append(f"{name}: rank {', '.join(map(str, odd))} differs from the other {count} of {ranks}")
        elif odd:
            problems.append(f"{name}: ranks {ranks} differ, and none is in the majority")
    return problems


def _any(flag: bool, mesh: Mesh) -> bool:
    found = torch.tensor(float(flag), device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


class Stragglers:
    """Times of every rank over an interval of steps. Steps end together, because ranks wait for each other, so a rank's own slowness is
    what it spent on its data, and on a fixed product of matrices that it makes alone at the interval's end."""

    def __init__(self, device: torch.device):
        self.device, self.steps, self.step_seconds, self.data_seconds = device, 0, 0.0, 0.0
        size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (128, torch.float32)
        self.matrix = torch.ones(size, size, dtype=dtype, device=device)

    def add(self, step_seconds: float, data_seconds: float) -> None:
        self.steps += 1
        self.step_seconds += step_seconds
        self.data_seconds += data_seconds

    def gather(self) -> dict[str, list[Any]]:
        """`step_s_by_rank`: [least, median, most]; `slowest_ranks`: up to three [rank, step_s, data_s, probe_s], means over the interval,
        the most data_s + probe_s first. Collective; begins a new interval."""
        count = max(1, self.steps)
        mine = torch.tensor(
            [self.step_seconds / count, self.data_seconds / count, self._probe()],
            dtype=torch.float64,
            device=self.device,
        )
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        rows = torch.stack(everyone).tolist()
        self.steps, self.step_seconds, self.data_seconds = 0, 0.0, 0.0
        order = sorted(range(len(rows)), key=lambda rank: -(rows[rank][1] + rows[rank][2]))
        steps = sorted(row[0] for row in rows)
        return {
            "step_s_by_rank": [round(x, 4) for x in (steps[0], median(steps), steps[-1])],
            "slowest_ranks": [[rank, *(round(x, 5) for x in rows[rank])] for rank in order[:3]],
        }

    def _probe(self) -> float:
        best = float("inf")
        for _ in range(3):
            begin = time.perf_counter()
            torch.mm(self.matrix, self.matrix)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        return best
