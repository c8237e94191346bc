"""The buffer of rows: the drawing of a circular buffer, each row handed out once, advantages across the wrap."""

import doctest
import gc
import threading
import weakref

import pytest
import torch
from waiting import PATIENCE_S, Waiting

from asyncflow.errors import AsyncflowError
from asyncflow.ppo.gae import Transitions, compute_gae
from asyncflow.rollout import buffer as module
from asyncflow.rollout.buffer import RolloutBuffer
from asyncflow.rollout.ring import BufferClosed

NUM_ENVS = 2
A, OBS = torch.zeros(2, 3), {"state": torch.zeros(2)}  # fields of a row


def transition(number):
    """Values that encode (transition, environment)."""
    code = 10.0 * number + torch.arange(float(NUM_ENVS))
    return {"code": code, "obs": {"state": code[:, None].expand(-1, 3)}}


def make(numbers=(), capacity=4, **options):
    """A buffer whose unwritten rows are NaN, after adding these transitions."""
    buffer = RolloutBuffer(capacity, **options)
    for number in numbers:
        buffer.add(transition(number))
        if number == numbers[0]:
            for tensor in buffer.memory.exclude("valid").values(True, True):
                tensor[1:] = torch.nan
    return buffer


def drawing(buffer):
    """What lies where, as in the docstring's drawing; checks that every number of a row belongs to it."""
    memory = buffer.memory
    shown = []
    for row in range(buffer.capacity):
        code = memory["code"][row]
        if code.isnan().all():
            assert memory["obs", "state"][row].isnan().all()
            shown.append("_")
        else:
            number = int(code[0]) // 10
            assert torch.equal(code, transition(number)["code"])
            assert torch.equal(memory["obs", "state"][row], transition(number)["obs"]["state"])
            shown.append(f"T{number}")
    return shown


def numbers_of(rows):
    return (rows["code"][:, 0] / 10).int().tolist()


def test_the_docstrings_lines_run():
    failed, tried = doctest.testmod(module)
    assert not failed
    assert tried > 10


@pytest.mark.parametrize(
    ("num_added", "shown", "is_full"),
    [
        (1, ["T0", "_", "_", "_"], False),
        (2, ["T0", "T1", "_", "_"], False),
        (3, ["T0", "T1", "T2", "_"], False),
        (4, ["T0", "T1", "T2", "T3"], True),
        (5, ["T4", "T1", "T2", "T3"], True),
        (6, ["T4", "T5", "T2", "T3"], True),
        (9, ["T8", "T5", "T6", "T7"], True),
    ],
)
def test_rows_lie_as_drawn(num_added, shown, is_full):
    buffer = make(range(num_added))
    assert drawing(buffer) == shown
    assert buffer.is_full() == is_full
    assert len(buffer) == min(num_added, 4)
    assert buffer.num_dropped == max(0, num_added - 4)


@pytest.mark.parametrize("num_added", [1, 4, 5, 6, 7, 11])
def test_rows_come_out_in_the_order_of_time_whatever_their_places(num_added):
    buffer = make(range(num_added))
    rows = buffer.get(flatten=False)
    assert numbers_of(rows) == list(range(num_added))[-4:]
    assert set(rows.keys()) == {"code", "obs"}


def test_each_row_is_handed_out_once():
    buffer, seen = make(range(4)), []
    seen += numbers_of(buffer.get(flatten=False))
    buffer.add(transition(4))
    assert drawing(buffer) == ["T4", "T1", "T2", "T3"]  # they lie there still, and are not handed out again
    assert not buffer.is_full()
    seen += numbers_of(buffer.get(flatten=False))
    for number in (5, 6, 7):
        buffer.add(transition(number))
    seen += numbers_of(buffer.get(flatten=False))
    assert seen == list(range(8))
    assert buffer.num_dropped == 0
    with pytest.raises(AsyncflowError, match="no row that was not handed out"):
        buffer.get()


