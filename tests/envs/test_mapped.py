"""Environments in a model's names: observations on the way out, actions on the way in, everything else as it is."""

import pytest
import torch
from tensordict import TensorDict

from asyncflow.config.policy import MappingConfig
from asyncflow.config.tasks import TOY_IMAGES
from asyncflow.envs.mapping import MappedVecEnv, NameMapping, map_names
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.run.evaluate import evaluate

N, H = 3, 2
GOAL_FIRST = [{"key": "state", "slice": [2, 4]}, {"key": "state", "slice": [0, 2]}]
MAPPING = MappingConfig.model_validate(
    {
        "obs": {"images": {"top_image": "front"}, "state": GOAL_FIRST},
        "action": {"size": 4, "select": [3, 0], "scale": [0.01, -1], "offset": [0, 0.5]},
    }
)


class RecordingToy(ToyVecEnv):
    """Remembers the chunks that it was given, and whether it was closed."""

    def __init__(self):
        super().__init__(N, H, tasks=[TOY_IMAGES])
        self.chunks, self.is_closed = [], False

    def step_async(self, actions, env_ids):
        self.chunks.append(actions)
        super().step_async(actions, env_ids)

    def close(self):
        self.is_closed = True
        super().close()


@pytest.fixture
def toy():
    return RecordingToy()


@pytest.fixture
def mapped(toy):
    return map_names(toy, NameMapping(MAPPING, toy.spec))


def goal_first(state):
    return torch.cat([state[:, 2:], state[:, :2]], 1)


def test_an_empty_mapping_leaves_the_environments_alone(toy):
    assert map_names(toy, NameMapping(MappingConfig(), toy.spec)) is toy
    assert toy.simulator_spec is toy.spec


def test_the_first_observations_are_mapped(toy, mapped):
    obs, plain = mapped.reset(5), toy.reset(5)
    assert torch.equal(obs["state"], goal_first(plain["state"]))
    assert torch.equal(obs["images", "front"], plain["images", "top"])
    assert list(obs["images"].keys()) == ["front"]


def test_a_model_sees_its_own_description_and_the_simulators_is_kept(toy, mapped):
    spec = mapped.spec
    assert (spec.rendered, spec.state_shape, spec.action_dim) == ({"images": {"front": (3, 28, 28)}}, (4,), 4)
    assert mapped.simulator_spec is toy.spec
    assert mapped.num_envs == N


def test_a_chunk_is_executed_in_the_simulators_units(toy, mapped):
    """Of the model's (0.25, 8, 8, 40) the simulator executes 0.01 * 40 = 0.4 and 0.5 - 0.25 = 0.25, twice."""
    start = mapped.reset(5)["state"]
    mapped.step_async(torch.tensor([0.25, 8.0, 8.0, 40.0]).expand(N, H, 4), range(N))
    result = mapped.step_wait(range(N))
    torch.testing.assert_close(toy.chunks[0], torch.tensor([0.4, 0.25]).expand(N, H, 2))
    ended = result.terminated
    moved = torch.tensor([0.08, 0.05]).expand(N, 2)
    torch.testing.assert_close((result.final_obs["state"] - start)[~ended, 2:], moved[~ended])
    assert torch.equal(result.obs["state"][~ended], result.final_obs["state"][~ended])
    assert not ended.all()
    assert result.executed[~ended].tolist() == [H] * int((~ended).sum())


def test_a_journal_holds_the_simulators_actions_and_rebuilds_the_same_episodes(toy, mapped):
    mapped.reset(5)
    mapped.step_async(torch.full((N, H, 4), 0.1), range(N))
    seen = mapped.step_wait(range(N)).obs
    journal = mapped.journal()
    again = MappedVecEnv(RecordingToy(), mapped.mapping).reset(5, journal)
    assert {chunk.shape for chunks in journal.chunks for chunk in chunks} == {(H, 2)}
    assert torch.equal(again["state"], seen["state"])
    assert torch.equal(again["images", "front"], seen["images", "front"])


def test_interrupt_and_close_reach_the_simulators(toy, mapped):
    mapped.interrupt()
    mapped.close()
    assert toy._is_interrupted
    assert toy.is_closed


class Constant(torch.nn.Module):
    """Decides 5 everywhere, in the units of a model of four dimensions."""

    n_action_steps, noise_size = H, 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def sample_actions(self, obs, mode, noise):
        return TensorDict({"actions": torch.full((len(noise), H, 4), 5.0)}, [len(noise)])


def test_an_evaluation_clips_what_the_simulators_get_and_not_what_the_model_decides(toy, mapped):
    evaluate(Constant(), mapped, 1, seed=0)
    torch.testing.assert_close(toy.chunks[0], torch.tensor([0.05, -1.0]).expand(1, H, 2))
