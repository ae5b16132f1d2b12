"""Schedules and their simulator: what the formulas promise, what NCCL asks, and that the checks can fail."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.sections.parallel import Parallel
from megacpt.model.split import plan_pipeline, split_layers
from megacpt.parallel.pipeline.schedule import SCHEDULES, Action, Schedule, make_schedule, virtual_stages_of
from megacpt.parallel.pipeline.simulate import Op, check_messages, input_of, lower_to_ops, output_of, simulate

EQUAL = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def stages(name: str, virtual: int) -> int:
    return virtual_stages_of(name, virtual)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 9),
    st.booleans(),
)
def test_every_schedule_runs_each_action_once_and_never_deadlocks(name, ranks, virtual, micro_batches, more, least):
    virtual = stages(name, virtual)
    contiguous = ranks + more if name == "interleaved" else None
    schedule = make_schedule(name, ranks, virtual, micro_batches, contiguous)
    if least and name == "interleaved":  # the generator with less memory, if there is one
        peak = max(simulate(schedule).peak)
        try:
            schedule = make_schedule(name, ranks, virtual, micro_batches, contiguous, peak - 1)
            assert max(simulate(schedule).peak) < peak
        except ValueError as error:
            assert f"max_in_flight is {peak - 1}" in str(error)
    assert len(schedule.ranks) == ranks and schedule.num_stages == ranks * virtual
    kinds = "FIW" if name.startswith("zb") else "FB"
    wanted = {Action(k, s, m) for k in kinds for s in range(ranks * virtual) for m in range(micro_batches)}
    done = [action for actions in schedule.ranks for action in actions]
    assert len(done) == len(wanted) and set(done) == wanted
    for rank, actions in enumerate(schedule.ranks):
        assert all(schedule.placement[action.stage] == rank for action in actions)
        if kinds == "FIW":
            at = {action: i for i, action in enumerate(actions)}
            assert all(at[a] > at[Action("I", a.stage, a.micro_batch)] for a in actions if a.kind == "W")
    assert simulate(schedule) is not None and check_messages(schedule) == "sound"
    forward = schedule.forward_only()
    assert simulate(forward) is not None and check_messages(forward) == "sound"


@pytest.mark.parametrize("ranks, virtual", itertools.product((2, 3, 4, 8), (1, 2, 3, 4)))
def test_the_bubble_is_the_papers(ranks, virtual):
    """(P - 1) / (V M) for M >= P, any M and N (Llama 3, arXiv 2407.21783, section 3.3.2)."""
    name = "1f1b" if virtual == 1 else "interleaved"
    for micro_batches in range(ranks, 4 * ranks):
        for contiguous in (None,) if virtual == 1 else (ranks, ranks + 1, 2 * ranks):
            found = simulate(make_schedule(name, ranks, virtual, micro_batches, contiguous))
            assert found.bubble == pytest.approx((ranks - 1) / (virtual * micro_batches))


def test_llama_3_figure_6():
    """Four ranks, eight stages, ten micro-batches, five contiguous: bubble 0.15, twelve in flight on rank 0."""
    schedule = make_schedule("interleaved", 4, 2, 10, 5)
    found = simulate(schedule)
    assert found.bubble == pytest.approx(0.15) and found.peak[0] == 12
    assert [(a.stage, a.micro_batch) for a in schedule.ranks[0] if a.kind == "F"][:12] == [
        *((0, m) for m in range(5)), *((4, m) for m in range(5)), (0, 5), (0, 6)
    ]  # fmt: skip


def test_fewer_micro_batches_than_ranks():
    assert simulate(make_schedule("interleaved", 4, 2, 3, 4)).bubble == pytest.approx(2 / 3)


def test_one_forward_one_backward_keeps_at_most_p():
    assert simulate(make_schedule("1f1b", 4, 1, 16)).peak == (4, 3, 2, 1)
    assert simulate(make_schedule("gpipe", 4, 1, 16)).peak == (16, 16, 16, 16)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zero_bubble_idles_as_published(ranks):
    """ZB-H1: (P - 1)(F + I - W), memory of 1F1B's first rank. V-shaped: P - 1 with equal times, 2 P half stages."""
    for micro_batches in (2 * ranks, 2 * ranks + 1, 4 * ranks):
        h1 = simulate(make_schedule("zb-h1", ranks, 1, micro_batches), cost=EQUAL)
        assert h1.time - 3 * micro_batches == ranks - 1 and max(h1.peak) == ranks
        v = simulate(make_schedule("zb-v", ranks, 2, micro_batches), cost=EQUAL)
        assert v.time - 6 * micro_batches == ranks - 1 and max(v.peak) == 2 * ranks
        whole = simulate(make_schedule("1f1b", ranks, 1, micro_batches))
        assert v.bubble < h1.bubble < whole.bubble


