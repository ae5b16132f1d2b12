"""The executor, measured: which activations are alive after each action, against the schedule."""

import numpy as np
import pytest
import torch
from ranks import on_ranks
from samples import tiny_config
from torch.multiprocessing.reductions import StorageWeakRef

TOKENS, MICRO_BATCHES = 32, 5
SCHEDULES = {"1f1b": 1, "gpipe": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}


def batch(number: int):
    from megacpt.data.loader import Batch

    random = np.random.default_rng(number)
    tokens = random.integers(0, 400, (1, TOKENS))
    positions = np.arange(TOKENS)[None]
    return Batch(tokens, np.roll(tokens, -1, 1), positions, np.array([0]), np.array([0, 1]), [""])


def alive_after_each_action(name: str, keep: bool = False) -> tuple[list[int], list[int], list[int]]:
    """On a rank, after each action: pairs of stage and micro-batch of which a tensor that autograd saved is alive; what the
    schedule says; the bytes of those tensors."""
    import torch.distributed as dist

    from megacpt.config.layout import Layout
    from megacpt.config.stage import Parallel
    from megacpt.data.loader import StepCounts
    from megacpt.model import run
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.config import parse_config
    from megacpt.model.hf import initialize
    from megacpt.model.llama import ModelOptions
    from megacpt.model.stage import plan_stages
    from megacpt.parallel.mesh import build_mesh
    from megacpt.parallel.pipeline.schedule import peak_in_flight

    ranks = dist.get_world_size()
    parallel = Parallel(pipeline=ranks, virtual_stages=SCHEDULES[name], schedule=name)
    config = parse_config(tiny_config(num_hidden_layers=6), "test")
    mesh = build_mesh(Layout(pipeline=ranks), torch.device("cpu"))
    plan = plan_stages(6, parallel)
    model = build_model(config, mesh, torch.float32, ModelOptions(), plan, sharding_of(parallel))
    initialize(model, config, 1)
    saved: dict[tuple[int, int], list] = {}
    alive, expected, held = [], [0], []
    original = run._Gradients.run

    def observed(self, action, received):
        if keep and not isinstance(self.graphs, Kept):
            self.graphs = Kept()
        mine = saved.setdefault((action.stage, action.micro_batch), [])

        def pack(tensor):
            local = getattr(tensor, "_local_tensor", tensor)
            if action.kind == "F" and local.is_floating_point():
                storage = local.untyped_storage()
                mine.append((local.data_ptr(), StorageWeakRef(storage), storage.nbytes()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = original(self, action, received)
        weights = {p._local_tensor.data_ptr() for p in self.model.parameters()}
        weights |= {
            self.model.rope.cos.data_ptr(),
            self.model.rope.sin.data_ptr(),
        }  # tables of all positions: no activations
        mine[:] = [entry for entry in mine if entry[0] not in weights]
        alive.append(sum(any(not ref.expired() for _, ref, _ in refs) for refs in saved.values()))
        live = {pointer: size for refs in saved.values() for pointer, ref, size in refs if not ref.expired()}
        held.append(sum(live.values()))
        expected.append(expected[-1] + {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind])
        return result

    run._Gradients.run = observed
    counts = StepCounts(MICRO_BATCHES * TOKENS, MICRO_BATCHES * TOKENS, MICRO_BATCHES)
    run.accumulate(model, [batch(i) for i in range(MICRO_BATCHES)], counts, "step")
    assert max(expected) == peak_in_flight(plan.schedule(MICRO_BATCHES).ranks[mesh.pipeline_rank])
    return alive, expected[1:], held


class Kept(dict):
    """Graphs that stay after their backward."""

    def pop(self, key, *default):
        return self[key]


@pytest.mark.parametrize("name", SCHEDULES)
def test_live_activations_are_the_simulators(name):
    for alive, expected, _ in on_ranks(2, alive_after_each_action, name):
        assert alive == expected


def test_the_measurement_sees_a_graph_that_stays():
    found = on_ranks(2, alive_after_each_action, "1f1b", True)
    assert any(alive != expected for alive, expected, _ in found)


def test_four_ranks_keep_what_one_forward_one_backward_says():
    assert [max(alive) for alive, _, _ in on_ranks(4, alive_after_each_action, "1f1b")] == [4, 3, 2, 1]


def main() -> None:
    """Prints the table of docs/performance.md: `cd tests && PYTHONPATH=. python parallel/test_pipeline.py`."""
    torch.set_num_threads(1)
    print(
        "| schedule | ranks | peak by rank, measured | simulated | bytes at the peak over those of one | \n|---|---|---|---|---|"
    )
    for name in SCHEDULES:
        for ranks in (2, 4) if SCHEDULES[name] == 1 else (2,):
            found = on_ranks(ranks, alive_after_each_action, name)
            measured, simulated = ([max(row[i]) for row in found] for i in (0, 1))
            ratios = [
                f"{max(held) / next(h for a, h in zip(alive, held, strict=True) if a == 1):.2f}"
                for alive, _, held in found
            ]
            print(f"| {name} | {ranks} | {measured} | {simulated} | {', '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
