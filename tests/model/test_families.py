"""Every family against transformers in float64 under tensor, context, pipeline and data parallelism: log-probabilities and every
gradient; and what each comparison must see."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from ranks import on_ranks
from references import gradients_of, reference
from samples import ROPE_YARN, family_config
from test_parity import compare, losses_of, ours, packed
from tolerances import PARITY, difference
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megacpt.config.layout import Layout
from megacpt.config.sections.parallel import Parallel
from megacpt.data.loader import StepCounts
from megacpt.errors import ConfigError
from megacpt.family.base import ModelConfig
from megacpt.family.families import FAMILIES
from megacpt.family.read import parse_config
from megacpt.model import decoder
from megacpt.model.build import build_model, sharding_of
from megacpt.model.decoder import ModelOptions
from megacpt.model.hf import initialize, load_pretrained
from megacpt.model.inputs import to_inputs
from megacpt.model.run import forward_backward, forward_losses
from megacpt.model.split import plan_pipeline
from megacpt.parallel.mesh import build_mesh
from megacpt.plan.memory import Job, kept_bytes, rank_parameters

BOUND = PARITY[torch.float64]
MODELS = {
    "llama": family_config("llama"),
    "qwen2": family_config("qwen2", rope_theta=1000000.0),
    "qwen2 tied": family_config("qwen2", tie_word_embeddings=True, rope_scaling=ROPE_YARN),
    "qwen3": family_config("qwen3"),
    "mistral": family_config("mistral", head_dim=16),
    "phi3": family_config("phi3", head_dim=16),
}
LAYOUTS = {
    "tp4": {"tensor": 4, "overlap": "chunked"},  # two ranks to a key head
    "tp2 cp2": {"tensor": 2, "context": 2},
    "pp2 dp2": {"pipeline": 2, "data_shard": 2, "schedule": "zb-h1"},
    "pp2 tp2": {"pipeline": 2, "tensor": 2},
}
SHIFTS = (0, 7, 113)
"""Each token's log-probability is compared for its label, and for the labels moved by these numbers."""


