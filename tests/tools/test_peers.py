"""The comparison of updates gives everyone the same work, and its ratios are the right way round."""

import pytest
import torch
from hand_clock import HandClock
from torch import nn
from torch.distributions import Distribution

from asyncflow.ppo.gae import Transitions, compute_gae
from tools.bench.peers.settings import Settings

ACTOR, CRITIC = [(256, 19), (256, 256), (28, 256)], [(256, 19), (256, 256), (1, 256)]  # 4 x 7 actions of 19 numbers
CHUNK_GAMMA = 0.9801495  # 0.995 ** 4


@pytest.fixture(scope="module")
def contenders(peers):
    return peers("bench.peers.contenders")


@pytest.fixture(scope="module")
def update(peers):
    return peers("bench.peers.update")


@pytest.fixture(scope="module")
def policy(update):
    return update.make_gaussian()


@pytest.fixture(scope="module")
def batch(peers, policy):
    return peers("bench.peers.setting").make_batch(policy, 8)


def linears(*modules):
    return [tuple(layer.weight.shape) for part in modules for layer in part.modules() if isinstance(layer, nn.Linear)]


def caught(monkeypatch, module, name):
    """Let a tool's use of a class be caught; return the list of what it makes."""
    made, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (made.append(original(*args, **kwargs)), made[-1])[1])
    return made


# The same work for everyone.


def test_the_network_of_the_comparison_is_ours_and_cleanrls(peers, policy):
    agent = peers("bench.peers.cleanrl").CleanRLAgent(19, 28, [256, 256], 0.5)
    assert linears(policy.actor) == linears(agent.actor_mean) == ACTOR
    assert linears(policy.critic) == linears(agent.critic) == CRITIC
    assert policy.log_std.exp().unique().tolist() == agent.actor_logstd.exp().unique().tolist() == pytest.approx([0.5])


def test_asyncflow_is_told_what_the_peers_are_told(contenders, monkeypatch, policy, batch):
    made = caught(monkeypatch, contenders, "PPO")
    contenders.make_asyncflow(policy, batch, 0)
    told = made[0].config
    rates = {told.learning_rate, told.critic_learning_rate}
    assert told.gamma**4 == pytest.approx(CHUNK_GAMMA)
    assert (told.gae_lambda, told.clip_coef, told.vf_coef, told.ent_coef) == (0.95, 0.2, 0.5, 0.0)
    assert (told.max_grad_norm, rates, told.update_epochs, told.num_minibatches) == (1.0, {3e-4}, 8, 4)
    assert (told.target_kl, told.dual_clip, told.critic_warmup_updates) == (None, None, 0)  # no work is left out


