"""What `policy.compile` means: the same decisions, from weights that are written in place."""

import threading

import pytest
import torch
from silent import TOY, Silent, assert_equal, outcome, start
from specs import spec_of
from tensordict import TensorDict
from torch.fx.experimental.proxy_tensor import make_fx

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig
from asyncflow.devices import check_compile
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.rollout import inference
from asyncflow.rollout.inference import GraphedSampler, make_sampler
from asyncflow.rollout.weights import changing_tensors, make_acting_copy
from asyncflow.run.build import build_trainer, check_start
from asyncflow.run.launch import train
from asyncflow.seeding import policy_noise
from asyncflow.simulators.spec import EnvSpec

NUM_DECISIONS, STATE_DIM, ACTION_DIM = 6, 5, 2
TOLERANCE = 1e-5  # stated for the ratio between a compiled decision and the policy on a CPU; ten times that on a GPU
ANNEALED = {"learn_noise": False, "noise_level_final": 0.1, "anneal_updates": 4}
KINDS = {
    "learned": {},
    "fixed": ANNEALED,
    "per_step": {"log_prob": "per_step", "noise_method": "flow_sde"} | ANNEALED,
    "single_step": {"log_prob": "single_step", "noise_method": "flow_cps"} | ANNEALED,
    "gaussian": {"kind": "gaussian"},
}
IMAGE_SHAPES = {"front": (3, 28, 28), "side": (3, 28, 28)}
SEEING = {
    "flow": {},
    "gaussian": {"kind": "gaussian"},
    "vla": {"kind": "vla"},
    "frozen": {"kind": "vla", "freeze_backbone": True},
    "frozen_bfloat16": {
        "kind": "vla",
        "freeze_backbone": True,
        "vla": {"dtype": "bfloat16", "feature_dtype": "bfloat16"},
    },
}
FLOW = {"policy.kind": "flow", "policy.log_prob": "joint_mean", "policy.hidden_sizes": [32]}
torchs_own_warnings = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of some versions
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
cuda = pytest.param("cuda", marks=gpu)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def policy(request):
    return make(**request.param)


def make(**keys):
    return make_acting_copy(make_policy(configure(**keys), EnvSpec({"state": (STATE_DIM,)}, ACTION_DIM, 10), seed=1))


def configure(**keys):
    keys = {"hidden_sizes": [16], "critic_hidden_sizes": [8], "horizon": 3, "n_action_steps": 2} | keys
    return PolicyConfig(**keys)


def make_seeing(**keys):
    return make_acting_copy(
        make_policy(
            configure(**keys),
            spec_of((STATE_DIM,), ACTION_DIM, IMAGE_SHAPES),
            1,
        )
    )


def inputs(policy, number, device="cpu"):
    state = torch.randn(NUM_DECISIONS, STATE_DIM, generator=torch.Generator().manual_seed(number))
    obs = TensorDict({"state": state}, [NUM_DECISIONS])
    return obs.to(device), policy_noise(0, range(NUM_DECISIONS), number, policy.noise_size).to(device)


def become_version(policy, version):
    """Write other weights in place, as the collector does at a rollout's beginning, `noise_level` among them."""
    with torch.no_grad():
        for tensor in [x for x in changing_tensors(policy).values() if x.is_floating_point()]:
            tensor.add_(0.1 * version * torch.linspace(-1, 1, tensor.numel(), device=tensor.device).view(tensor.shape))
    policy.anneal(version)


def capture_by_tracing(run, device):
    """Record what `run` does to tensors, once, as a CUDA graph does: nothing of Python happens in a replay."""
    decision = run().clone()
    traced = make_fx(lambda: run().to_dict())()

    def replay():
        for name, value in traced().items():
            decision[name].copy_(value)

    return decision, replay


def see(policy, number, device="cpu"):
    """Return inputs with pictures, encoded as the ring keeps them."""
    obs, noise = inputs(policy, number)
    generator = torch.Generator().manual_seed(number)
    images = {k: torch.randint(256, (NUM_DECISIONS, *s), generator=generator) for k, s in IMAGE_SHAPES.items()}
    obs["images"] = TensorDict(images, [NUM_DECISIONS]).to(torch.uint8)
    return policy.encode_obs(obs.to(device)), noise.to(device)


