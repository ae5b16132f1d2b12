"""Logits, losses and every gradient against transformers, for each family and rotary scaling, tied and untied, beyond the
original context; documents packed here, one by one there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from references import as_ours, gradients_of, reference
from samples import ROPE_LLAMA3, ROPE_YARN, family_config, tiny_config
from tolerances import PARITY, difference

from megacpt.data.loader import IGNORE, Batch, StepCounts
from megacpt.family.read import parse_config
from megacpt.model.build import build_model
from megacpt.model.decoder import ModelOptions
from megacpt.model.hf import fill_shard
from megacpt.model.inputs import to_inputs
from megacpt.model.run import forward_backward, forward_losses
from megacpt.parallel.gemm import PlainGemm

VARIANTS = {
    "llama2": tiny_config(num_key_value_heads=4),
    "llama3": tiny_config(rope_theta=500000.0),
    "llama3.1": tiny_config(rope_scaling=ROPE_LLAMA3),
    "llama3.2-tied": tiny_config(rope_scaling=ROPE_LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True, head_dim=16),
    "linear": tiny_config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "yarn": tiny_config(rope_scaling=ROPE_YARN),
    "yarn-mscale": tiny_config(rope_scaling=ROPE_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}),
    "v5": {k: v for k, v in tiny_config().items() if k not in ("rope_theta", "rope_scaling")}
    | {"rope_parameters": {"rope_theta": 20000.0, **ROPE_LLAMA3}},
    "qwen2": family_config("qwen2", rope_theta=1000000.0, rms_norm_eps=1e-6),
    "qwen2-tied-yarn": family_config("qwen2", tie_word_embeddings=True, rope_scaling=ROPE_YARN),
    "qwen3": family_config("qwen3", num_key_value_heads=1),
    "qwen3-tied": family_config("qwen3", tie_word_embeddings=True, rope_theta=1000000.0),
    "mistral": family_config("mistral", head_dim=16, num_key_value_heads=4),
    "mistral-window": family_config("mistral", sliding_window=150),
    "phi3": family_config("phi3", num_key_value_heads=4, rope_theta=250000.0),
    "phi3-tied": family_config("phi3", tie_word_embeddings=True, head_dim=16, sliding_window=150),
}
LENGTHS = [150, 1, 37, 2]


def ours(raw: dict, mesh, dtype: torch.dtype, source, options: ModelOptions | None = None):
    config = parse_config(raw, "test")
    model = build_model(config, mesh, dtype, options or ModelOptions())
    weights = as_ours(raw, dict(source.named_parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill_shard(parameter, config.shapes()[name], lambda box, name=name: weights[name][box])
    return model


def packed(lengths, vocab: int) -> tuple[Batch, list[torch.Tensor]]:
    """One row of documents of random tokens."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]
    labels = torch.cat([torch.cat([d[1:], torch.tensor([IGNORE])]) for d in documents])
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = np.cumsum([0, *lengths[:-1]])
    row = lambda tensor: tensor[None].numpy()
    batch = Batch(row(torch.cat(documents)), row(labels), row(positions), starts, np.array([0, len(lengths)]), [""])
    return batch, documents


def losses_of(model, batch: Batch) -> torch.Tensor:
    """The loss of each token."""
    found = []
    forward_losses(model, 1, lambda i: batch, lambda i, inputs, losses, right: found.append(losses))
    return found[0]


