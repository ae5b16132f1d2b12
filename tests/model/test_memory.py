"""What a step leaves alive (nothing), what a layer keeps between forward and backward (what docs/parallel.md promises, to the byte), and
what is done a second time, for every way of recomputation, with and without context parallelism, under every schedule."""

import gc
import time
from collections import Counter
from functools import partial

import attention_libraries
import numpy as np
import pytest
import torch
from memory import Alive
from ranks import on_ranks
from samples import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

MODES = ("none", "selective", "full")
SCHEDULES = {"1f1b": 1, "gpipe": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}
TOKENS, HIDDEN, FFN, HEADS, KV, HEAD_DIM, EPS = 64, 32, 56, 4, 2, 8, 1e-8


def batch(number: int = 0):
    from megacpt.data.loader import Batch

    tokens = np.random.default_rng(number).integers(0, 400, (1, TOKENS))
    positions = np.concatenate([np.arange(5), np.arange(35), np.arange(24)])[None]
    return Batch(tokens, np.roll(tokens, -1, 1), positions, np.array([0, 5, 40]), np.array([0, 3]), [""])


def counts(micro_batches: int):
    from megacpt.data.loader import StepCounts

    return StepCounts(micro_batches * TOKENS, micro_batches * TOKENS, 3 * micro_batches)


def model_of(layers: int, operations: str = "torch", **degrees):
    """On its ranks."""
    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.split import plan_pipeline
    from megacpt.parallel.mesh import build_mesh

    parallel = Parallel(**degrees)
    layout = Layout(pipeline=parallel.pipeline, context=parallel.context, tensor=parallel.tensor)
    config = parse_config(tiny_config(num_hidden_layers=layers), "test")
    mesh = build_mesh(layout, torch.device("cpu"))
    options = ModelOptions(operations=operations, attention_backend="triton" if operations == "triton" else "auto")
    model = build_model(config, mesh, torch.float32, options, plan_pipeline(layers, parallel), sharding_of(parallel))
    initialize(model, config, 1)
    return model


def alive_after_each_step(broken: bool, **degrees) -> dict[str, list[tuple]]:
    """By mode, after steps 2 and 3: bytes and number of storages, tensors that Python knows, and objects that belong to a step. Nothing is
    collected in between, as in a run."""
    from megacpt.data.loader import StepData
    from megacpt.model.decoder import Inputs
    from megacpt.optim.adamw import AdamW
    from megacpt.parallel import context, recompute
    from megacpt.train.step import Update, train_step

    if broken:
        _hold_what_attention_saves()

    def count(alive: Alive) -> tuple:
        kinds = Counter(type(x) for x in gc.get_objects() if x is not recompute.KEEP_ALL)
        tensors = sum(number for kind, number in kinds.items() if issubclass(kind, torch.Tensor))
        mine = (kinds[context.Gather], kinds[recompute.Kept], kinds[Inputs])
        return alive.bytes(), alive.count(), tensors, *mine

    update, found = Update(1e-3, (0.9, 0.95), EPS, 0.1, 1.0), {}
    layers = degrees.get("virtual_stages", 1) * degrees.get("pipeline", 1)
    for mode in MODES:
        model = model_of(layers, **degrees)
        model.set_activation_checkpointing(mode)
        optimizer, found[mode] = AdamW(dict(model.named_parameters()), "torch"), []
        with Alive() as alive:
            for number in range(3):
                train_step(model, optimizer, StepData([batch(0), batch(1)], counts(2), 0), "step", update)
                if number == 0:
                    gc.collect()
                    gc.disable()
                    continue
                found[mode].append(settled(lambda alive=alive: count(alive), found[mode]))
        gc.enable()
    return found


def settled(count, before: list[tuple]) -> tuple:
    """What is alive when gloo's threads have let go of the last messages, which they do a moment after those are done: the least of some
    looks, and behind another step as many as it takes to see the same."""
    rows, end = [], time.monotonic() + 60
    while len(rows) < 10 or (before and min(rows) != before[-1] and time.monotonic() < end):
        rows.append(count())
        time.sleep(0.01)
    return min(rows)


def _hold_what_attention_saves() -> None:
    """What once leaked: hooks around attention inside the checkpointed block, methods of an object that holds tensors."""
    from megacpt.model import decoder
    from megacpt.parallel.context import context_attention

    class Hooks:
        def pack(self, tensor):
            self.last = tensor
            return tensor

        def unpack(self, tensor):
            return tensor

    def hooked(*args):
        hooks = Hooks()
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            out = context_attention(*args)
        hooks.out = out
        return out

    decoder.context_attention = hooked


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_of_a_step_stays(name, context):
    degrees = dict(pipeline=2, context=context, schedule=name, virtual_stages=SCHEDULES[name])
    for found in on_ranks(2 * context, partial(alive_after_each_step, False, **degrees)):
        for mode, rows in found.items():
            assert rows[0] == rows[1] and rows[0][3:] == (0, 0, 0), (mode, rows)


