import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import LONG_SECONDS

from megacpt.config.clock import Clock
from megacpt.config.load import load_recipe
from megacpt.data.loader import (
    IGNORE,
    StageData,
    StepData,
    deal,
    domain_tokens,
    load_step,
    make_batch,
    open_domains,
    prefetch,
    stage_orders,
)
from megacpt.errors import DataError

PAD = 0


@pytest.fixture
def stage_data(recipe_file):
    recipe = load_recipe(recipe_file())
    clock = Clock(recipe)
    domains = open_domains(recipe, ["a", "b"])
    return StageData(recipe, recipe.stages[0], stage_orders(recipe, clock)[0], domains, PAD, 401)


def test_labels_never_cross_a_document_and_positions_restart(stage_data):
    batch = stage_data.batch(stage_data.picks(0, 12))
    flat, labels, positions = (x.reshape(-1) for x in (batch.tokens, batch.labels, batch.positions))
    edges = [*batch.document_starts.tolist(), flat.size]
    assert edges[0] == 0 and len(edges) > 13
    for begin, end in zip(edges, edges[1:], strict=False):
        assert positions[begin:end].tolist() == list(range(end - begin))
        assert labels[end - 1] == IGNORE
        is_padding = (flat[begin:end] == PAD).all() and (labels[begin:end] == IGNORE).all()
        assert is_padding or labels[begin : end - 1].tolist() == flat[begin + 1 : end].tolist()
    starts = [set(range(row * 64, row * 64 + 1)) for row in range(12)]
    assert all(row <= set(edges) for row in starts)  # no document crosses a row
    assert [batch.row_offsets[i] for i in (0, -1)] == [0, len(edges) - 1]


def test_tokens_are_those_of_the_documents(stage_data):
    picks = stage_data.picks(5, 3)
    batch = stage_data.batch(picks)
    for row, pick in enumerate(picks):
        index = stage_data.indices[pick.domain]
        expected = np.concatenate([index.domain.read(*piece) for piece in index.row(pick.row)])
        assert batch.tokens[row, : len(expected)].tolist() == expected.tolist()
        assert (batch.tokens[row, len(expected) :] == PAD).all()


def test_counts_come_from_the_index_alone(stage_data):
    picks = stage_data.picks(0, 10)
    batch = stage_data.batch(picks)
    lengths = np.diff([*batch.document_starts, batch.tokens.size])
    counts, labels = stage_data.count(picks), (batch.labels >= 0).sum()
    assert stage_data.visible_pairs(picks) == (lengths * (lengths + 1) // 2).sum()
    documents = np.split(batch.labels.reshape(-1), batch.document_starts[1:])
    with_label = sum((labels >= 0).any() for labels in documents)
    assert (counts.labels, counts.weight, counts.items) == (labels, labels, with_label) and with_label < len(documents)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_every_row_is_dealt_once_and_ranks_have_equal_rounds(rows, ranks, per_micro_batch):
    dealt = [deal(rows, ranks, per_micro_batch, rank) for rank in range(ranks)]
    assert len({len(d) for d in dealt}) == 1
    assert all(len(micro_batch) == per_micro_batch for d in dealt for micro_batch in d)
    assert sorted(r for d in dealt for m in d for r in m if r is not None) == list(range(rows))


@pytest.mark.parametrize("ranks, per_micro_batch", [(1, 1), (2, 1), (3, 2), (7, 1), (4, 3)])
def test_the_step_does_not_depend_on_ranks_or_micro_batches(stage_data, ranks, per_micro_batch):
    whole = load_step(stage_data, 3, 10, 1, 0, 10)
    parts = [load_step(stage_data, 3, 10, ranks, rank, per_micro_batch) for rank in range(ranks)]
    rows = {
        tuple(r)
        for part in parts
        for b in part.micro_batches
        for r, name in zip(b.tokens.tolist(), b.domain, strict=True)
        if name
    }
    assert rows == {tuple(r) for r in whole.micro_batches[0].tokens.tolist()}
    assert {part.counts for part in parts} == {whole.counts}
    labels = sum((b.labels >= 0).sum() for part in parts for b in part.micro_batches)
    assert labels == whole.counts.labels == whole.counts.weight


def test_a_token_outside_the_vocabulary_is_named(stage_data):
    stage_data.vocab_size = 50
    with pytest.raises(
        DataError, match=r"domain [ab], document \d+: token id \d+ is outside the model's vocabulary of 50"
    ):
        stage_data.batch(stage_data.picks(0, 10))


def test_a_filler_row_has_no_labels():
    batch = make_batch([None], 8, 7, 10)
    assert (batch.labels == IGNORE).all() and (batch.tokens == 7).all() and batch.document_starts.tolist() == [0]


def test_a_domain_goes_on_in_the_next_stage_of_the_same_length(recipe_file):
    stage = {"tokens": 640, "seq_len": 64, "batch_tokens": 128, "lr": {"shape": "constant", "peak": 1e-3}}
    stages = [
        stage | {"name": "one", "mixture": {"a": 1.0}},
        stage | {"name": "two", "mixture": {"a": 0.5, "b": 0.5}},
        stage | {"name": "three", "seq_len": 32, "mixture": {"a": 1.0}},
    ]
    recipe = load_recipe(recipe_file(stages=stages))
    clock = Clock(recipe)
    orders = stage_orders(recipe, clock)
    assert [order.mixtures[0].first.get("a") for order in orders] == [0, 10, 0]
    tokens = domain_tokens(recipe, clock, orders, clock.num_steps)
    assert tokens["a"] + tokens["b"] == clock.num_tokens and abs(tokens["b"] - 320) <= 64
    assert domain_tokens(recipe, clock, orders, 5) == {"a": 640, "b": 0}


def test_prefetch_keeps_the_order_and_raises_what_went_wrong():
    def make(n):
        if n == 4:
            raise DataError("four")
        return StepData([], n, 0)

    ready = prefetch(make, range(1, 9))
    assert [next(ready).counts for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DataError, match="four"):
        next(ready)


def test_prefetch_ends_its_thread():
    ready = prefetch(lambda n: StepData([], n, 0), range(100))
    next(ready)
    ready.close()
    thread = next((t for t in threading.enumerate() if t.name == "prefetch"), None)
    if thread:
        thread.join(LONG_SECONDS)
    assert not any(t.name == "prefetch" and t.is_alive() for t in threading.enumerate())


@pytest.mark.parametrize("soft, hard, ends", [(256, 4096, "opened 300"), (256, 256, "allows a process 256")])
def test_many_sets_open_or_the_limit_is_named(recipe_file, prepared, tmp_path, soft, hard, ends):
    """300 sets of two open files each: the limit is raised as far as the system lets it, and `check` and the run say where that ends."""
    for number in range(300):
        for kind in ("bin", "idx", "json"):
            (tmp_path / f"many-{number}.{kind}").symlink_to(prepared / f"a.{kind}")
    path = recipe_file(
        data={"a": {"paths": [str(tmp_path / "many-*")]}, "b": {"paths": [str(prepared / "b")]}}, validation=[]
    )
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from megacpt.config.load import load_recipe
from megacpt.data.loader import open_domains
from megacpt.errors import ConfigError
from megacpt.plan.check import check
recipe = load_recipe(sys.argv[1])
if {hard} == 256:
    print(check(recipe, 1).problems)
try:
    print("opened", len(open_domains(recipe, ["a", "b"])["a"].sets))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.count(ends) == (2 if hard == 256 else 1), done.stdout + done.stderr