def assert_follows(sample, policy, device="cpu", make_inputs=inputs, **tolerances):
    """Compare with the policy itself over three versions of its weights."""
    for version in (1, 2, 3):
        become_version(policy, version)
        obs, noise = make_inputs(policy, version, device)
        decided, expected = sample(obs, noise), policy.sample_actions(obs, "train", noise)
        assert set(decided.keys()) == set(expected.keys())
        for name, value in expected.items():
            torch.testing.assert_close(decided[name], value, **(tolerances or {"rtol": 0, "atol": 0}))


def ratio_error(policy, obs, decision):
    """Return how far the ratio is from 1 before any step, at most."""
    with torch.no_grad():
        again = policy.default_forward(decision.clone().set("obs", obs))["log_probs"]
    return float(((again - decision["log_probs"]).exp() - 1).abs().max())


def test_without_compiling_a_decision_is_the_policys(policy):
    assert_follows(make_sampler(policy, "none", *inputs(policy, 0)), policy)


def test_a_compiled_decision_follows_the_weights_bit_for_bit(policy, monkeypatch):
    """With torch's own kernels: what is compiled is the same computation, of today's weights."""
    monkeypatch.setattr(inference, "BACKEND", "eager")
    assert_follows(make_sampler(policy, "compile", *inputs(policy, 0)), policy)


@pytest.mark.slow
@torchs_own_warnings
def test_a_compiled_decision_is_the_policys_but_for_rounding():
    policy = make(log_prob="joint_sum", num_inference_steps=2)
    sample = make_sampler(policy, "compile", *inputs(policy, 0))
    assert_follows(sample, policy, rtol=1e-4, atol=1e-5)
    obs, noise = inputs(policy, 4)
    assert ratio_error(policy, obs, sample(obs, noise)) < TOLERANCE


def test_a_recorded_decision_follows_weights_and_inputs(policy):
    """No branch of a policy depends on a number that changes from version to version; no number is kept in Python."""
    sample = make_sampler(policy, "none", *inputs(policy, 0))
    assert_follows(GraphedSampler(sample, *inputs(policy, 0), capture=capture_by_tracing), policy)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(keys, id=name, marks=[] if name in ("flow", "frozen") else pytest.mark.slow)
        for name, keys in SEEING.items()
    ],
)
def test_a_decision_on_pictures_or_their_features_is_compiled_and_recorded_likewise(monkeypatch, keys):
    monkeypatch.setattr(inference, "BACKEND", "eager")
    policy = make_seeing(**keys)
    sample = make_sampler(policy, "none", *see(policy, 0))
    recorded = GraphedSampler(sample, *see(policy, 0), capture=capture_by_tracing)
    assert_follows(recorded, policy, make_inputs=see)
    assert_follows(make_sampler(policy, "compile", *see(policy, 0)), policy, make_inputs=see)


def test_a_decision_outlives_the_next_replay(policy):
    sample = make_sampler(policy, "none", *inputs(policy, 0))
    graphed = GraphedSampler(sample, *inputs(policy, 0), capture=capture_by_tracing)
    first = graphed(*inputs(policy, 1))
    kept = first.clone()
    graphed(*inputs(policy, 2))
    assert (first == kept).all()


def test_strided_observations_are_not_compiled_again(monkeypatch):
    policy, compiled = make(), []
    monkeypatch.setattr(inference, "BACKEND", lambda module, _: (compiled.append(1), module.forward)[1])
    sample = make_sampler(policy, "compile", *inputs(policy, 0))
    obs, noise = inputs(policy, 1)
    strided = TensorDict({"state": obs["state"].repeat_interleave(2, 0)[::2]}, [NUM_DECISIONS])
    sample(strided, noise)
    assert compiled == [1]


@pytest.mark.slow
def test_the_tenth_policy_of_a_process_is_compiled_as_the_first_one_was(monkeypatch):
    """torch gives up on code that it had to compile more than eight times, and goes on without compiling."""
    compiled = []
    monkeypatch.setattr(inference, "BACKEND", lambda module, _: (compiled.append(1), module.forward)[1])
    for width in range(8, 18):
        policy = make(kind="gaussian", hidden_sizes=[width])
        make_sampler(policy, "compile", *inputs(policy, 0))
    assert len(compiled) == 10


