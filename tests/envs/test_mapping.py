"""`policy.mapping`: values worked out by hand, every refusal a line that says what is there, and a ratio of 1."""

from __future__ import annotations

import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from specs import spec_of
from tensordict import TensorDict
from torch import nn

from asyncflow.config.plugins import trust_class
from asyncflow.config.policy import MappingConfig
from asyncflow.config.presets import load_config, parse_overrides
from asyncflow.config.sections import Config, PolicyConfig, VLAConfig, validate, values_by_key
from asyncflow.config.task_table import TASKS
from asyncflow.demos.pretrain import PretrainOptions, pretrain
from asyncflow.envs.mapping import NameMapping
from asyncflow.envs.tasks import join_tasks
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.flow_sampler import FlowSampler
from asyncflow.policies.vla.model import tokenize
from asyncflow.seeding import policy_noise
from asyncflow.simulators.spec import EnvSpec

PAGE = Path(__file__).parents[2] / "docs" / "your_policy.md"
SPEC = EnvSpec(
    {"state": (9,), "images.agentview": (3, 28, 28), "images.wrist": (3, 14, 28)},
    action_dim=3,
    horizon=10,
    obs_keys=("pos", "quat", "grip"),
    obs_widths=(3, 4, 2),
)
PARTS = [{"key": "quat", "slice": [1, 3]}, {"key": "grip"}, {"key": "pos", "slice": [0, 1]}]
N = 2


def mapping(obs=None, action=None):
    return MappingConfig.model_validate({"obs": obs or {}, "action": action or {}})


def name_mapping(obs=None, action=None, spec=SPEC):
    return NameMapping(mapping(obs, action), spec)


def observe(spec=SPEC):
    obs = spec.empty_obs(N)
    obs["state"] = torch.arange(float(N * math.prod(spec.state_shape))).view(N, *spec.state_shape)
    for number, name in enumerate(spec.shapes("images")):
        obs["images", name].fill_(number + 1)
    return obs


def test_a_state_is_what_the_slices_say_in_their_order():
    mapped = name_mapping({"state": PARTS})
    assert mapped.map_obs(observe())["state"].tolist() == [[4, 5, 7, 8, 0], [13, 14, 16, 17, 9]]
    assert mapped.spec.shapes("vector") == {"state": (5,)}


def test_every_step_of_a_history_is_mapped_alike():
    mapped = name_mapping({"state": PARTS, "images": {"wrist": "hand"}}, spec=SPEC.with_history(2))
    seen = mapped.map_obs(observe(SPEC.with_history(2)))
    assert seen["state"][0].tolist() == [[4, 5, 7, 8, 0], [13, 14, 16, 17, 9]]
    assert seen["images", "hand"].shape == (N, 2, 3, 14, 28)
    assert (mapped.spec.shapes("vector"), mapped.spec.n_obs_steps) == ({"state": (2, 5)}, 2)
    assert mapped.spec.shapes("images") == {"hand": (2, 3, 14, 28)}


@pytest.mark.parametrize("name", ["wrist", "wrist_image"])
def test_images_have_the_models_names_and_others_are_not_shown(name):
    mapped, obs = name_mapping({"images": {name: "observation.images.hand"}}), observe()
    images = mapped.map_obs(obs)["images"]
    assert list(images.keys()) == list(mapped.spec.shapes("images")) == ["observation.images.hand"]
    assert images["observation.images.hand"].dtype == torch.uint8
    assert images["observation.images.hand"].data_ptr() == obs["images", "wrist"].data_ptr()


def test_a_model_may_see_no_images():
    mapped = name_mapping({"images": {}})
    assert list(mapped.map_obs(observe()).keys()) == ["state"]
    assert mapped.spec.shapes("images") == {}


def test_what_is_not_mapped_stays():
    obs = observe().set("depth", torch.ones(N, 2))
    seen = name_mapping({"state": PARTS}).map_obs(obs)
    assert list(seen["images"].keys()) == ["agentview", "wrist"]
    assert seen["depth"].data_ptr() == obs["depth"].data_ptr()
    assert NameMapping(MappingConfig(), SPEC).spec == SPEC


def test_an_environment_without_names_has_one_observation_called_state():
    spec = EnvSpec({"state": (4,)}, 2, 10)
    swapped = name_mapping({"state": [{"key": "state", "slice": [2, 4]}, {"key": "state", "slice": [0, 2]}]}, spec=spec)
    assert swapped.map_obs(observe(spec))["state"].tolist() == [[2, 3, 0, 1], [6, 7, 4, 5]]