@pytest.mark.parametrize("context", [1, 2])
def test_nor_without_a_pipeline(context):
    for found in on_ranks(context, partial(alive_after_each_step, False, context=context)):
        assert all(rows[0] == rows[1] and rows[0][3:] == (0, 0, 0) for rows in found.values()), found


def test_the_count_sees_hooks_that_hold_on():
    (found, _) = on_ranks(2, partial(alive_after_each_step, True, context=2))
    for mode in MODES[1:]:
        (first, second), kinds = found[mode], (3, 4)  # Gather, Kept
        assert all(a < b for a, b in zip(first[:3], second[:3], strict=True)), mode
        assert all(0 < first[kind] < second[kind] for kind in kinds), mode


def kept_by_layer(broken: str, **degrees) -> dict[str, int]:
    """By mode: bytes that are alive after a forward and were not before, of three layers less those of two. On one rank among others that
    are pretended, as are its tensors and kernels: those of a GPU."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megacpt.model.inputs import to_inputs
    from megacpt.parallel import context, recompute

    if broken == "gathered keys":
        original = context.Gather.take
        context.Gather.take = lambda self, k, v: self.__dict__.setdefault("twin", original(self, k, v))
    if broken == "products":
        recompute.Kept.once = lambda self, compute: compute()
    dist.destroy_process_group()
    size = degrees.get("tensor", 1) * degrees.get("context", 1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    found = dict.fromkeys(MODES, 0)
    for layers, sign in ((2, -1), (3, 1)):
        model = model_of(layers, "triton", **degrees)
        with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
            model.to_empty(device="cpu")
            inputs = to_inputs(batch(), model.mesh)
            model(0, None, inputs)  # documents' bounds are made
            for mode in MODES:
                model.set_activation_checkpointing(mode)
                gc.collect()
                before = alive.bytes()
                out = model(0, None, inputs)
                gc.collect()
                found[mode] += sign * (alive.bytes() - before - out.nbytes)
                del out
    return found


def promised(mode: str, tensor: int, context: int) -> int:
    """The table of docs/parallel.md, for fp32."""
    tokens = TOKENS // context
    local, q, k, f = tokens // tensor, HEADS * HEAD_DIM // tensor, KV * HEAD_DIM // tensor, FFN // tensor
    attention = 4 * tokens * (2 * q + 2 * k) + 4 * tokens * HEADS // tensor
    return {
        "none": 4 * (4 * local * HIDDEN + 3 * tokens * f) + attention + 8 * local,
        "selective": 4 * (2 * local * HIDDEN + 2 * tokens * f) + attention,
        "full": 4 * local * HIDDEN,
    }[mode]


@pytest.mark.parametrize("degrees", [{}, dict(context=2), dict(tensor=2), dict(tensor=2, context=2)], ids=str)
def test_a_layer_keeps_what_is_promised(degrees):
    pytest.importorskip("triton", reason="needs Triton (Linux)")
    tensor, context = degrees.get("tensor", 1), degrees.get("context", 1)
    expected = {mode: promised(mode, tensor, context) for mode in MODES}
    assert on_ranks(1, partial(kept_by_layer, "", **degrees)) == [expected]


@pytest.mark.parametrize("broken, mode", [("gathered keys", "none"), ("products", "selective")])
def test_the_bytes_see_what_is_kept_besides(broken, mode):
    pytest.importorskip("triton", reason="needs Triton (Linux)")
    (found,) = on_ranks(1, partial(kept_by_layer, broken, context=2))
    assert found[mode] != promised(mode, 1, 2)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.name().split("::")[-1].split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def done_in_a_step(broken: bool, **degrees) -> dict[str, Counter]:
    """By mode: a layer's share of what a step of one micro-batch does: attention, products, and collectives by axis."""
    from megacpt.model.run import forward_backward
    from megacpt.parallel import collectives, recompute

    if broken:
        recompute.Kept.once = lambda self, compute: compute()
    axes, seen = {}, Counter()

    def counted(name, original):
        def call(*args, group, **more):
            seen[f"{axes[group]} {name}"] += 1
            return original(*args, group=group, **more)

        return call

    collectives._all_gather = counted("gather", collectives._all_gather)
    collectives._reduce_scatter = counted("reduce-scatter", collectives._reduce_scatter)
    found = {mode: Counter() for mode in MODES}
    for layers, sign in ((2, -1), (3, 1)):
        model = model_of(layers, **degrees)
        axes = {model.mesh.context_group: "cp", model.mesh.tensor_group: "tp"}
        for mode in MODES:
            model.set_activation_checkpointing(mode)
            seen.clear()
            with Operations() as operations:
                forward_backward(model, [batch()], counts(1), "step")
            for name in ("attention_forward", "attention_backward"):
                seen[name] = operations.seen[name]
            seen["products"] = sum(operations.seen[name] for name in ("mm", "addmm", "addmm_"))
            for name, count in seen.items():
                found[mode][name] += sign * count
    return found