def test_a_ragged_number_has_two_generators():
    """P 16, V 8, M 31: least bubble, or least memory."""
    time, memory = (make_schedule("interleaved", 16, 8, 31, 16, bound) for bound in (None, 160))
    assert max(simulate(time).peak) > 160 >= max(simulate(memory).peak)
    assert simulate(time).bubble < simulate(memory).bubble
    with pytest.raises(ValueError, match=r"keeps \d+ or \d+ stage activations on a rank, max_in_flight is 20"):
        make_schedule("interleaved", 16, 8, 31, 16, 20)


def test_the_simulator_sees_a_deadlock():
    good = make_schedule("1f1b", 2, 1, 4)
    swapped = Schedule((tuple(sorted(good.ranks[0], key=lambda a: a.kind)), good.ranks[1]), good.placement)
    assert simulate(swapped) is None and check_messages(swapped) == "deadlock"


def test_the_rule_of_nccl_sees_receives_in_another_order():
    """No tags: the second activation would land in the first one's buffer."""
    schedule = make_schedule("gpipe", 2, 1, 3)
    programs = [list(lower_to_ops(schedule, rank)) for rank in range(2)]
    receives = [i for i, op in enumerate(programs[1]) if op.kind == "receive"]
    first, second = receives[:2]
    programs[1][first], programs[1][second] = programs[1][second], programs[1][first]
    assert check_messages(schedule, programs) == "mismatch"


def test_the_rule_of_nccl_sees_one_communicator_for_both_kinds(monkeypatch):
    """With activations and gradients on one communicator, what waits in front blocks what is needed, when receives are posted
    in the order of their use; `lower_to_ops` posts in the order of the sends, which does not even need two."""
    import megacpt.parallel.pipeline.simulate as module

    both = [make_schedule("interleaved", 2, 2, m) for m in (1, 2, 3, 5, 8)]
    played = lambda schedule: check_messages(schedule, [one_ahead(schedule, rank) for rank in range(2)], holds=False)
    assert all(played(schedule) == check_messages(schedule) == "sound" for schedule in both)
    monkeypatch.setattr(module, "channel", lambda source, target, tensor: ("all", "up" if target > source else "down"))
    assert any(played(schedule) != "sound" for schedule in both)
    assert all(check_messages(schedule) == "sound" for schedule in both)


def test_the_programs_last_message_must_arrive():
    schedule = make_schedule("1f1b", 2, 1, 2)
    programs = [list(lower_to_ops(schedule, rank)) for rank in range(2)]
    programs[1].remove(next(op for op in reversed(programs[1]) if op.kind == "send"))
    assert check_messages(schedule, programs) == "deadlock"


def one_ahead(schedule: Schedule, rank: int, behind_its_cause: bool = True) -> list[Op]:
    """The posting of a program that looks at its own list only: each receive one action ahead.

    Args:
        behind_its_cause: also behind an action that the tensor depends on; without, in front of the action that needs it.
    """
    actions, program, posted, depends = schedule.ranks[rank], [], 0, ancestors(schedule)
    for i, action in enumerate(actions):
        while posted < min(len(actions), i + 2):
            tensor = input_of(actions[posted], schedule)
            if tensor and schedule.placement[tensor[1]] != rank:
                if posted > i and not behind_its_cause and depends[tensor][rank] >= i:
                    break
                program.append(Op("receive", actions[posted], tensor, schedule.placement[tensor[1]]))
            posted += 1
        program.append(Op("run", action))
        if (given := output_of(action, schedule)) and given[1] != rank:
            program.append(Op("send", action, *given))
    return program


def ancestors(schedule: Schedule) -> dict[tuple[str, int, int], tuple[int, ...]]:
    """Of each tensor: on every rank, the place in its list of the last action that the tensor depends on, -1 for none."""
    found: dict[tuple, tuple[int, ...]] = {None: (-1,) * len(schedule.ranks)}
    for rank, i in ((r, i) for _, r, i in sorted((t, r, i) for r, i, t in begins(schedule))):
        action = schedule.ranks[rank][i]
        before = [found[input_of(action, schedule)]] + ([found[rank, i - 1]] if i else [])
        mine = [max(places) for places in zip(*before, strict=True)]
        mine[rank] = i
        found[rank, i] = tuple(mine)
        kind = {"F": "activation", "W": "weights"}.get(action.kind, "gradient")
        found[kind, action.stage, action.micro_batch] = tuple(mine)
    return found