def test_actions_are_selected_scaled_offset_and_clipped():
    action = {"size": 5, "select": [4, 0, 4], "scale": [1, -2, 10], "offset": [0, 1, 0]}
    mapped = name_mapping(action=action)
    actions = torch.tensor([[[0.25, 9.0, 9.0, 9.0, 0.5]]])
    assert mapped.map_actions(actions).tolist() == [[[0.5, 0.5, 1.0]]]
    assert (mapped.spec.action_dim, mapped.spec.action_high) == (5, (math.inf,) * 5)


def test_actions_that_are_not_mapped_are_not_touched():
    mapped, actions = name_mapping({"state": PARTS}), torch.full((1, 1, 3), 7.0)
    assert mapped.map_actions(actions) is actions
    assert (mapped.spec.action_dim, mapped.spec.action_high) == (3, ())


def test_an_action_that_is_not_a_number_stays_so():
    mapped = name_mapping(action={"scale": [1, 1, 1]})
    assert mapped.map_actions(torch.full((1, 1, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize(
    ("obs", "action", "message"),
    [
        (
            {"images": {"front": "x"}}, {},
            r"policy.mapping.obs.images: there is no image 'front'; images: agentview_image, wrist_image",
        ),
        ({"images": {"wrist": "x", "wrist_image": "y"}}, {}, r"names the camera wrist twice"),
        (
            {"state": [{"key": "cube"}]}, {},
            r"policy.mapping.obs.state: there is no observation 'cube'; observations: pos, quat, grip \(env.obs_keys\)",
        ),
        (
            {"state": [{"key": "quat", "slice": [2, 5]}]}, {},
            r"slice = \[2, 5\] of quat ends beyond its 4 numbers; numbers: pos 3, quat 4, grip 2",
        ),
        ({}, {"size": 9, "select": [0, 1]}, r"policy.mapping.action.select = \[0, 1\]: 2 entries for 3 dimensions"),
        ({}, {"scale": [1, 1]}, r"policy.mapping.action.scale = \[1.0, 1.0\]: 2 entries for 3 dimensions"),
        ({}, {"offset": [0, 0, 0, 1]}, r"policy.mapping.action.offset = .*: 4 entries for 3 dimensions"),
    ],
)  # fmt: skip
def test_what_the_environments_lack_is_one_line_that_says_what_they_have(obs, action, message):
    with pytest.raises(ConfigError, match=message) as caught:
        name_mapping(obs, action)
    assert "\n" not in str(caught.value)


def test_without_cameras_there_are_no_images():
    with pytest.raises(ConfigError, match=r"there is no image 'wrist'; images: none \(env.cameras\)"):
        name_mapping({"images": {"wrist": "x"}}, spec=replace(SPEC, obs={"state": (9,)}))


def test_an_environment_that_does_not_say_its_widths_is_named():
    with pytest.raises(ConfigError, match=r"does not say how many numbers each of pos, quat, grip has \(EnvSpec"):
        name_mapping({"state": PARTS}, spec=replace(SPEC, obs_widths=()))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"obs.state": [{"key": "a", "slice": [3, 1]}]}, "slice = [3, 1] of 'a' must be [first, end], 0 <= first"),
        ({"obs.state": [{"key": "a", "slice": [-1, 1]}]}, "slice = [-1, 1] of 'a' must be [first, end]"),
        ({"obs.state": [{"key": "a", "slice": [1]}]}, "policy.mapping.obs.state[0].slice = [1]: list should have at"),
        ({"obs.state": [{"key": "a"}, {"slice": [0, 1]}]}, "policy.mapping.obs.state[1].key = {'slice': [0, 1]}: "),
        ({"obs.state": []}, "policy.mapping.obs.state = []: list should have at least 1 item"),
        ({"obs.state": [{"key": "a", "stop": 1}]}, "unknown key policy.mapping.obs.state[0].stop"),
        ({"obs.images": ["a"]}, "policy.mapping.obs.images = ['a']: input should be a valid dictionary"),
        ({"obs.images": {"a": "x", "b": "x"}}, "policy.mapping.obs.images = {'a': 'x', 'b': 'x'}: every image needs a"),
        ({"obs.images": {"a": ""}}, "policy.mapping.obs.images = {'a': ''}: every image needs a name of its own"),
        ({"obs.image": {}}, "unknown key policy.mapping.obs.image; did you mean policy.mapping.obs.images?"),
        ({"action.size": 7}, "policy.mapping.action.size = 7 needs policy.mapping.action.select"),
        ({"action.select": [0, 2]}, "policy.mapping.action.select = [0, 2]: the model's actions have 2 dimensions"),
        ({"action.size": 3, "action.select": [3]}, "policy.mapping.action.select = [3]: the model's actions have 3"),
        ({"action.select": [-1]}, "policy.mapping.action.select[0] = -1: input should be greater than or equal to 0"),
        ({"action.scale": [1, 0]}, "policy.mapping.action.scale = [1.0, 0.0]: a factor of 0 would execute nothing"),
        ({"action.scale": [True]}, "policy.mapping.action.scale[0] = True: input should be a valid number"),
        ({"obs.language": "go"}, "policy.mapping.obs.language = 'go': policy.kind = flow reads none"),
    ],
)
def test_what_cannot_be_meant_is_one_line_that_names_key_and_value(keys, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {f"policy.mapping.{key}": value for key, value in keys.items()})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_instructions_must_be_the_same():
    keys = {"policy.kind": "vla", "policy.vla.instruction": "go", "policy.mapping.obs.language": "stop"}
    with pytest.raises(ConfigError, match=r"policy.mapping.obs.language = 'stop' and policy.vla.instruction = 'go'"):
        load_config(None, keys)
    assert load_config(None, keys | {"policy.mapping.obs.language": "go"}).policy.instruction == "go"