def test_what_was_handed_out_stays_when_its_place_is_written_again():
    buffer = make(range(4))
    rows = buffer.get(flatten=False)
    for number in range(4, 8):
        buffer.add(transition(number))
    assert numbers_of(rows) == [0, 1, 2, 3]


def test_flat_rows_stand_by_time_then_by_environment():
    rows = make(range(6)).get(flatten=True)
    assert rows["code"].tolist() == [20.0, 21.0, 30.0, 31.0, 40.0, 41.0, 50.0, 51.0]
    assert rows["obs", "state"].shape == (8, 3)


def test_memory_of_rows_is_allocated_once():
    buffer = make([0])
    before = [tensor.data_ptr() for tensor in buffer.memory.values(True, True)]
    for number in range(1, 9):
        buffer.add(transition(number))
    assert before == [tensor.data_ptr() for tensor in buffer.memory.values(True, True)]


def test_cleared_rows_are_not_handed_out_and_counted_as_dropped():
    buffer = make(range(3))
    buffer.clear()
    assert (len(buffer), buffer.num_dropped) == (0, 3)
    buffer.add(transition(3))
    assert drawing(buffer) == ["T0", "T1", "T2", "T3"]
    assert numbers_of(buffer.get(flatten=False)) == [3]


def stacked(numbers):
    pairs = [transition(number) for number in numbers]
    return {
        "code": torch.stack([each["code"] for each in pairs]),
        "obs": {"state": torch.stack([each["obs"]["state"] for each in pairs])},
    }


def test_a_synchronous_buffer_takes_a_whole_rollout_and_hands_it_out_once():
    buffer = RolloutBuffer(3, buffer_type="standard")
    for first in (0, 3):
        buffer.add(stacked(range(first, first + 3)))
        assert buffer.is_full()
        assert drawing_of_three(buffer) == [first, first + 1, first + 2]
        assert numbers_of(buffer.get(flatten=False)) == [first, first + 1, first + 2]
        assert not buffer.is_full()
    buffer.add(stacked(range(6, 9)))
    buffer.add(stacked(range(9, 12)))  # nobody took the one before
    assert numbers_of(buffer.get(flatten=False)) == [9, 10, 11]
    assert buffer.num_dropped == 3


def drawing_of_three(buffer):
    return numbers_of(buffer.memory)


def test_both_types_hand_out_the_same_rows():
    rollout, rows = RolloutBuffer(4, buffer_type="standard"), make(range(4))
    rollout.add(stacked(range(4)))
    assert torch.equal(rollout.get()["code"], rows.get()["code"])


def test_advantages_are_right_across_the_wrap_by_hand():
    """Rows T3 and T4 lie at places 3 and 0; what T4 is worth reaches T3, and stops where T4's episode began."""
    gamma, gae_lambda = 0.5, 0.5
    rewards, values, last_value = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 6.0
    ends = {2, 4}  # the episode of T2 was solved, that of T4 as well
    buffer = RolloutBuffer(4)
    for t, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        row = {"rewards": reward, "values": value, "terminated": t in ends}
        buffer.add({name: torch.tensor([number]) for name, number in row.items()})
    assert buffer.memory["rewards"][:, 0].tolist() == [16.0, 32.0, 4.0, 8.0]
    rows = buffer.get(flatten=False)
    next_values = torch.cat([rows["values"][1:], torch.tensor([[last_value]])])
    discounts = torch.full_like(next_values, gamma)
    ended = rows["terminated"]
    transitions = Transitions(rows["rewards"], rows["values"], next_values, discounts, ended, ended)
    advantages, returns = compute_gae(transitions, gae_lambda)
    last = 32.0 + 0.5 * 6.0 - 5.0  # T5: 30
    at_4 = 16.0 - 4.0  # T4: solved, nothing follows
    at_3 = 8.0 + 0.5 * 4.0 - 3.0 + 0.25 * at_4  # T3: 7 + 3
    at_2 = 4.0 - 2.0  # T2: solved
    assert advantages[:, 0].tolist() == [at_2, at_3, at_4, last] == [2.0, 10.0, 12.0, 30.0]
    assert returns[:, 0].tolist() == [4.0, 13.0, 16.0, 35.0]