def test_compiling_starts_no_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(
        inference,
        "BACKEND",
        lambda module, _: (seen.append(inference.inductor_config.compile_threads), module.forward)[1],
    )
    policy = make(kind="gaussian")
    make_sampler(policy, "compile", *inputs(policy, 0))
    assert seen == [1]  # torch starts compiler processes for more


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    def refuse(module, _):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(inference, "BACKEND", refuse)
    with pytest.raises(ConfigError, match=r"^policy.compile = compile: .*no compiler here") as caught:
        make_sampler(make(), "compile", *inputs(make(), 0))
    assert "\n" not in str(caught.value)


def test_a_graph_on_a_cpu_is_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match=r"policy.compile = 'graph'.*trainer.device is cpu.*allowed: none, compile$"):
        check_compile("graph", torch.device("cpu"))


@pytest.mark.parametrize(("mode", "device"), [("graph", "cuda:0"), ("compile", "cpu"), ("none", "cpu")])
def test_what_a_device_can_do_is_not_refused(mode, device):
    check_compile(mode, torch.device(device))


@pytest.mark.parametrize("begin", [check_start, build_trainer])
def test_a_graph_on_a_cpu_is_found_before_simulators_are_built(tmp_path, monkeypatch, begin):
    monkeypatch.setattr("asyncflow.run.parts.make_vec_env", lambda *_: pytest.fail("simulators were built"))
    config = load_config("toy", TOY | {"policy.compile": "graph", "logging.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"policy\.compile = 'graph'"):
        begin(config)


def end_of(folder, mode, changes):
    start(folder, "toy", TOY | changes | {"trainer.buffer_type": mode})
    return outcome(folder)


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_vla_equals_standard_when_both_are_compiled(tmp_path, monkeypatch, lag):
    monkeypatch.setattr(inference, "BACKEND", "eager")
    changes = FLOW | {"policy.compile": "compile", "buffer.max_policy_lag": lag, "collector.num_env_groups": 2}
    assert_equal(*(end_of(tmp_path / mode, mode, changes) for mode in ("vla", "standard")))


@pytest.mark.slow
@torchs_own_warnings
def test_vla_equals_standard_with_compiled_kernels(tmp_path):
    changes = {"policy.compile": "compile", "buffer.max_policy_lag": 1}
    assert_equal(*(end_of(tmp_path / mode, mode, changes) for mode in ("vla", "standard")))


# On a GPU.


@pytest.mark.parametrize("device", [cuda])
def test_a_graph_follows_weights_and_inputs(policy, device):
    policy = policy.to(device)
    sample = make_sampler(policy, "graph", *inputs(policy, 0, device))
    assert_follows(sample, policy, device, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", [cuda])
def test_a_graph_is_replayed_by_another_thread_on_its_stream_without_a_wait(policy, device):
    policy, decided = policy.to(device), []
    sample = make_sampler(policy, "graph", *inputs(policy, 0, device))
    obs, noise = inputs(policy, 1, device)
    torch.cuda.synchronize()

    def replay():
        with torch.cuda.stream(torch.cuda.Stream()):
            decided.append(sample(obs, noise))

    torch.cuda.set_sync_debug_mode("error")
    try:
        thread = threading.Thread(target=replay)
        thread.start()
        thread.join(30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    expected = policy.sample_actions(obs, "train", noise)
    for name, value in expected.items():
        torch.testing.assert_close(decided[0][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@torchs_own_warnings
@pytest.mark.parametrize("mode", ["compile", "graph"])
@pytest.mark.parametrize("device", [cuda])
def test_the_ratio_is_one_on_a_gpu(policy, device, mode):
    policy = policy.to(device)
    obs, noise = inputs(policy, 1, device)
    sample = make_sampler(policy, mode, *inputs(policy, 0, device))
    assert ratio_error(policy, obs, sample(obs, noise)) < 10 * TOLERANCE


@pytest.mark.slow
@torchs_own_warnings
@pytest.mark.parametrize("mode", ["compile", "graph"])
@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
@pytest.mark.parametrize("device", [cuda])
def test_the_toy_trains_on_a_gpu_compiled_or_captured(tmp_path, device, buffer_type, mode):
    changes = {"trainer.device": device, "trainer.buffer_type": buffer_type, "policy.compile": mode}
    reporter = Silent()
    train(load_config("toy", TOY | FLOW | changes | {"logging.out": str(tmp_path / "run")}), reporter)
    assert len(reporter.rows) == 6
