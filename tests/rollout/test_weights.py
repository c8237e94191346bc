"""Versions, leases and torn weights."""

import threading

import pytest
import torch
from torch import nn
from waiting import PATIENCE_S, Waiting

from asyncflow.errors import AsyncflowError
from asyncflow.kernels import copy_each
from asyncflow.rollout.weights import PublisherClosed, WeightPublisher, changing_tensors, make_acting_copy


class Constant(nn.Module):
    """A policy whose every changing number is its version."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))
        self.frozen = nn.Parameter(torch.ones(10), requires_grad=False)
        self.register_buffer("noise_level", torch.zeros(3))

    def fill(self, version):
        with torch.no_grad():
            for tensor in changing_tensors(self).values():
                tensor.fill_(version)


def test_an_older_version_is_still_there_within_the_lag():
    policy = Constant()
    publisher = WeightPublisher(policy, max_policy_lag=2)
    for version in (1, 2):
        policy.fill(version)
        publisher.publish(version)
    for version in (0, 1, 2):
        with publisher.lease(version) as (taken, tensors):
            assert taken == version
            assert all((tensor == version).all() for tensor in tensors)


def test_a_buffer_that_was_replaced_by_another_tensor_is_published():
    policy = Constant()
    publisher = WeightPublisher(policy, 0)
    policy.noise_level = torch.ones(3)
    publisher.publish(1)
    assert (publisher.snapshots()[1]["noise_level"] == 1).all()


def test_a_lease_keeps_its_weights_while_the_policy_is_stepped():
    policy = Constant()
    publisher = WeightPublisher(policy, 1)
    with publisher.lease(0) as (_, tensors):
        policy.fill(7)
        assert all((tensor == 0).all() for tensor in tensors)


def test_the_trainer_waits_for_a_lease_before_it_overwrites():
    policy = Constant()
    publisher = WeightPublisher(policy, 0)
    policy.fill(1)
    with publisher.lease(0) as (_, tensors):
        trainer = Waiting(lambda: publisher.publish(1), publisher._changed)
        assert trainer.waits()
        assert all((tensor == 0).all() for tensor in tensors)
    trainer.finish()
    assert publisher.newest == 1


def test_a_lease_waits_for_its_version_and_close_wakes_it():
    publisher = WeightPublisher(Constant(), 0)

    def lease():
        with publisher.lease(5):
            pass

    collector = Waiting(lease, publisher._changed)
    assert collector.waits()
    publisher.close()
    with pytest.raises(PublisherClosed):
        collector.finish()


def test_a_version_that_was_written_over_is_refused_instead_of_waited_for():
    publisher = WeightPublisher(Constant(), 1)
    for version in (1, 2):
        publisher.publish(version)
    with (
        pytest.raises(AsyncflowError, match=r"version 0 of the weights is gone; held are \[1, 2\]"),
        publisher.lease(0),
    ):
        pass


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_no_lease_is_ever_torn(lag):
    """A publisher and a reader race; every snapshot read is of one version and of the one asked for."""
    policy = Constant()
    publisher = WeightPublisher(policy, lag)
    num_rollouts, seen, torn = 300, [], []
    collected = threading.Semaphore(0)

    def collect():
        acting = make_acting_copy(policy)
        for rollout in range(num_rollouts):
            with publisher.lease(max(0, rollout - lag)) as (version, tensors):
                copy_each(list(changing_tensors(acting).values()), tensors)
            values = {float(x) for t in changing_tensors(acting).values() for x in (t.min(), t.max())}
            torn.extend(values - {float(version)})
            seen.append(version)
            collected.release()

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    for version in range(1, num_rollouts):
        assert collected.acquire(timeout=PATIENCE_S)  # rollout version - 1 is there, as before an update
        policy.fill(version)
        publisher.publish(version)
    collector.join(PATIENCE_S)
    assert not torn
    assert seen == [max(0, n - lag) for n in range(num_rollouts)]


def test_restored_snapshots_are_those_of_their_versions():
    policy = Constant()
    publisher = WeightPublisher(policy, 2)
    for version in range(1, 6):
        policy.fill(version)
        publisher.publish(version)
    resumed = WeightPublisher(Constant(), 2)
    resumed.restore(publisher.snapshots())
    assert list(resumed.snapshots()) == [3, 4, 5]
    assert resumed.newest == 5
    for version in (3, 4, 5):
        with resumed.lease(version) as (taken, tensors):
            assert taken == version
            assert all((tensor == version).all() for tensor in tensors)


def test_nothing_but_what_is_restored_is_published():
    policy = Constant()
    publisher = WeightPublisher(policy, 4)
    publisher.restore({version: changing_tensors(policy) for version in (6, 8)})
    assert list(publisher.snapshots()) == [6, 8]


def test_of_more_versions_than_there_is_room_for_the_newest_are_restored():
    policy = Constant()
    publisher = WeightPublisher(policy, 1)
    publisher.restore({version: changing_tensors(policy) for version in (9, 7, 10, 8)})
    assert list(publisher.snapshots()) == [9, 10]


def test_the_acting_copy_shares_frozen_weights_only():
    policy = Constant()
    acting = make_acting_copy(policy)
    assert acting.frozen is policy.frozen
    assert acting.weight.data_ptr() != policy.weight.data_ptr()
    assert acting.noise_level.data_ptr() != policy.noise_level.data_ptr()
