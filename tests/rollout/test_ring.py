"""The ring: where writes land, who owns a slot when, who wakes whom, and the books."""

import threading

import pytest
import torch
from tensordict import TensorDict
from waiting import PATIENCE_S, Waiting

from asyncflow.envs.base import Fault
from asyncflow.errors import AsyncflowError
from asyncflow.rollout.episodes import Episode
from asyncflow.rollout.plan import RingPlan
from asyncflow.rollout.ring import BufferClosed, RolloutInfo, RolloutRing
from asyncflow.simulators.spec import EnvSpec

CPU = torch.device("cpu")
NUM_STEPS, NUM_ENVS = 3, 4


def make_buffer(num_slots=2, is_overwriting=False):
    fields = TensorDict({"ticket": torch.zeros(NUM_ENVS), "valid": torch.zeros(NUM_ENVS, dtype=torch.bool)}, [NUM_ENVS])
    obs = TensorDict({"state": torch.zeros(NUM_ENVS, 2)}, [NUM_ENVS])
    return RolloutRing(RingPlan(fields, obs, num_slots, NUM_STEPS, max_truncations=1), CPU, is_overwriting)


def fill(buffer, groups=(range(NUM_ENVS),), is_valid=True):
    """Collect one rollout whose every number encodes (rollout, decision, environment)."""
    slot = buffer.begin_rollout()
    write(slot, groups, is_valid)
    hand_over(slot)
    return slot.index


def write(slot, groups=(range(NUM_ENVS),), is_valid=True):
    for t in range(NUM_STEPS):
        for group in groups:
            ids = torch.tensor(list(group))
            obs = TensorDict({"state": ids[:, None].expand(-1, 2) + 10.0 * t}, [len(ids)])
            slot.add(t, group, obs, {"ticket": 100.0 * slot.index + 10 * t + ids})
            slot.add_outcome(t, group, {"valid": torch.full((len(group),), is_valid)})


def hand_over(slot):
    episodes, faults = (Episode(slot.index, 0.0, 1, False),), (Fault("died", str(slot.index)),)
    slot.finish(RolloutInfo(slot.index, episodes, {}, faults))