@pytest.mark.parametrize(("num_envs", "num_steps"), [(16, 60), (2, 240)])
def test_stable_baselines3_is_told_the_same(contenders, num_envs, num_steps):
    """By hand: a quarter of 960 and of 480 decisions are minibatches of 240 and 120."""
    model = contenders.make_sb3(contenders.DummyVecEnv([contenders.SpacesOnly] * num_envs), num_steps)
    told = model.kwargs
    assert told["gamma"] == pytest.approx(CHUNK_GAMMA)
    assert (told["gae_lambda"], told["clip_range"], told["vf_coef"], told["ent_coef"]) == (0.95, 0.2, 0.5, 0.0)
    assert (told["max_grad_norm"], told["learning_rate"], told["n_epochs"]) == (1.0, 3e-4, 8)
    assert (told["n_steps"], told["batch_size"]) == (num_steps, num_envs * num_steps // 4)
    network = told["policy_kwargs"]
    assert network["net_arch"] == {"pi": [256, 256], "vf": [256, 256]}
    assert (network["activation_fn"], network["log_std_init"]) == (nn.ReLU, pytest.approx(-0.693147))  # log 0.5


def test_rsl_rl_is_told_the_same(contenders, monkeypatch, policy, batch):
    made = caught(monkeypatch, contenders, "RslPPO")
    contenders.make_rsl_rl(policy, batch)
    (actor, critic, storage), told = made[0].args, made[0].kwargs
    assert (linears(actor.mlp), linears(critic.mlp)) == (ACTOR, CRITIC)
    assert actor.kwargs["distribution_cfg"]["init_std"] == 0.5
    assert (storage.args[1], storage.args[2]) == (16, 8)  # environments, steps
    assert told["gamma"] == pytest.approx(CHUNK_GAMMA)
    assert (told["lam"], told["clip_param"], told["value_loss_coef"], told["entropy_coef"]) == (0.95, 0.2, 0.5, 0.0)
    assert (told["max_grad_norm"], told["learning_rate"], told["schedule"]) == (1.0, 3e-4, "fixed")
    assert (told["num_learning_epochs"], told["num_mini_batches"]) == (8, 4)


def test_torchrl_is_told_the_same(peers):
    learner = peers("bench.peers.torchrl").TorchRLPPO(960)
    told, network = learner._loss.kwargs, learner.actor.args[0]
    assert (linears(network), linears(learner._loss.args[1].args[0])) == (ACTOR, CRITIC)
    assert network(torch.zeros(1, 19))[1].unique().tolist() == pytest.approx([0.5])
    assert learner._advantages.kwargs["gamma"] == pytest.approx(CHUNK_GAMMA)
    assert learner._advantages.kwargs["lmbda"] == 0.95
    assert (told["clip_epsilon"], told["critic_coeff"], told["entropy_coeff"]) == (0.2, 0.5, 0.0)
    assert [group["lr"] for group in learner._optimizer.param_groups] == [3e-4]


def test_everyone_starts_from_our_weights(contenders, policy, batch):
    ours = [layer.weight for layer in contenders.find_linears([policy.actor, policy.critic])]
    for make in (contenders.make_sb3_contender, contenders.make_rsl_rl, contenders.make_cleanrl):
        matrices = [each for each in make(policy, batch).parameters if each.dim() == 2 and len(each) > 1]
        theirs = [*matrices, *(each for each in make(policy, batch).parameters if each.shape == (1, 256))]
        assert len(theirs) == 6
        assert all(any(torch.equal(a, b) for b in theirs) for a in ours)


def test_our_log_probs_and_cleanrls_are_those_of_the_rollout(contenders, policy, batch):
    for contender in (contenders.make_asyncflow(policy, batch, 0), contenders.make_cleanrl(policy, batch)):
        assert contender.log_probs().tolist() == pytest.approx(batch.log_probs.flatten().tolist(), abs=1e-4)


def test_rsl_rl_is_given_the_rollout_step_by_step(contenders, monkeypatch, policy, batch):
    made = caught(monkeypatch, contenders, "RslPPO")
    contenders.make_rsl_rl(policy, batch)
    names = ("obs", "actions", "log_probs", "rewards", "dones")
    for name, kept in zip(names, zip(*made[0].kept, strict=True), strict=True):
        assert torch.equal(torch.stack(kept), getattr(batch, name))


def test_stable_baselines3_is_given_the_rollout_anew_before_every_update(contenders, monkeypatch, policy, batch):
    """A row is marked where an episode starts: at the first, and after every decision that was its episode's last."""
    made = caught(monkeypatch, contenders, "make_sb3")
    contender = contenders.make_sb3_contender(policy, batch)
    for _ in range(2):
        contender.refill()
        obs, actions, rewards, starts, values, log_probs = zip(*made[0].rows, strict=True)
        given = {"obs": obs, "actions": actions, "rewards": rewards, "values": values, "log_probs": log_probs}
        assert all(torch.equal(torch.stack(rows), getattr(batch, name)) for name, rows in given.items())
        assert starts[0].all()
        assert all((starts[t + 1] == batch.dones[t].numpy()).all() for t in range(7))
    assert batch.dones[:-1].any()


def test_the_rollout_has_whole_chunks_and_few_successes(peers, policy):
    batch = peers("bench.peers.setting").make_batch(policy, 60)
    assert batch.actions.shape == (60, 16, 28)
    assert batch.rollout.data["discounts"].unique().tolist() == pytest.approx([CHUNK_GAMMA])
    assert 0 < batch.dones.float().mean() < 0.05
    assert not batch.rollout.data["truncated"].any()  # which the peers' buffers know nothing of


# CleanRL's shape.


def test_cleanrls_advantages_by_hand(peers, batch):
    """With g = 0.9801495 a decision and g l = 0.9311420, the second decision ends its episode.

    Third: 2 + 0.4 g - 0.1 = 2.2920598. Second: 0 - 0.2. First: 1 + 0.2 g - 0.5 - 0.2 g l = 0.5098015.
    """
    column = lambda *numbers: torch.tensor(numbers)[:, None]  # noqa: E731
    given = vars(batch) | {
        "rewards": column(1.0, 0.0, 2.0),
        "values": column(0.5, 0.2, 0.1),
        "dones": column(False, True, False),
        "last_values": torch.tensor([0.4]),
    }
    found = peers("bench.peers.cleanrl").compute_advantages(type(batch)(**given))
    assert found.flatten().tolist() == pytest.approx([0.5098015, -0.2, 2.2920598])


def test_cleanrls_advantages_are_those_of_our_rollout(peers, batch):
    data = batch.rollout.data
    following = torch.cat([batch.values[1:], batch.last_values[None]])
    ends = data["terminated"]
    ours, _ = compute_gae(Transitions(batch.rewards, batch.values, following, data["discounts"], ends, ends), 0.95)
    theirs = peers("bench.peers.cleanrl").compute_advantages(batch)
    assert theirs.flatten().tolist() == pytest.approx(ours.flatten().tolist(), abs=1e-5)


def test_cleanrl_and_torchrl_train_each_decision_once_in_each_of_8_epochs(peers, monkeypatch, batch):
    cleanrl, seen = peers("bench.peers.cleanrl"), []
    step = {"clip_fraction": 0.0}
    monkeypatch.setattr(cleanrl, "train_minibatch", lambda *arguments: seen.append(arguments[2]["log_probs"]) or step)
    cleanrl.train_like_cleanrl(None, None, batch)
    learner = peers("bench.peers.torchrl").TorchRLPPO(batch.rewards.numel())
    learner.update(batch.rollout.data)
    for minibatches in (seen, [each["log_probs"] for each in learner._loss.minibatches]):
        assert [len(minibatch) for minibatch in minibatches] == [32] * 8 * 4
        for epoch in range(8):
            trained = torch.cat(minibatches[4 * epoch : 4 * epoch + 4]).sort().values
            assert torch.equal(trained, batch.log_probs.flatten().sort().values)
    assert learner._advantages.num_calls == 1


# What is refused.


def test_an_update_of_ours_and_of_cleanrls_takes_32_steps(update, contenders, policy, batch):
    both = {"ours": contenders.make_asyncflow(update.make_gaussian(), batch, 1)}
    both["CleanRL's shape"] = contenders.make_cleanrl(policy, batch)
    for contender in both.values():
        assert update.time_update(contender, [p.detach().clone() for p in contender.parameters]) > 0
        assert {int(state["step"]) for state in contender.optimizer.state.values()} == {32}
    update.check_steps(both, 1)
    with pytest.raises(SystemExit, match=r"ours: \{32\} optimizer steps, expected 64"):
        update.check_steps(both, 2)


def test_a_network_that_differs_is_refused(update, monkeypatch, contenders):
    for name in ("make_sb3_contender", "make_rsl_rl"):
        monkeypatch.setattr(update, name, contenders.make_cleanrl)
    assert list(update.make_contenders(4)) == [
        "asyncflow",
        "asyncflow, lag 1",
        "stable-baselines3",
        "rsl_rl",
        "CleanRL's shape",
    ]

    def spoil(policy, batch):
        with torch.no_grad():
            policy.actor[0].weight.mul_(2.0)
        return contenders.make_cleanrl(policy, batch)

    monkeypatch.setattr(update, "make_rsl_rl", spoil)
    with pytest.raises(SystemExit, match="rsl_rl: its network differs: log-probs are off by"):
        update.make_contenders(4)


# What is timed.


@pytest.fixture
def clock(update, monkeypatch):
    clock = HandClock()
    monkeypatch.setattr(update, "time", clock)
    yield clock
    Distribution.set_default_validate_args(True)  # as it is unless a contender turns it off


def test_only_the_update_is_timed_and_it_starts_from_the_first_weights(update, contenders, clock):
    weight, seen = nn.Parameter(torch.tensor([9.0])), []

    def train():
        seen.append((weight.item(), Distribution._validate_args))
        clock.move(2.0)

    contender = contenders.Contender([weight], None, None, lambda: clock.move(50.0), train, is_validating=False)
    assert update.time_update(contender, [torch.tensor([3.0])]) == 2.0
    assert seen == [(3.0, False)]


def test_everyone_takes_a_turn_in_every_round_and_two_rounds_are_warm_up(update, contenders, clock, monkeypatch):
    """By hand: a takes 1, 2, 3, 4 s in turns 0 to 3 and b ten times that."""
    order = []

    def make(name, factor):
        train = lambda: (order.append(name), clock.move(factor * order.count(name)))  # noqa: E731
        return contenders.Contender([], None, None, lambda: None, train)

    checked = []
    monkeypatch.setattr(update, "make_contenders", lambda _: {"b": make("b", 10.0), "a": make("a", 1.0)})
    monkeypatch.setattr(update, "check_steps", lambda _, num_updates: checked.append(num_updates))
    assert update.measure_update(960, 2) == {"b": [30.0, 40.0], "a": [3.0, 4.0]}
    assert order == list("abbaabba")
    assert checked == [4]


# What follows.


@pytest.mark.parametrize(("ratios", "is_met"), [([1.0, 1.2, 9.0], True), ([1.0, 1.19, 9.0], False)])
def test_the_median_is_held_against_the_target(update, ratios, is_met):
    found = update.compare("update", ratios, 1.2)
    assert (found.target, found.is_met) == (">= 1.2", is_met)


def test_a_row_has_the_median_and_the_quartiles(update):
    assert update.compare("update", [5.0, 1.0, 4.0, 2.0, 3.0], 1.0).measured == "3.00 (2.00 to 4.00, half of 5 turns)"
    assert update.compare("update", [2.0], 1.0).measured == "2.00 (2.00 to 2.00, half of 1 turns)"


SECONDS = {
    "asyncflow": [0.1, 0.1, 0.2],
    "asyncflow, lag 1": [9.0, 9.0, 9.0],
    "stable-baselines3": [0.2, 0.2, 0.6],
    "rsl_rl": [0.09, 0.09, 0.09],
    "CleanRL's shape": [0.1, 0.1, 0.2],
}


def test_a_slower_peer_has_a_ratio_above_1_within_a_round(update):
    """By hand: 2, 2 and 3 times as fast as stable-baselines3; 0.9, 0.9 and 0.45 times as fast as rsl_rl."""
    rows = update.describe_update(960, SECONDS).findings
    assert [row.what.rpartition("times as fast as ")[2] for row in rows] == list(SECONDS)[2:]
    assert [row.measured[:4] for row in rows] == ["2.00", "0.90", "1.00"]
    assert [row.is_met for row in rows] == [True, False, False]
    assert [row.target for row in rows] == [">= 1.15", ">= 1.2", ">= 1.1"]


def test_a_large_rollout_has_targets_of_its_own(update):
    rows = update.describe_update(8192, SECONDS).findings
    assert [(row.target, row.is_met) for row in rows] == [(">= 1.05", True), (">= 1.05", False), (">= 1.05", False)]


def test_the_note_has_the_median_milliseconds_of_everyone(update):
    (note,) = update.describe_update(960, SECONDS).notes
    assert note == (
        "Milliseconds of an update of 960 decisions: asyncflow 100.0, asyncflow, lag 1 9000.0, "
        "stable-baselines3 200.0, rsl_rl 90.0, CleanRL's shape 100.0."
    )


def test_both_sizes_are_measured_the_small_one_five_times_as_often(update, monkeypatch):
    calls = []
    monkeypatch.setattr(update, "isolated", lambda _, *arguments: calls.append(arguments) or SECONDS)
    part = update.bench_update(Settings(turns=6))
    assert calls == [(960, 30), (8192, 12)]
    assert len(part.findings) == 6