def test_what_is_invalid_is_the_users_to_say():
    buffer = RolloutBuffer(2)
    for is_valid in (True, False):
        buffer.add({"reward": torch.zeros(1), "valid": torch.tensor([is_valid])})
    assert buffer.get()["valid"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"a": A}, "obs.state is missing"),
        ({"a": A, "obs": OBS, "b": OBS["state"]}, "b is new; the first row had a"),
        ({"a": torch.zeros(2, 4), "obs": OBS}, r"a: \[2, 4\] torch.float32, expected \[2, 3\]"),
        ({"a": torch.zeros(1, 3), "obs": OBS}, r"a: \[1, 3\] torch.float32, expected \[2, 3\]"),
        ({"a": A.double(), "obs": OBS}, r"a: .* torch.float64, expected .* torch.float32"),
    ],
)
def test_a_row_unlike_the_first_is_refused_by_name_and_not_added(second, said):
    buffer = RolloutBuffer(2)
    buffer.add({"a": A, "obs": OBS})
    with pytest.raises(AsyncflowError, match=said):
        buffer.add(second)
    assert len(buffer) == 1


def test_a_rollout_of_another_length_is_refused():
    buffer = RolloutBuffer(3, buffer_type="standard")
    with pytest.raises(AsyncflowError, match=r"code: \[2, 2\] torch.float32, expected \[3, 2\]"):
        buffer.add(stacked(range(2)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": 0}, "capacity = 0: must be at least 1"),
        ({"capacity": 1, "buffer_type": "async"}, "buffer_type = 'async': must be one of vla, standard"),
        ({"capacity": 1, "on_full": "drop"}, "on_full = 'drop': must be one of overwrite, block"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused(options, said):
    with pytest.raises(AsyncflowError, match=said):
        RolloutBuffer(**options)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"reward": 1.0}, r"reward: tensors \[N, ...\] are expected"),
        ({}, r"a row: tensors \[N, ...\] are expected"),
        ({"reward": [1.0], "done": [False, True]}, "done: of 2 environments, others are of 1"),
    ],
)
def test_a_first_row_without_environments_is_refused(row, said):
    with pytest.raises(AsyncflowError, match=said):
        RolloutBuffer(2).add(row)


def test_two_threads_pass_every_row_once_and_in_order():
    buffer, seen, num_rows = RolloutBuffer(4, on_full="block"), [], 400
    collector = threading.Thread(target=lambda: [buffer.add(transition(n)) for n in range(num_rows)], daemon=True)
    collector.start()
    while len(seen) < num_rows:
        seen += numbers_of(buffer.get(flatten=False, wait=True))
    collector.join(PATIENCE_S)
    assert seen == list(range(num_rows))


def test_a_full_buffer_that_blocks_waits_until_its_rows_were_got():
    buffer = make(range(4), on_full="block")
    collector = Waiting(lambda: buffer.add(transition(4)), buffer._ring._changed)
    assert collector.waits()
    assert drawing(buffer) == ["T0", "T1", "T2", "T3"]
    assert numbers_of(buffer.get(flatten=False)) == [0, 1, 2, 3]
    collector.finish()
    assert drawing(buffer) == ["T4", "T1", "T2", "T3"]


@pytest.mark.parametrize("num_added", [0, 1])
def test_close_wakes_who_waits_for_rows(num_added):
    buffer = make(range(num_added))
    condition = buffer._ring._changed if num_added else buffer._allocated
    trainer = Waiting(lambda: buffer.get(wait=True), condition)
    assert trainer.waits()
    buffer.close()
    with pytest.raises(BufferClosed):
        trainer.finish()


def test_a_buffer_that_is_let_go_frees_its_memory_at_once():
    buffer = make(range(2))
    gc.disable()
    try:
        ring = weakref.ref(buffer._ring)
        del buffer
        assert ring() is None
    finally:
        gc.enable()
