"""The journal: what it holds, and that replaying it gives what would have followed, bit for bit."""

import pytest
import torch
from fake_simulator import ACTION_DIM, SUCCEED, FakeSimulator
from worker_cases import tensors

from asyncflow.config.sections import EnvConfig
from asyncflow.envs.base import ChunkResult, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.envs.workers import WorkerVecEnv

N, H, SEED = 2, 4, 3


def chunk(value: float) -> torch.Tensor:
    """Return the chunk [N, H, 1] whose rows are `value` and `value + 0.5`."""
    return torch.tensor([value, value + 0.5])[:, None, None].expand(N, H, 1)


@pytest.fixture
def journal() -> EpisodeJournal:
    """Environment 0 is two chunks into episode 0, environment 1 has just begun episode 1."""
    journal = EpisodeJournal.start(N)
    journal.record(range(N), chunk(1.0), torch.tensor([False, False]))
    journal.record(range(N), chunk(2.0), torch.tensor([False, True]))
    return journal


def test_an_end_opens_the_next_episode_and_forgets_the_actions(journal):
    assert journal.episodes == [0, 1]
    assert journal.actions(0).flatten().tolist() == [1.0] * H + [2.0] * H
    assert journal.actions(1) is None


def test_a_copy_stays_as_it_is(journal):
    copy = journal.copy()
    journal.record(range(N), chunk(3.0), torch.tensor([True, False]))
    assert copy.episodes == [0, 1]
    assert [len(chunks) for chunks in copy.chunks] == [2, 0]


@pytest.mark.parametrize("num_more", [0, 1])
def test_tensors_hold_all_of_it(journal, num_more):
    for _ in range(num_more):
        journal.record(range(1, 2), chunk(4.0)[:1], torch.tensor([False]))
    again = EpisodeJournal.from_tensors(journal.to_tensors())
    assert again.episodes == journal.episodes
    for env in range(N):
        assert (again.actions(env) is None) == (journal.actions(env) is None)
        assert again.actions(env) is None or torch.equal(again.actions(env), journal.actions(env))


def test_a_replay_that_leads_elsewhere_is_found_but_for_lost_episodes(journal):
    states = torch.arange(4.0).view(N, 2)
    journal.note_states(states)
    again = EpisodeJournal.from_tensors(journal.copy().to_tensors())
    assert again.find_differing(states) == []
    assert again.find_differing(states + torch.tensor([[0.0, 0.0], [0.0, 1e-6]])) == [1]
    again.is_lost = [False, True]
    assert again.find_differing(states + 1) == [0]


def test_a_journal_from_before_there_were_checksums_finds_nothing(journal):
    tensors = journal.to_tensors()
    del tensors["checksums"]
    assert EpisodeJournal.from_tensors(tensors).find_differing(torch.zeros(N, 2)) == []


def test_tensors_of_an_untouched_journal_hold_that(journal):
    again = EpisodeJournal.from_tensors(EpisodeJournal.start(N).to_tensors())
    assert again == EpisodeJournal.start(N)


def random_chunks(count: int, action_dim: int) -> torch.Tensor:
    return torch.rand(count, N, H, action_dim, generator=torch.Generator().manual_seed(0)) - 0.5


def play(vec_env: VecEnv, chunks: torch.Tensor) -> list[ChunkResult]:
    """Execute chunks; every other one in groups of their own."""
    results = []
    for index, actions in enumerate(chunks):
        groups = [range(1), range(1, N)] if index % 2 else [range(N)]
        for group in groups:
            vec_env.step_async(actions[list(group)], group)
        results += [vec_env.step_wait(group) for group in reversed(groups)]
    return results


def assert_resumes_bit_for_bit(vec_env: VecEnv, chunks: torch.Tensor, cut: int) -> None:
    """Cut a sequence after an odd number of chunks, rebuild, and compare all that follows with the uncut sequence."""
    vec_env.reset(SEED)
    last = play(vec_env, chunks[:cut])[-1]
    stored = vec_env.journal().to_tensors()
    assert stored["num_chunks"].any()
    uncut = play(vec_env, chunks[cut:])
    obs = vec_env.reset(SEED, EpisodeJournal.from_tensors(stored))
    assert torch.equal(obs["state"], last.obs["state"])
    for result, reference in zip(play(vec_env, chunks[cut:]), uncut, strict=True):
        for name, value in tensors(reference).items():
            assert torch.equal(tensors(result)[name], value), name


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_the_toy_resumes_bit_for_bit(cut):
    assert_resumes_bit_for_bit(ToyVecEnv(N, H, horizon=22), random_chunks(20, 2), cut)


@pytest.fixture(scope="module")
def fake():
    with WorkerVecEnv(FakeSimulator, EnvConfig(num_workers=1), N, H, SEED) as vec_env:
        yield vec_env


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_simulators_in_processes_resume_bit_for_bit(fake, cut):
    chunks = random_chunks(12, ACTION_DIM)
    chunks[1, 0, 1, SUCCEED] = 1.0
    assert_resumes_bit_for_bit(fake, chunks, cut)


def test_a_resumed_journal_goes_on(fake):
    chunks = random_chunks(5, ACTION_DIM)
    fake.reset(SEED)
    play(fake, chunks)
    uncut = fake.journal()
    fake.reset(SEED)
    play(fake, chunks[:3])
    fake.reset(SEED, fake.journal())
    play(fake, chunks[3:])
    assert fake.journal().episodes == uncut.episodes
    assert torch.equal(fake.journal().actions(1), uncut.actions(1))


def test_a_chunk_under_way_is_not_in_the_journal(fake):
    fake.reset(SEED)
    fake.step_async(torch.zeros(N, H, ACTION_DIM), range(N))
    assert fake.journal() == EpisodeJournal.start(N)
    fake.step_wait(range(N))
    assert len(fake.journal().chunks[0]) == 1


def test_an_episode_that_ends_in_its_replay_is_followed_by_the_next_one(fake):
    journal = EpisodeJournal.start(N)
    actions = torch.zeros(1, H, ACTION_DIM)
    actions[0, 1, SUCCEED] = 1.0
    journal.record(range(1), actions, torch.tensor([False]))
    fake.reset(SEED, journal)
    assert fake.journal() == EpisodeJournal([1, 0], [[], []], [False, False])