def written_only(slot, num_decisions):
    """Enter decisions of all environments into the books, whatever is in them."""
    for t in range(num_decisions // NUM_ENVS):
        slot.add_outcome(t, range(NUM_ENVS), {})


def expected(index):
    return 100.0 * index + 10 * torch.arange(3.0)[:, None] + torch.arange(4.0)


def test_every_write_lands_at_its_slot_step_and_environment():
    buffer = make_buffer()
    for tensor in buffer.memory.values(True, True):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    fill(buffer, groups=(range(0, 4, 2), range(1, 4, 2)))
    rollout = buffer.take()
    assert torch.equal(rollout.data["ticket"], expected(0))
    assert torch.equal(rollout.obs["state"][:-1, :, 0], expected(0))
    assert rollout.obs["state"][-1].isnan().all()  # nobody wrote the bootstrap row


def test_rollouts_come_out_in_order_and_once():
    buffer, taken = make_buffer(num_slots=2), []
    for _ in range(5):
        fill(buffer)
        rollout = buffer.take()
        taken.append(rollout.index)
        assert torch.equal(rollout.data["ticket"], expected(rollout.index))
        buffer.release(rollout)
    assert taken == [0, 1, 2, 3, 4]


def test_the_oldest_ready_rollout_comes_first():
    buffer = make_buffer(num_slots=3)
    for _ in range(3):
        fill(buffer)
    assert [buffer.take().index for _ in range(3)] == [0, 1, 2]


def test_a_full_ring_blocks_the_collector_until_a_release():
    """A full buffer must not be trained on again and again, nor overwritten."""
    buffer = make_buffer(num_slots=1)
    fill(buffer)
    rollout = buffer.take()
    collector = Waiting(buffer.begin_rollout, buffer._changed)
    assert collector.waits()
    buffer.release(rollout)
    slot = collector.finish()
    assert (slot.index, slot.position) == (1, 0)


def test_the_trainer_waits_for_a_rollout_and_is_woken_by_it():
    buffer = make_buffer()
    trainer = Waiting(buffer.take, buffer._changed)
    assert trainer.waits()
    fill(buffer)
    assert trainer.finish().index == 0


@pytest.mark.parametrize("wait", ["take", "begin_rollout"])
def test_close_wakes_whoever_waits(wait):
    buffer = make_buffer(num_slots=1)
    if wait == "begin_rollout":
        fill(buffer)
    thread = Waiting(getattr(buffer, wait), buffer._changed)
    assert thread.waits()
    buffer.close()
    with pytest.raises(BufferClosed):
        thread.finish()


def test_overwriting_recycles_the_oldest_ready_rollout_and_counts_it_as_dropped():
    buffer = make_buffer(num_slots=2, is_overwriting=True)
    for _ in range(3):
        fill(buffer)
    rollout = buffer.take()
    assert rollout.index == 1
    assert buffer.books() == {"collected": 36, "trained": 0, "dropped": 12, "invalid": 0, "in_flight": 24}


def test_overwriting_never_takes_a_rollout_that_is_being_trained():
    buffer = make_buffer(num_slots=1, is_overwriting=True)
    fill(buffer)
    buffer.take()
    collector = Waiting(buffer.begin_rollout, buffer._changed)
    assert collector.waits()
    buffer.close()
    with pytest.raises(BufferClosed):
        collector.finish()


def test_the_books_balance_in_every_state():
    buffer = make_buffer()
    fill(buffer)
    assert buffer.books() == {"collected": 12, "trained": 0, "dropped": 0, "invalid": 0, "in_flight": 12}
    buffer.begin_rollout().add_outcome(0, range(2), {})
    assert buffer.books()["in_flight"] == 14
    buffer.release(buffer.take())
    assert buffer.books() == {"collected": 14, "trained": 12, "dropped": 0, "invalid": 0, "in_flight": 2}


def test_invalid_decisions_are_counted_apart():
    buffer = make_buffer()
    fill(buffer, is_valid=False)
    buffer.release(buffer.take())
    assert buffer.books()["invalid"] == 12
    assert buffer.books()["trained"] == 0


def test_a_broken_episode_takes_its_own_decisions_back():
    buffer = make_buffer()
    slot = buffer.begin_rollout()
    write(slot)
    slot.end_episode(0, 2)
    slot.break_episode(2, 2)
    hand_over(slot)
    assert slot.num_invalid == 2
    rollout = buffer.take()
    assert (~rollout.data["valid"]).nonzero().tolist() == [[1, 2], [2, 2]]
    buffer.release(rollout)
    assert buffer.books() == {"collected": 12, "trained": 10, "dropped": 0, "invalid": 2, "in_flight": 0}


def test_a_dropped_rollout_hands_its_faults_and_episodes_on():
    buffer = make_buffer(num_slots=1, is_overwriting=True)
    for _ in range(3):
        fill(buffer)
    info = buffer.take().info
    assert [fault.message for fault in info.faults] == ["0", "1", "2"]
    assert [episode.start for episode in info.episodes] == [0, 1, 2]


def test_a_restored_ring_goes_on_with_its_books_and_collects_again_what_was_in_flight():
    cut = make_buffer()
    for _ in range(2):
        fill(cut)
    cut.release(cut.take())
    buffer = make_buffer()
    buffer.restore(1, cut.settled_books())
    assert buffer.books() == {"collected": 12, "trained": 12, "dropped": 0, "invalid": 0, "in_flight": 0}
    assert fill(buffer) == 1


def test_an_unfinished_rollout_cannot_be_handed_over():
    buffer = make_buffer()
    slot = buffer.begin_rollout()
    written_only(slot, 8)
    with pytest.raises(AsyncflowError, match="8 of 12 decisions"):
        slot.finish(RolloutInfo(0))


def test_a_slot_that_was_handed_over_takes_no_more_decisions():
    buffer = make_buffer()
    slot = buffer.begin_rollout()
    write(slot)
    hand_over(slot)
    with pytest.raises(AsyncflowError, match="rollout 0 was handed over"):
        slot.add_outcome(0, range(NUM_ENVS), {})
    assert buffer.books()["collected"] == 12


def test_the_plan_states_the_bytes_that_are_then_allocated():
    buffer = make_buffer(num_slots=3)
    assert buffer.plan.num_bytes == buffer.memory.bytes()


def test_memory_is_allocated_once():
    buffer = make_buffer()
    before = {name: tensor.data_ptr() for name, tensor in buffer.memory.items(True, True)}
    for _ in range(4):
        fill(buffer)
        buffer.release(buffer.take())
    assert before == {name: tensor.data_ptr() for name, tensor in buffer.memory.items(True, True)}


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_two_racing_threads_pass_every_rollout_once_in_order_and_whole(num_slots):
    buffer = make_buffer(num_slots)
    collector = threading.Thread(target=lambda: [fill(buffer) for _ in range(200)], daemon=True)
    collector.start()
    for index in range(200):
        rollout = buffer.take()
        assert rollout.index == index
        assert torch.equal(rollout.data["ticket"], expected(index))
        buffer.books()
        buffer.release(rollout)
    collector.join(PATIENCE_S)
    assert buffer.books()["trained"] == 200 * 12


def test_nested_observations_keep_their_names_dtypes_and_bytes():
    spec = EnvSpec({"state": (2,), "images.front": (3, 2, 5)}, action_dim=1, horizon=1)
    fields = TensorDict({"valid": torch.zeros(NUM_ENVS, dtype=torch.bool)}, [NUM_ENVS])
    plan = RingPlan(fields, spec.empty_obs(NUM_ENVS), num_slots=2, num_steps=NUM_STEPS, max_truncations=1)
    buffer = RolloutRing(plan, CPU)
    obs = spec.empty_obs(2)
    obs["images", "front"] += torch.tensor([7, 9], dtype=torch.uint8).view(2, 1, 1, 1)
    slot = buffer.begin_rollout()
    slot.add(1, range(1, 4, 2), obs, {})
    assert slot.add_final_obs(2, obs[1]) == 0
    written_only(slot, NUM_STEPS * NUM_ENVS)
    slot.finish(RolloutInfo(0))
    rollout = buffer.take()
    assert rollout.obs["images", "front"].dtype == torch.uint8
    assert rollout.obs["images", "front"][1, :, 0, 0, 0].tolist() == [0, 7, 0, 9]
    assert rollout.final_obs["images", "front"][0, :, 2, 1, 4].tolist() == [0, 0, 9, 0]
    per_obs, rows = NUM_ENVS * (2 * 4 + 3 * 2 * 5), NUM_STEPS + 1 + 1
    assert plan.num_bytes == 2 * (NUM_STEPS * NUM_ENVS + rows * per_obs) == buffer.memory.bytes()


def test_the_side_table_holds_what_environments_cut_beyond_their_horizon():
    """gymnasium's environments may truncate at any step."""
    buffer = make_buffer(num_slots=1)
    for num_cut in (NUM_STEPS, 1):  # more than the plan foresees, then as many
        slot = buffer.begin_rollout()
        for row in range(num_cut):
            assert slot.add_final_obs(2, TensorDict({"state": torch.full((2,), float(row))}, [])) == row
        written_only(slot, NUM_STEPS * NUM_ENVS)
        slot.finish(RolloutInfo(0))
        rollout = buffer.take()
        assert rollout.final_obs["state"][:, 2, 0].tolist() == list(range(num_cut))
        buffer.release(rollout)
