import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import rate_at

from megacpt.config.clock import Clock
from megacpt.config.recipe import Recipe
from megacpt.config.sections.optimizer import LearningRate
from megacpt.optim.schedule import learning_rate


def recipe(*stages, lr=None) -> Recipe:
    stages = [{"name": f"s{i}", "mixture": {"a": 1.0}} | stage for i, stage in enumerate(stages)]
    return Recipe.model_validate(
        {
            "run": {"name": "t"},
            "model": {"config": "c", "tokenizer": "t"},
            "data": {"a": {"paths": ["p"]}},
            "stages": stages,
            "optimizer": {"lr": lr} if lr else {},
        }
    )


def simulate(r: Recipe) -> list[tuple]:
    """The clock spelled out: one step at a time."""
    steps, tokens = [], 0
    for index, stage in enumerate(r.stages):
        done = 0
        while done < stage.tokens:
            batch = next(b for at, b in reversed(stage.batch_tokens) if at <= done)
            steps.append((index, batch // stage.seq_len, done // stage.seq_len, tokens))
            done, tokens = done + batch, tokens + batch
    return steps


RAMP = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 20)), max_size=4)


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.sampled_from([1, 3, 8]), st.integers(1, 9), RAMP), min_size=1, max_size=3
    )
)
def test_the_clock_is_the_loop_spelled_out(stages):
    r = recipe(
        *(
            {
                "tokens": tokens,
                "seq_len": length,
                "batch_tokens": [[0, first * length], *sorted({at: [at, rows * length] for at, rows in ramp}.values())],
            }
            for tokens, length, first, ramp in stages
        )
    )
    clock, expected = Clock(r), simulate(r)
    assert clock.num_steps == len(expected)
    for number, (stage, rows, first, before) in enumerate(expected, 1):
        step = clock.step(number)
        assert (step.stage, step.rows, step.first_sequence, step.tokens_before) == (stage, rows, first, before)
    assert clock.num_tokens == clock.tokens_at(clock.num_steps) and clock.tokens_at(0) == 0


def test_llama3s_batch_ramp():
    """Llama 3, section 3.4.1: 4M until 252M tokens, 8M until 2.87T, then 16M."""
    r = recipe({"tokens": "15.6T", "seq_len": 8192, "batch_tokens": [["0", "4Mi"], ["252M", "8Mi"], ["2.87T", "16Mi"]]})
    clock = Clock(r)
    assert [clock.step(n).batch_tokens for n in (1, 61, 62)] == [4 << 20, 4 << 20, 8 << 20]
    assert clock.step(clock.num_steps).batch_tokens == 16 << 20


SHAPES = st.sampled_from(["constant", "cosine", "linear", "wsd"])


@given(
    SHAPES,
    st.integers(0, 400),
    st.integers(0, 400),
    st.integers(801, 5000),
    st.sampled_from(["linear", "cosine", "1-sqrt"]),
)
def test_learning_rates_rise_then_fall_and_end_where_they_should(shape, warmup, decay, total, tail):
    lr = LearningRate(
        shape=shape,
        peak=1.0,
        min=0.1,
        warmup_tokens=warmup,
        tail=tail,
        **({"decay_tokens": decay} if shape == "wsd" else {}),
    )
    rates = [learning_rate(lr, t, total) for t in range(total + 1)]
    top = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in zip(rates[:top], rates[1:], strict=False))
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert max(rates) == 1.0 and all(0 <= rate <= 1 for rate in rates)
    ends_high = shape == "constant" or (shape == "wsd" and decay == 0)
    assert rates[-1] == (1.0 if ends_high else pytest.approx(0.1))


def test_wsd_under_a_ramp_ends_at_its_minimum_at_the_last_token():
    r = recipe(
        {"tokens": 10_000, "seq_len": 8, "batch_tokens": [[0, 64], [1000, 256]]},
        lr={"shape": "wsd", "peak": 1e-3, "min": 1e-5, "warmup_tokens": 500, "decay_tokens": 2000, "tail": "1-sqrt"},
    )
    clock = Clock(r)
    assert rate_at(r, clock, clock.num_steps) == pytest.approx(1e-5)


def test_an_infinite_schedule_holds_its_constant_and_ends_at_its_minimum():
    lr = LearningRate(
        shape="infinite", peak=3e-4, start=3e-5, warmup_tokens=100, cooldown_tokens=200, constant=1e-4, decay_tokens=300, min=1e-6,
        tail="exponential",
    )  # fmt: skip

    def rate(tokens):
        return learning_rate(lr, tokens, 1000)

    assert rate(0) == 3e-5 and rate(50) == pytest.approx(1.65e-4) and rate(100) == pytest.approx(3e-4)
    assert rate(200) == pytest.approx(2e-4) and rate(300) == rate(700) == pytest.approx(1e-4)
    assert rate(850) == pytest.approx(1e-5) and rate(1000) == pytest.approx(1e-6)


def test_a_linear_ramp_is_megatrons():
    """start 16, increment 8, 300,000 samples to 1,024 (facts of Megatron-LM's calculator): 126 increments, the last at the end."""
    r = recipe({"tokens": 400_000, "seq_len": 1, "batch_tokens": {"start": 16, "increment": 8, "over": 300_000, "final": 1024},
                "lr": {"shape": "constant", "peak": 1.0}})  # fmt: skip
    ramp = r.stages[0].batch_tokens
    assert len(ramp) == 127 and ramp[0] == (0, 16) and ramp[-1] == (300_000, 1024)
    clock = Clock(r)
    sizes = [clock.step(n) for n in range(1, clock.num_steps + 1)]
    assert next(s.number for s in sizes if s.batch_tokens == 1024) - 1 == 1319  # steps of the ramp
    for bad in ({"start": 16, "increment": 9, "over": 10, "final": 1024}, {"start": 16, "final": 32}):
        with pytest.raises(ValueError):
            recipe({"tokens": 1, "seq_len": 1, "batch_tokens": bad})


@given(st.integers(1, 2000), st.integers(0, 3000), st.integers(0, 3000))
def test_an_extended_stage_waits_with_its_rate(tokens, first, second):
    """Extensions add whole steps; the rate stays at the stage's end; later stages have the rates they would have had."""
    lr = {"shape": "linear", "peak": 1.0}
    stages = [
        {"tokens": tokens, "seq_len": 1, "batch_tokens": [[0, 3], [50, 7]]},
        {"tokens": 500, "seq_len": 1, "batch_tokens": 10},
    ]
    r = recipe(*stages, lr=lr)
    plain, longer = Clock(r), Clock(r, {"s0": first + second})
    n = plain.stage_steps(0)
    assert longer.planned_tokens == plain.planned_tokens and longer.stage_tokens(1) == plain.stage_tokens(1)
    assert longer.stage_tokens(0) >= plain.stage_tokens(0)
    assert all(longer.step(k) == plain.step(k) for k in range(1, n + 1))
    held = rate_at(r, plain, n)
    for k in range(n + 1, longer.stage_steps(0) + 1):
        assert rate_at(r, longer, k) == held and longer.step(k).stage == 0
    shift = longer.stage_steps(0) - n
    for k in range(n + 1, plain.num_steps + 1):
        assert rate_at(r, longer, k + shift) == rate_at(r, plain, k)