def compare(
    raw: dict, mesh, dtype: torch.dtype, change=lambda batch: batch, options=None, lengths=LENGTHS
) -> dict[str, float]:
    """Differences by name: the token losses and every gradient."""
    theirs = reference(raw, dtype)
    model = ours(raw, mesh, dtype, theirs, options)
    batch, documents = packed(lengths, raw["vocab_size"])
    losses, labels = [], sum(len(d) - 1 for d in documents)
    for document in documents:
        logits = theirs(document[None], position_ids=torch.arange(len(document))[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none"))
    expected = torch.cat(losses)
    (expected.sum() / labels).backward()
    got = losses_of(model, change(batch))[torch.from_numpy(batch.labels[0]) >= 0]
    forward_backward(model, [change(batch)], StepCounts(labels, labels, 1), "step")
    gradients = gradients_of(raw, theirs)
    found = {"nll": difference(got, expected)}
    for name, parameter in model.named_parameters():
        grad = parameter.grad._local_tensor[: gradients[name].shape[0]]
        found[name] = difference(grad, gradients[name])
        assert not parameter.grad._local_tensor[gradients[name].shape[0] :].any(), (
            f"{name}: padding rows have a gradient"
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_transformers(mesh, variant, dtype):
    found = compare(VARIANTS[variant], mesh, dtype)
    assert max(found.values()) < PARITY[dtype], found


def test_the_model_on_triton_kernels_equals_transformers(mesh):
    """All operations at once, forward and backward, in the interpreter."""
    pytest.importorskip("triton", reason="needs Triton (Linux)")
    raw = VARIANTS["llama3.1"] | {"num_hidden_layers": 1}
    found = compare(
        raw,
        mesh,
        torch.float32,
        options=ModelOptions(operations="triton", attention_backend="triton"),
        lengths=[9, 1, 6],
    )
    assert max(found.values()) < PARITY[torch.float32], found


def _shift(batch: Batch) -> Batch:
    positions = batch.positions.copy()
    positions[0, :150] += np.arange(150) // 75  # RoPE is relative: only an uneven shift is visible
    return replace(batch, positions=positions)


def _move_boundary(batch: Batch) -> Batch:
    starts = batch.document_starts.copy()
    starts[3] -= 1  # the last document now sees the last token of the one before
    return replace(batch, document_starts=starts)


@pytest.mark.parametrize("broken", [_shift, _move_boundary])
def test_the_comparison_sees_a_broken_model(mesh, broken):
    found = compare(VARIANTS["llama3"], mesh, torch.float32, broken)
    assert found["nll"] > 10 * PARITY[torch.float32]


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
def test_the_comparison_sees_each_product(mesh, monkeypatch, product):
    """One of the three that all linears are made of is off by a thousandth."""
    original = getattr(PlainGemm, product)

    def off(self, *args, **more):
        result = original(self, *args, **more)
        scaled = lambda x: None if x is None else x * 1.001
        return tuple(map(scaled, result)) if isinstance(result, tuple) else scaled(result)

    monkeypatch.setattr(PlainGemm, product, off)
    assert max(compare(VARIANTS["llama3"], mesh, torch.float64).values()) > 1e-5


def test_logits_equal_transformers_beyond_the_original_context(mesh):
    """The full logits, not only the losses: the head applied to our final hidden states, at positions up to 149 > 64."""
    raw = VARIANTS["llama3.1"]
    theirs = reference(raw, torch.float64)
    model = ours(raw, mesh, torch.float64, theirs)
    batch, documents = packed([150], raw["vocab_size"])
    rows = []
    for token in range(raw["vocab_size"]):  # nll with every token as target is -log_softmax
        rows.append(-losses_of(model, replace(batch, labels=np.full((1, 150), token))))
        if token == 40:
            break
    expected = theirs(documents[0][None]).logits[0].log_softmax(-1)[:, :41]
    assert difference(torch.stack(rows, 1), expected) < PARITY[torch.float64]


@pytest.mark.parametrize("variant", ["llama3.1", "qwen2", "qwen2-tied-yarn", "qwen3", "qwen3-tied", "mistral", "phi3"])
def test_all_logits_equal_transformers(mesh, variant):
    """The head's weight times our last hidden states, of every document of a packed row and every entry of the vocabulary."""
    raw = VARIANTS[variant]
    theirs = reference(raw, torch.float64)
    model = ours(raw, mesh, torch.float64, theirs)
    batch, documents = packed(LENGTHS, raw["vocab_size"])
    with torch.no_grad():
        hidden = model(0, None, to_inputs(batch, mesh))
        expected = torch.cat([theirs(document[None]).logits[0] for document in documents])
    head = dict(model.named_parameters())[model.config.embedding if raw["tie_word_embeddings"] else "lm_head.weight"]
    got = hidden @ head._local_tensor[: raw["vocab_size"]].T
    assert got.shape == (sum(LENGTHS), 401) and difference(got, expected) < PARITY[torch.float64]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_gives_the_same_gradients(mesh, mode):
    raw = VARIANTS["llama3"]
    model = ours(raw, mesh, torch.float64, reference(raw, torch.float64))
    batch, _ = packed(LENGTHS, raw["vocab_size"])
    grads = []
    for checkpointing in ("none", mode):
        model.set_activation_checkpointing(checkpointing)
        model.zero_grad()
        forward_backward(model, [batch], StepCounts(1, 1, 1), "step")
        grads.append([p.grad._local_tensor.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def main() -> None:
    """Prints the table of docs/numerics.md: `python tests/model/test_parity.py`."""
    from megacpt.config.layout import Layout
    from megacpt.parallel.mesh import build_mesh, start_process_group

    torch.set_num_threads(1)
    start_process_group(torch.device("cpu"))
    mesh = build_mesh(Layout(), torch.device("cpu"))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| model | type | token losses | worst gradient |\n|---|---|---|---|")
    for variant, raw in VARIANTS.items():
        for dtype in (torch.float32, torch.float64):
            found = compare(raw, mesh, dtype)
            name = str(dtype).removeprefix("torch.")
            print(f"| {variant} | {name} | {found.pop('nll'):.1e} | {max(found.values()):.1e} |")


if __name__ == "__main__":
    main()