def begins(schedule: Schedule) -> list[tuple[int, int, float]]:
    """(rank, place in its list, time) of all actions; what depends on another begins later."""
    spans = simulate(schedule).spans
    return [(rank, i, begin) for rank, mine in enumerate(spans) for i, (_, begin, _) in enumerate(mine)]


def held_by_their_cause(schedule: Schedule, programs) -> int:
    """Receives that are posted in front of an action on which their tensor depends."""
    depends, count = ancestors(schedule), 0
    for rank, program in enumerate(programs):
        done = 0
        for op in program:
            done += op.kind == "run"
            count += op.kind == "receive" and depends[op.tensor][rank] >= done
    return count


def every_schedule(ranks=(1, 2, 3, 4, 8), micro_batches=(1, 2, 3, 5, 8, 19)):
    for name, p, v, m in itertools.product(SCHEDULES, ranks, (1, 2, 3), micro_batches):
        for contiguous in (None, p + 1, 2 * p) if name == "interleaved" else (None,):
            schedule = make_schedule(name, p, stages(name, v), m, contiguous)
            yield schedule
            yield schedule.forward_only()


class TestPosting:
    """A message that was posted holds the device until its partner is there, and any action may have to wait for the device."""

    def test_no_action_waits_for_a_message_that_waits_for_it(self):
        for schedule in every_schedule():
            programs = [lower_to_ops(schedule, rank) for rank in range(len(schedule.ranks))]
            assert check_messages(schedule, programs) == "sound" and held_by_their_cause(schedule, programs) == 0

    @pytest.mark.parametrize(
        "name, virtual, micro_batches, count",
        [
            ("1f1b", 1, 1, 3),
            ("1f1b", 1, 2, 2),
            ("gpipe", 1, 1, 3),
            ("gpipe", 1, 8, 3),
            ("interleaved", 2, 1, 11),
            ("interleaved", 2, 2, 2),
            ("interleaved", 2, 4, 1),
            ("zb-v", 2, 1, 6),
            ("zb-v", 2, 2, 4),
        ],
    )
    def test_one_action_ahead_holds_what_it_waits_for(self, name, virtual, micro_batches, count):
        """The twin: found by hand on four ranks."""
        schedule = make_schedule(name, 4, virtual, micro_batches)
        programs = [one_ahead(schedule, rank) for rank in range(4)]
        assert held_by_their_cause(schedule, programs) == count
        assert (
            check_messages(schedule, programs, holds=False) == "sound"
            and check_messages(schedule, programs) == "deadlock"
        )

    def test_to_spare_each_receive_its_own_cause_is_not_enough(self):
        """Two ranks, one forward and one backward: each holds in front of an action the message that the other's action would
        send, though neither tensor depends on the action behind which it is posted."""
        schedule = make_schedule("1f1b", 2, 1, 2)
        programs = [one_ahead(schedule, rank, behind_its_cause=False) for rank in range(2)]
        assert held_by_their_cause(schedule, programs) == 0
        assert (
            check_messages(schedule, programs, holds=False) == "sound"
            and check_messages(schedule, programs) == "deadlock"
        )

    def test_nor_is_to_post_none_ahead(self):
        """A ring of senders, each held by a receive that stands behind what the next one waits for."""
        schedule = make_schedule("gpipe", 2, 2, 4)
        programs = []
        for rank in range(2):
            late = []
            for op in (op for op in lower_to_ops(schedule, rank) if op.kind != "receive"):
                tensor = input_of(op.action, schedule)
                if op.kind == "run" and tensor and schedule.placement[tensor[1]] != rank:
                    late.append(Op("receive", op.action, tensor, schedule.placement[tensor[1]]))
                late.append(op)
            programs.append(late)
        assert (
            check_messages(schedule, programs, holds=False) == "sound"
            and check_messages(schedule, programs) == "deadlock"
        )

    @pytest.mark.parametrize(
        "name, virtual", [("gpipe", 1), ("1f1b", 1), ("interleaved", 4), ("zb-h1", 1), ("zb-v", 2)]
    )
    def test_transfers_hide_as_well_as_one_action_ahead(self, name, virtual):
        """A transfer of a twentieth of a forward, which begins when it is posted and sent: at most 0.3 % of the step more than
        with all receives one action ahead; posted in front of what needs them they cost up to 3 %."""
        schedule = make_schedule(name, 4, virtual, 32)
        times = [
            time_of(schedule, [post(schedule, rank) for rank in range(4)], 0.05) for post in (lower_to_ops, one_ahead)
        ]
        assert times[0] <= 1.003 * times[1]

    def test_what_waits_for_its_action_is_bounded(self):
        """Inputs of stages that came early: N - P + 1 behind the stage before on a ring, 3 without one."""
        for name, virtual, contiguous, most in (
            ("1f1b", 1, None, 1), ("zb-h1", 1, None, 1), ("zb-v", 2, None, 3), ("interleaved", 4, 4, 3), ("interleaved", 4, 6, 6)
        ):  # fmt: skip
            schedule = make_schedule(name, 4, virtual, 32, contiguous)
            assert max(most_waiting(schedule, rank) for rank in range(4)) == most