def test_a_block_is_read_from_yaml_and_from_the_command_line_alike(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        """
        policy:
          mapping:
            obs:
              images: {agentview_image: front}
              state: [{key: robot0_eef_pos}, {key: robot0_eef_quat, slice: [0, 3]}]
            action: {size: 32, select: [0, 1, 2, 3, 4, 5, 6], scale: [1, 1, 1, 1, 1, 1, -1]}
        """
    )
    line = [
        "policy.mapping.obs.images={agentview_image: front}",
        "policy.mapping.obs.state=[{key: robot0_eef_pos}, {key: robot0_eef_quat, slice: [0, 3]}]",
        "policy.mapping.action={size: 32, select: [0, 1, 2, 3, 4, 5, 6], scale: [1, 1, 1, 1, 1, 1, -1]}",
    ]
    from_file = load_config(str(tmp_path / "mine.yaml"))
    assert from_file.policy.mapping.obs.state[1].slice == [0, 3]
    assert load_config(None, parse_overrides(line)) == from_file


def test_the_example_of_the_page_is_a_block_that_fits_its_task(tmp_path):
    _, after = PAGE.read_text().split("become the model's:\n")
    (tmp_path / "page.yaml").write_text(textwrap.dedent(after.split("\nWhat is left out")[0]))
    config = load_config(str(tmp_path / "page.yaml"))
    task = TASKS[config.env.task]
    widths = tuple(task.obs_sizes()[key] for key in task.obs_keys)
    images = dict.fromkeys(config.env.cameras, (3, 84, 84))
    spec = spec_of((sum(widths),), task.action_dim, images, 400, obs_keys=task.obs_keys, obs_widths=widths)
    seen = NameMapping(config.policy.mapping, spec).spec
    assert (seen.shapes("vector"), seen.action_dim, config.policy.instruction) == (
        {"state": (7,)},
        32,
        "pick up the cube",
    )


def test_a_block_survives_being_written_and_read():
    config = load_config(None, {"policy.mapping": {"obs": {"state": PARTS}, "action": {"scale": [1.5, -1, 1]}}})
    assert validate(yaml.safe_load(yaml.safe_dump(config.model_dump(by_alias=True)))) == config
    assert load_config(None, values_by_key(config)) == config


def test_pre_training_refuses_a_block_before_it_reads_anything(tmp_path):
    config = PolicyConfig(mapping=mapping({"state": PARTS}))
    with pytest.raises(ConfigError, match=r"policy.mapping.obs.state: pre-training is in the simulator's own names"):
        pretrain(tmp_path / "none.hdf5", tmp_path / "out.safetensors", Config(policy=config), PretrainOptions())


