"""The executor, measured: which activations are alive after each action, against the schedule."""

from itertools import pairwise

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


def counts_of_all():
    from megacpt.data.loader import StepCounts

    return StepCounts(MICRO_BATCHES * TOKENS, MICRO_BATCHES * TOKENS, MICRO_BATCHES)


def alive_after_each_action(name: str, keep: bool = False) -> tuple[list[int], list[int], list[int]]:
    """On a rank, after each action: pairs of stage and micro-batch of which a tensor that autograd saved is alive; what the
    schedule says; the bytes of those tensors."""
    import torch.distributed as dist

    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.family.read import parse_config
    from megacpt.model import run
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.split import plan_pipeline
    from megacpt.parallel.mesh import build_mesh
    from megacpt.parallel.pipeline.schedule import peak_in_flight

    ranks = dist.get_world_size()
    parallel = Parallel(pipeline=ranks, virtual_stages=SCHEDULES[name], schedule=name)
    config = parse_config(tiny_config(num_hidden_layers=6), "test")
    mesh = build_mesh(Layout(pipeline=ranks), torch.device("cpu"))
    plan = plan_pipeline(6, parallel)
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
    run.forward_backward(model, [batch(i) for i in range(MICRO_BATCHES)], counts_of_all(), "step")
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


def made_model(name: str, layout, parallel):
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.split import plan_pipeline
    from megacpt.parallel.mesh import build_mesh

    config = parse_config(tiny_config(num_hidden_layers=6), "test")
    plan, mesh = plan_pipeline(6, parallel), build_mesh(layout, torch.device("cpu"))
    model = build_model(config, mesh, torch.float32, ModelOptions(), plan, sharding_of(parallel))
    initialize(model, config, 1)
    return model


def order_between_actions(name: str) -> list[str]:
    """What a rank does in a step: run, make room, receive, send."""
    import torch.distributed as dist

    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.model import run

    ranks = dist.get_world_size()
    parallel = Parallel(pipeline=ranks, virtual_stages=SCHEDULES[name], schedule=name)
    model, done = made_model(name, Layout(pipeline=ranks), parallel), []

    def noted(owner, attribute: str, what: str) -> None:
        original = getattr(owner, attribute)
        setattr(owner, attribute, lambda *args, **kwargs: (done.append(what), original(*args, **kwargs))[1])

    noted(run._Gradients, "run", "run")
    noted(run._Gradients, "shape", "room")
    noted(dist, "irecv", "receive")
    noted(dist, "isend", "send")
    run.forward_backward(model, [batch(i) for i in range(MICRO_BATCHES)], counts_of_all(), "step")
    return done


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_but_messages_follows_a_message_until_the_next_action(name):
    """To make room may wait for the device, and so for messages that were posted."""
    for done in on_ranks(2, order_between_actions, name):
        assert done.count("room") == done.count("receive") > 0 and done.count("send") > 0
        for before, after in pairwise(done):
            assert after != "room" or before in ("room", "run"), done


def connections() -> tuple[set, set]:
    """(opened when the model is made, used in a step): groups of collectives, and pairs of ranks of a group's messages."""
    import torch.distributed as dist

    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.model import run
    from megacpt.optim.clip import grad_norm
    from megacpt.parallel import collectives

    found: set = set()

    def noted(owner, attribute: str) -> None:
        original = getattr(owner, attribute, None)

        def call(*args, **kwargs):
            group = kwargs.get("group") or dist.group.WORLD
            peer = kwargs.get("group_src", kwargs.get("group_dst"))
            if group.size() > 1:
                found.add((group.group_desc, dist.get_process_group_ranks(group)[0], "all" if peer is None else peer))
            return original(*args, **kwargs)

        if original:
            setattr(owner, attribute, call)

    for owner, attributes in (
        (collectives, ("_all_gather", "_reduce_scatter")),
        (dist, ("all_reduce", "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")),
        (dist, ("send", "recv", "isend", "irecv")),
    ):  # fmt: skip
        for attribute in attributes:
            noted(owner, attribute)
    parallel = Parallel(pipeline=2, context=2, tensor=2)
    model = made_model("1f1b", Layout(pipeline=2, context=2, tensor=2), parallel)
    opened = set(found)
    found.clear()
    run.forward_backward(model, [batch(i) for i in range(MICRO_BATCHES)], counts_of_all(), "step")
    grad_norm(model.counted_parameters(), model.mesh)
    return opened, found


def test_a_step_opens_no_communicator():
    """Opening one holds up the hosts of its ranks, which no schedule's program accounts for."""
    for opened, used in on_ranks(8, connections):
        assert used <= opened and {name for name, _, _ in used} >= {"mesh_tp", "mesh_cp", "mesh_fsdp", "mesh_pp"}, used
        assert any(name.startswith("mesh_activation") for name, _, _ in used)


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