def most_waiting(schedule: Schedule, rank: int) -> int:
    """Most tensors that are posted and not yet used while an action runs that needs another."""
    waiting, most = set(), 0
    for op in lower_to_ops(schedule, rank):
        if op.kind == "receive":
            waiting.add(op.tensor)
        elif op.kind == "run":
            waiting.discard(input_of(op.action, schedule))
            most = max(most, len(waiting))
    assert not waiting
    return most


def time_of(schedule: Schedule, programs, transfer: float) -> float:
    """The time of a step when messages travel from when they are both sent and posted."""
    cost, ready, posted = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}, {}, {}
    now, at, moved = [0.0] * len(programs), [0] * len(programs), True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                op = program[at[rank]]
                if op.kind == "receive":
                    posted[op.tensor] = now[rank]
                elif op.kind == "run":
                    tensor = input_of(op.action, schedule)
                    if tensor and tensor not in ready:
                        break
                    far = tensor in posted
                    come = max(ready[tensor], posted[tensor]) + transfer if far else ready.get(tensor, 0.0)
                    now[rank] = max(now[rank], come) + cost[op.action.kind]
                    if given := output_of(op.action, schedule):
                        ready[given[0]] = now[rank]
                at[rank] += 1
                moved = True
    return max(now)


class TestStages:
    def test_llama_3s_405b(self):
        """126 layers on 128 stages: the first holds the embedding alone, the last the head alone."""
        counts = split_layers(126, 128, 1.0, 1.0)
        assert counts[0] == counts[-1] == 0 and set(counts[1:-1]) == {1}

    @given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 4), st.floats(0, 4))
    def test_no_split_is_lighter(self, layers, stages, embedding, head):
        counts = split_layers(layers, stages, embedding, head)
        assert sum(counts) == layers and min(counts) >= 0
        loads = [float(c) for c in counts]
        loads[0] += embedding
        loads[-1] += head
        for stage in range(stages):  # moving a layer from the heaviest does not help
            if counts[loads.index(max(loads))]:
                assert loads[stage] + 1 >= max(loads) - 1e-9 or stage == loads.index(max(loads))

    def test_explicit_layers(self):
        plan = plan_pipeline(5, Parallel(pipeline=2, virtual_stages=2, stage_layers=[1, 2, 2, 0]))
        assert plan.layers == (range(0, 1), range(1, 3), range(3, 5), range(5, 5)) and plan.placement == (0, 1, 0, 1)

    @pytest.mark.parametrize(
        "keys, expected",
        [
            ({"pipeline": 4, "virtual_stages": 2}, "5 layers leave stage"),
            ({"pipeline": 2, "stage_layers": [2, 2]}, "2 stages with 4 layers"),
            ({"pipeline": 2, "stage_layers": [5]}, "are 2 stages"),
            ({"pipeline": 3, "stage_layers": [3, 0, 2]}, "leave stage 1 with none"),
            ({"pipeline": 2, "schedule": "zb-v"}, 'schedule "zb-v" has 2 a rank'),
            ({"pipeline": 2, "schedule": "1f1b", "virtual_stages": 2}, 'or schedule = "interleaved"'),
        ],
    )
    def test_splits_that_cannot_be(self, keys, expected):
        with pytest.raises(ValueError) as error:
            plan_pipeline(5, Parallel(**keys))
        assert expected in str(error.value)