@pytest.mark.parametrize("degrees", [dict(context=2), dict(tensor=2, context=2)], ids=str)
def test_what_a_layer_does_in_a_step(degrees):
    """K and V travel twice; selective repeats no product, no attention, no collective; full repeats all but the last product."""
    tensor = degrees.get("tensor", 1)
    once = {"attention_forward": 1, "attention_backward": 1, "products": 21, "cp gather": 2, "cp reduce-scatter": 1}
    again = {"attention_forward": 2, "products": 27}
    if tensor > 1:
        once |= {"tp gather": 6, "tp reduce-scatter": 4}
        again |= {"tp gather": 8, "tp reduce-scatter": 5}
    expected = {"none": once, "selective": once, "full": once | again}
    assert on_ranks(2 * tensor, partial(done_in_a_step, False, **degrees)) == [expected] * (2 * tensor)


def test_the_count_sees_what_is_done_again():
    for found in on_ranks(2, partial(done_in_a_step, True, context=2)):
        assert (found["selective"]["attention_forward"], found["selective"]["products"]) == (2, 27)


def order_of_a_layer(broken: bool) -> dict[str, list[str]]:
    """By mode: gathers of keys, products and attention of a step of one layer, in the order in which they are started."""
    from megacpt.model.run import forward_backward
    from megacpt.parallel import collectives, context

    if broken:
        context.Gather.start_again = lambda self: None
    model, gather, seen = model_of(1, context=2), collectives._all_gather, []
    collectives._all_gather = lambda *args, **more: seen.append("gather") or gather(*args, **more)
    names = {"mm": "product", "addmm_": "product", "attention_forward": "forward", "attention_backward": "backward"}

    class Order(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = names.get(function.name().split("::")[-1].split(".")[0])
            seen.extend([name] if name else [])
            return function(*args, **(kwargs or {}))

    found = {}
    for mode in MODES:
        model.set_activation_checkpointing(mode)
        seen.clear()
        with Order():
            forward_backward(model, [batch()], counts(1), "step")
        found[mode] = list(seen)
    return found


def hidden_behind(order: list[str]) -> tuple[int, int]:
    """Products between the first gather and forward's attention, and between the last gather and backward's."""
    first, last = order.index("gather"), len(order) - 1 - order[::-1].index("gather")
    return order[first : order.index("forward")].count("product"), order[last : order.index("backward")].count(
        "product"
    )


def test_keys_travel_behind_products():
    """Forward: the queries' product. Backward: both gradients of the output projection, or under full all that follows in the repetition
    (queries, output, gate, up) and in the MLP's backward (six) besides."""
    for found in on_ranks(2, order_of_a_layer, False):
        assert {mode: hidden_behind(order) for mode, order in found.items()} == {
            "none": (1, 2),
            "selective": (1, 2),
            "full": (1, 12),
        }


def test_the_order_sees_a_gather_that_starts_too_late():
    for found in on_ranks(2, order_of_a_layer, True):
        assert hidden_behind(found["none"])[1] == hidden_behind(found["selective"])[1] == 0


@pytest.mark.parametrize("name", [*attention_libraries.FUNCTIONS, None], ids=str)
def test_selective_keeps_attention_whoever_computes_it(name, mesh, monkeypatch):
    """The kernels themselves are counted: forward once but under full, backward once; gradients are those of no recomputation."""
    from megacpt.model.run import forward_backward

    model = model_of(3)
    if name:
        attention_libraries.install(name, monkeypatch)
    else:
        count_sdpa(monkeypatch)
    grads = {}
    for mode in MODES:
        attention_libraries.calls.clear()
        model.set_activation_checkpointing(mode)
        model.zero_grad()
        forward_backward(model, [batch()], counts(1), "step")
        assert attention_libraries.calls == {"forward": 6 if mode == "full" else 3, "backward": 3}, mode
        grads[mode] = [p.grad._local_tensor.clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for mode in MODES for a, b in zip(grads[mode], grads["none"], strict=True))


def count_sdpa(monkeypatch) -> None:
    from megacpt_kernels import attention_backends

    for direction in ("forward", "backward"):
        original = getattr(attention_backends, f"_document_{direction}")

        def counted(*args, original=original, direction=direction):
            attention_libraries.calls[direction] += 1
            return original(*args)

        monkeypatch.setattr(attention_backends, f"_document_{direction}", counted)