# What is not executed: the model's actions have five dimensions, of which the simulator executes two.
SELECT = {"size": 5, "select": [3, 1]}
MODES = [
    {"kind": "gaussian", "log_prob": "joint_sum"},
    {"kind": "gaussian", "log_prob": "joint_mean"},
    {"kind": "vla", "noise_method": "flow_sde", "log_prob": "joint_mean"},
    {"noise_method": "flow_noise", "log_prob": "joint_sum"},
    {"noise_method": "flow_noise", "learn_noise": False, "log_prob": "per_step"},
    {"noise_method": "flow_sde", "log_prob": "single_step"},
    {"noise_method": "flow_cps", "log_prob": "joint_mean"},
]


def build(keys, action=None):
    config = PolicyConfig(
        horizon=3, n_action_steps=2, hidden_sizes=[16], critic_hidden_sizes=[16], mapping=mapping(action=action), **keys
    )
    return config, make_policy(config, EnvSpec({"state": (4,)}, 5, 10), seed=1)


def decide(policy):
    obs = TensorDict({"state": torch.linspace(-1, 1, 24).view(6, 4)}, [6])
    return policy.sample_actions(obs, "train", policy_noise(0, range(6), 0, policy.noise_size)).set("obs", obs)


@pytest.mark.parametrize("keys", MODES, ids=lambda keys: "-".join(str(value) for value in keys.values()))
def test_the_ratio_is_one_where_dimensions_are_not_executed(keys):
    _, policy = build(keys, SELECT)
    batch = decide(policy)
    evaluated = policy.default_forward(batch)
    assert batch["actions"].shape == (6, 3, 5)
    torch.testing.assert_close(evaluated["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)
    assert evaluated["entropy"].shape == (6,)


@pytest.mark.parametrize("keys", MODES, ids=lambda keys: "-".join(str(value) for value in keys.values()))
def test_a_permutation_executes_everything_and_changes_no_decision(keys):
    _, plain = build(keys)
    _, mapped = build(keys, {"select": [4, 2, 0, 1, 3]})
    assert (decide(plain) == decide(mapped)).all()
    assert plain.log_prob_terms == mapped.log_prob_terms


@pytest.mark.parametrize("width", [5, 7], ids=["", "padded"])
def test_the_log_prob_of_a_flow_is_that_of_the_executed_dimensions_by_hand(width):
    """flow_noise with a fixed std of 0.25 and a velocity of 0.5: every step is N(x - 0.5 / K, 0.25)."""
    keys = {"noise_level": 0.25, "learn_noise": False, "log_prob": "joint_sum", "num_inference_steps": 2}
    config = PolicyConfig(horizon=3, n_action_steps=2, mapping=mapping(action=SELECT), **keys)
    sampler = FlowSampler(config, 5, width)
    sampled = sampler.sample(lambda x, _: torch.full_like(x, 0.5), policy_noise(0, range(6), 0, sampler.noise_size))
    chains = sampled["chains"]
    steps = torch.distributions.Normal(chains[:, :-1] - 0.25, 0.25).log_prob(chains[:, 1:])
    torch.testing.assert_close(sampled["log_probs"], steps[:, :, :2, [1, 3]].sum((1, 2, 3)), rtol=1e-5, atol=1e-5)
    entropy = sampler.evaluate(lambda x, _: torch.full_like(x, 0.5), sampled).entropy
    torch.testing.assert_close(entropy, torch.full((6,), 4 * (math.log(0.25) + 0.5 * math.log(2 * math.pi * math.e))))


@pytest.mark.parametrize("method", ["flow_sde", "flow_noise", "flow_cps"])
@pytest.mark.parametrize("log_prob", ["joint_sum", "single_step"])
@pytest.mark.parametrize("width", [5, 7], ids=["", "padded"])
def test_nothing_is_explored_in_dimensions_that_are_not_executed(method, log_prob, width):
    keys = {"noise_method": method, "log_prob": log_prob, "mapping": mapping(action=SELECT)}
    sampler = FlowSampler(PolicyConfig(horizon=3, n_action_steps=2, **keys), 5, width)
    noise = policy_noise(0, range(6), 0, sampler.noise_size)
    explored = sampler.sample(lambda x, _: torch.tanh(x), noise)["chains"][:, -1]
    denoised = sampler.denoise(lambda x, _: torch.tanh(x), noise)
    others = [dim for dim in range(width) if dim not in SELECT["select"]]
    torch.testing.assert_close(explored[..., others], denoised[..., others])
    assert (explored[..., [1, 3]] - denoised[..., [1, 3]]).abs().min() > 0


def test_the_log_prob_of_a_gaussian_ignores_what_is_not_executed():
    _, policy = build(MODES[0], SELECT)
    batch = decide(policy)
    before = policy.default_forward(batch)
    batch["raw_actions"][..., [0, 2, 4]] += 9.0
    assert torch.equal(policy.default_forward(batch)["log_probs"], before["log_probs"])
    batch["raw_actions"][..., 3] += 9.0
    assert not torch.equal(policy.default_forward(batch)["log_probs"], before["log_probs"])


@pytest.mark.parametrize(("keys", "terms"), [(MODES[1], 2 * 2), (MODES[2], 4 * 2 * 2), (MODES[6], 3 * 2 * 2)])
def test_a_mean_is_over_what_is_executed(keys, terms):
    _, policy = build(keys, SELECT)
    assert policy.log_prob_terms == terms


class Critic(nn.Module):
    """Brings its own log-probs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 15)

    def forward(self, obs):
        return self.layer(obs["state"]).view(-1, 3, 5)

    def get_value(self, obs):
        return self.layer(obs["state"])[:, 0]

    def evaluate_actions(self, obs, actions):
        return {"log_probs": (actions - self.forward(obs)[:, : actions.shape[1]]).sum((1, 2))}


class Told(Critic):
    """Takes an instruction."""

    def set_instruction(self, text):
        self.instruction = text


class ToldAll(Told):
    """Takes the instructions of several tasks."""

    def set_instructions(self, texts):
        self.instruction = list(texts)


def load(name, spec=None, **keys):
    trust_class(f"mapped.{name}")
    config = PolicyConfig(
        kind="vla", horizon=3, n_action_steps=2, vla=VLAConfig(model_class=f"mapped.{name}"), mapping=mapping(**keys)
    )
    return make_policy(config, spec or EnvSpec({"state": (4,)}, 5, 10), seed=0)


@pytest.fixture
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "mapped", sys.modules[__name__])


@pytest.mark.usefixtures("_importable")
def test_a_model_with_log_probs_of_its_own_must_leave_dimensions_out_itself():
    with pytest.raises(ConfigError, match=r"action.select = \[3, 1\]: leaves out dimensions of which mapped.Critic"):
        load("Critic", action=SELECT)
    assert load("Critic", action={"select": [4, 2, 0, 1, 3]}).action_dim == 5


@pytest.mark.usefixtures("_importable")
def test_a_model_from_elsewhere_is_told_the_instruction_if_it_takes_one():
    assert load("Told", obs={"language": "lift"}).model.instruction == "lift"
    with pytest.raises(ConfigError, match=r"'lift': mapped.Critic has no method set_instruction\(text\)"):
        load("Critic", obs={"language": "lift"})


@pytest.mark.usefixtures("_importable")
def test_a_model_from_elsewhere_is_told_every_tasks_instruction():
    tasks = {"A": "lift", "B": "push"}
    spec = join_tasks([EnvSpec({"state": (4,)}, 5, 10, instruction=text) for text in tasks.values()], list(tasks))
    assert load("ToldAll", spec).model.instruction == ["lift", "push"]
    assert load("ToldAll", spec, obs={"language": "go"}).model.instruction == "go"
    assert load("Critic", spec).action_dim == 5  # it may read the index of the observation itself
    with pytest.raises(ConfigError, match=r"env.tasks: mapped.Told takes one instruction, .* and the tasks have 2"):
        load("Told", spec)


@pytest.mark.usefixtures("_importable")
def test_a_single_tasks_own_instruction_is_told_unless_another_is_configured():
    spec = EnvSpec({"state": (4,)}, 5, 10, instruction="lift")
    assert load("Told", spec).model.instruction == "lift"
    assert load("Told", spec, obs={"language": "go"}).model.instruction == "go"


def test_our_own_model_reads_the_instruction():
    config = PolicyConfig(kind="vla", mapping=mapping({"language": "lift"}))
    policy = make_policy(config, EnvSpec({"state": (4,)}, 5, 10), seed=0)
    assert torch.equal(policy.model.backbone.instructions, tokenize(["lift"]))


@pytest.mark.parametrize("name", ["observation.front", "values"])
def test_a_name_that_no_network_can_have_is_refused(name):
    with pytest.raises(ConfigError, match=rf"policy.mapping.obs.images: .* cannot name a network '{name}'"):
        make_policy(
            PolicyConfig(),
            spec_of((4,), 2, {name: (3, 28, 28)}),
            seed=0,
        )