def rows() -> list:
    """Two packed rows and their documents."""
    return [packed([150, 1, 35, 6], 401), packed([3, 100, 89], 401)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """By model: the folder that transformers wrote, log-probabilities [192, 401] of each row, every gradient."""
    found = {}
    for name, raw in MODELS.items():
        model, folder = reference(raw, torch.float64), tmp_path_factory.mktemp("hf") / name
        transformers.PreTrainedModel.save_pretrained(model, folder)
        scores, total, labels = [], 0.0, 0
        for batch, documents in rows():
            logits = torch.cat([model(d[None], position_ids=torch.arange(len(d))[None]).logits[0] for d in documents])
            scores.append(logits.log_softmax(-1))
            targets = torch.from_numpy(batch.labels[0])
            total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            labels += int((targets >= 0).sum())
        (total / labels).backward()
        gradients = gradients_of(raw, model)
        found[name] = str(folder), [each.detach() for each in scores], gradients
    return found


def differences(expected: dict, degrees: dict, breakage: str = "") -> dict[str, dict[str, float]]:
    """On a rank, by model: how far its part of log-probabilities and gradients lies from transformers, on the scale of the whole."""
    if breakage:
        globals()[breakage]()
    parallel = Parallel(**degrees)
    layout = Layout(1, parallel.data_shard or 1, parallel.pipeline, parallel.context, parallel.tensor)
    mesh, plan = build_mesh(layout, torch.device("cpu")), plan_pipeline(2, parallel)
    found = {}
    for name, (folder, scores, gradients) in expected.items():
        config = parse_config(MODELS[name], name)
        options = ModelOptions(overlap=parallel.overlap)
        model = build_model(config, mesh, torch.float64, options, plan, sharding_of(parallel))
        load_pretrained(model, config, folder)
        found[name] = _scores_apart(model, scores) | _gradients_apart(model, gradients)
        if layout.data_shard * layout.context == 1:  # nothing of it lies with FSDP's other ranks
            held = sum(parameter._local_tensor.numel() for parameter in model.parameters())
            said = rank_parameters(config, plan, parallel, options.vocab_multiple)[mesh.pipeline_rank]
            found[name]["parameters by the formula"] = float(held != said)
    return found


def _scores_apart(model, scores: list[torch.Tensor]) -> dict[str, float]:
    out = {}

    def use(i, inputs, losses, right, shift) -> None:
        wanted = -scores[i][torch.from_numpy(inputs.plan.tokens), inputs.labels.clamp(min=0)]
        apart = (losses - wanted)[inputs.labels >= 0].norm() / scores[i][:, 0].norm()
        out[f"row {i} labels {shift}"] = apart.item()

    batches = [batch for batch, _ in rows()]
    for shift in SHIFTS:
        moved = [_relabelled(batch, shift) for batch in batches]
        forward_losses(model, len(moved), moved.__getitem__, partial(use, shift=shift))
    return out


def _relabelled(batch, shift: int):
    return replace(batch, labels=np.where(batch.labels < 0, batch.labels, (batch.labels + shift) % 401))


def _gradients_apart(model, gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    mesh = model.mesh
    batches = [batch for batch, _ in rows()]
    labels = sum(int((batch.labels >= 0).sum()) for batch in batches)
    forward_backward(model, batches[mesh.data_rank :: mesh.layout.data], StepCounts(labels, labels, 1), "step")
    out = {}
    for name, parameter in model.named_parameters():
        whole = torch.zeros(parameter.shape, dtype=torch.float64)
        whole[: len(gradients[name])] = gradients[name]
        grad = parameter.grad
        _, offset = compute_local_shape_and_global_offset(grad.shape, grad.device_mesh, grad.placements)
        part = tuple(slice(at, at + size) for at, size in zip(offset, grad._local_tensor.shape, strict=True))
        out[name] = ((grad._local_tensor - whole[part]).norm() / whole.norm()).item()
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_equals_transformers_on_a_layout(expected, layout):
    ranks = on_ranks(4, differences, expected, LAYOUTS[layout])
    for name in MODELS:
        seen = {key for rank in ranks for key in rank[name]}
        assert set(expected[name][2]) <= seen and sum(key.startswith("row") for key in seen) == 2 * len(SHIFTS)
        assert max(value for rank in ranks for value in rank[name].values()) < BOUND, (name, ranks)


def summed_nowhere() -> None:
    """tp: gradients of what ranks hold alike are not summed."""
    import megacpt.model.run as run

    run.sum_replicated_gradients = lambda parameters, group: None


def plain_keys() -> None:
    """cp: the keys that travel are not normalised; the rank's own are."""
    normed = decoder.Attention._normed
    decoder.Attention._normed = lambda self, x, norm: normed(self, x, norm) if torch.is_grad_enabled() else x


def neighbours_rows() -> None:
    """tp: gradients of a bias are put one row too far."""
    from megacpt.parallel import tensor

    placed = tensor._placed
    tensor._placed = lambda gradient, *more: placed(gradient.roll(1, 0) if gradient.ndim == 1 else gradient, *more)


BROKEN = {  # by breakage: the layout, the models, and the ends of the names that must differ; all others must not
    "summed_nowhere": ("tp4", ["qwen2", "qwen3"], ("norm.weight", "k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")),
    "neighbours_rows": ("tp4", ["qwen2"], ("_proj.bias",)),
    "plain_keys": ("tp2 cp2", ["qwen3"], None),
}  # fmt: skip


@pytest.mark.parametrize("breakage", BROKEN)
def test_the_comparison_sees_a_broken_layout(expected, breakage):
    layout, models, ends = BROKEN[breakage]
    ranks = on_ranks(4, differences, {name: expected[name] for name in models}, LAYOUTS[layout], breakage)
    for name in models:
        most = {key: max(rank[name].get(key, 0.0) for rank in ranks) for key in ranks[0][name]}
        wrong = {key for key, value in most.items() if value > 1e-6}
        if ends is None:
            assert wrong >= {key for key in most if "layers.0.self_attn" in key}
        else:
            assert wrong == {key for key in most if key.endswith(ends) and "row" not in key.split()}


def without_biases(monkeypatch) -> None:
    original = decoder.column_parallel

    def column_parallel(x, places, *args, **more):
        bare = [SimpleNamespace(name=place.name, parts=place.parts, bias=None) for place in places]
        return original(x, bare, *args, **more)

    monkeypatch.setattr(decoder, "column_parallel", column_parallel)


def without_head_norms(monkeypatch) -> None:
    monkeypatch.setattr(decoder.Attention, "_normed", lambda self, heads, norm: heads)


def norm_of_all_heads(monkeypatch) -> None:
    """One root mean square over the heads of a token together."""

    def normed(self, heads, norm):
        if norm is None:
            return heads
        scale = torch.rsqrt(heads.pow(2).mean((1, 2), keepdim=True) + self.eps)
        return heads * scale * decoder.local_with_grad(norm.weight)

    monkeypatch.setattr(decoder.Attention, "_normed", normed)


@pytest.mark.parametrize(
    "name, broken", [("qwen2", without_biases), ("qwen3", without_head_norms), ("qwen3", norm_of_all_heads)]
)
def test_the_comparison_sees_a_family_that_computes_something_else(mesh, monkeypatch, name, broken):
    broken(monkeypatch)
    assert losses_apart(MODELS[name], mesh) > 1e-3


def losses_apart(raw: dict, mesh) -> float:
    """Token losses of one row on one process, from transformers'."""
    theirs = reference(raw, torch.float64)
    batch, documents = packed([40, 9], 401)
    wanted = torch.cat([theirs(d[None]).logits[0].log_softmax(-1)[:-1].gather(1, d[1:, None]) for d in documents])
    got = losses_of(ours(raw, mesh, torch.float64, theirs), batch)[torch.from_numpy(batch.labels[0]) >= 0]
    return difference(got, -wanted[:, 0])


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_window_is_what_transformers_masks(mesh, name):
    """The twin of the refusal: with documents longer than the window the two differ, with shorter ones they do not."""
    raw = family_config(name, sliding_window=40)
    assert losses_apart(raw, mesh) < BOUND
    with pytest.raises(ConfigError, match="a document of 40 tokens: the model's sliding_window is 39"):
        losses_apart(raw | {"sliding_window": 39}, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "window_problem", lambda config, longest: "")
        assert losses_apart(raw | {"sliding_window": 30}, mesh) > 1e-6


def test_the_families_on_triton_kernels(mesh):
    """Norms of heads and biases with all operations of Triton, in the interpreter."""
    pytest.importorskip("triton", reason="needs Triton (Linux)")
    options = ModelOptions(operations="triton", attention_backend="triton")
    for name in ("qwen2", "qwen3"):
        found = compare(
            MODELS[name] | {"num_hidden_layers": 1}, mesh, torch.float32, options=options, lengths=[9, 1, 6]
        )
        assert max(found.values()) < PARITY[torch.float32], found


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_from_scratch_are_those_of_the_table(mesh, name):
    """Norms one, biases zero, matrices of the config's range, those that end a residual branch narrower."""
    config = parse_config(family_config(name, hidden_size=64, initializer_range=0.1), "t")
    model = build_model(config, mesh, torch.float32, ModelOptions())
    initialize(model, config, 1)
    values = {key: parameter._local_tensor for key, parameter in model.named_parameters()}
    stds = {"normal": 0.1, "residual": 0.05}  # sqrt(2 layers) = 2
    for parameter in config.parameters:
        value = values[parameter.name][: parameter.shape[0]]
        if parameter.init in stds:
            assert value.std().item() == pytest.approx(stds[parameter.init], rel=0.1)
        else:
            assert (value == (1.0 if parameter.init == "ones" else 0.0)).all(), parameter.name
    roles = {p.role for p in config.parameters}
    assert roles == {"lookup", "matmul", "norm"} | ({"bias"} if name == "qwen2" else set())


TOKENS = 61


def kept(name: str, mesh) -> int:
    """Bytes of the tensors over tokens (a prime number of them) that autograd saves in one layer, in float32."""
    config = parse_config(family_config(name, num_hidden_layers=1, head_dim=16), "t")
    model = build_model(config, mesh, torch.float32, ModelOptions())
    initialize(model, config, 1)
    batch, _ = packed([TOKENS], 401)
    storages = {}

    def pack(tensor):
        if tensor.numel() % TOKENS == 0:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(0, None, to_inputs(batch, mesh))
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_the_memory_formula_knows_what_norms_of_heads_keep(mesh):
    """Queries and keys before the norm, and one number a head: counted, and by formula."""
    formula = {}
    for name in ("llama", "qwen3"):
        config, parallel = parse_config(family_config(name, head_dim=16), "t"), Parallel(micro_batch_tokens=TOKENS)
        formula[name] = kept_bytes(Job(config, parallel, Layout(), TOKENS, 1, "step", width=4), "none")
    assert formula["qwen3"] - formula["llama"] == TOKENS * 6 * (16 * 4 + 4)  # 4 heads of queries and 2 of keys
    assert kept("qwen3", mesh) - kept("llama", mesh) == formula["qwen3"] - formula["llama"]
