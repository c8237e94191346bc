"""Steps that are skipped, undone or taken over from another optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asyncflow.errors import CheckpointError
from asyncflow.ppo.optimizer import GuardedAdam


def make_optimizer(*sizes: int) -> GuardedAdam:
    """Return an optimizer of parameters called a, b, ... with these sizes, and of none in a second group."""
    rng = torch.Generator().manual_seed(0)
    named = {name: nn.Parameter(torch.randn(n, generator=rng)) for name, n in zip("abc", sizes, strict=False)}
    groups = [{"params": list(named.values()), "lr": 0.1}, {"params": [], "lr": 0.2}]
    return GuardedAdam(groups, named, eps=1e-5)


def step(optimizer: GuardedAdam, is_finite: bool = True, gradient: float = 1.0) -> None:
    for parameter in parameters(optimizer):
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step_if(torch.tensor(is_finite))


def parameters(optimizer: GuardedAdam) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


def everything(optimizer: GuardedAdam) -> list[Tensor]:
    return [x.detach().clone() for x in (*parameters(optimizer), *optimizer.state_tensors().values())]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_finite_step_is_adam_s_bit_for_bit() -> None:
    guarded, plain = make_optimizer(3, 2), make_optimizer(3, 2)
    reference = torch.optim.Adam(parameters(plain), lr=0.1, eps=1e-5, fused=True)
    for gradient in (1.0, -3.0, 0.5):
        step(guarded, gradient=gradient)
        for parameter in parameters(plain):
            parameter.grad = torch.full_like(parameter, gradient)
        reference.step()
    assert_equal(parameters(guarded), parameters(plain))
    assert_equal(list(guarded.state_tensors().values()), [x for s in reference.state.values() for x in s.values()])


@pytest.mark.parametrize("limit", [0.01, 100.0], ids=["clipped", "not clipped"])
def test_gradients_are_clipped_as_by_clip_grad_norm_bit_for_bit(limit: float) -> None:
    ours, theirs = make_optimizer(30, 20), make_optimizer(30, 20)
    for optimizer in (ours, theirs):
        rng = torch.Generator().manual_seed(1)
        for parameter in parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=rng)
    norms = ours.clip_gradients(limit)
    assert torch.equal(norms[0], nn.utils.clip_grad_norm_(parameters(theirs), limit))
    assert_equal([p.grad for p in parameters(ours)], [p.grad for p in parameters(theirs)])


def test_parameters_of_several_types_are_clipped_and_stepped_as_by_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel takes one type alone on a GPU, and a model from elsewhere may mix them."""
    kernel, calls = torch._fused_adam_, []

    def watched(parameters: list[Tensor], *lists: list[Tensor], **numbers: Any) -> None:
        calls.append({parameter.dtype for parameter in parameters})
        kernel(parameters, *lists, **numbers)

    types = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32}
    ours, theirs = ({k: nn.Parameter(torch.linspace(-1, 1, 5).to(t)) for k, t in types.items()} for _ in range(2))
    guarded = GuardedAdam([{"params": list(ours.values()), "lr": 0.1}], ours, eps=1e-5)
    reference = torch.optim.Adam(theirs.values(), lr=0.1, eps=1e-5, fused=True)
    for gradient in (1.0, -3.0, 0.5):
        for parameter in (*ours.values(), *theirs.values()):
            parameter.grad = torch.full_like(parameter, gradient)
        norms = guarded.clip_gradients(2.0)
        assert norms[0] == nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_fused_adam_", watched)
            guarded.step_if(torch.tensor(True))
        reference.step()
    assert_equal(list(ours.values()), list(theirs.values()))
    assert calls == [{torch.float32}, {torch.bfloat16}] * 3


def test_a_group_without_gradients_has_a_norm_of_zero() -> None:
    optimizer = make_optimizer(3)
    parameters(optimizer)[0].grad = torch.tensor([3.0, 0.0, 4.0])
    assert optimizer.clip_gradients(1.0).tolist() == [5.0, 0.0]


def test_a_parameter_without_a_gradient_takes_no_step_and_gets_no_state() -> None:
    optimizer = make_optimizer(3, 2)
    before = everything(optimizer)
    parameters(optimizer)[0].grad = torch.ones(3)
    optimizer.step_if(torch.tensor(True))
    assert torch.equal(parameters(optimizer)[1], before[1])
    assert set(optimizer.state_tensors()) == {"a.step", "a.exp_avg", "a.exp_avg_sq"}


def test_a_skipped_step_changes_nothing() -> None:
    optimizer = make_optimizer(3, 2)
    step(optimizer)
    before = everything(optimizer)
    step(optimizer, is_finite=False, gradient=float("nan"))
    assert_equal(everything(optimizer), before)


def test_after_a_skipped_first_step_training_goes_on_as_without_it() -> None:
    disturbed, undisturbed = make_optimizer(3), make_optimizer(3)
    step(disturbed, is_finite=False, gradient=float("nan"))
    for optimizer in (disturbed, undisturbed):
        step(optimizer)
    assert_equal(everything(disturbed), everything(undisturbed))


def test_steps_are_put_back() -> None:
    optimizer = make_optimizer(3, 2)
    step(optimizer)
    before = everything(optimizer)
    optimizer.remember()
    step(optimizer, gradient=-2.0)
    optimizer.put_back()
    assert_equal(everything(optimizer), before)


def test_state_that_did_not_exist_is_removed() -> None:
    optimizer = make_optimizer(3)
    optimizer.remember()
    step(optimizer)
    optimizer.put_back()
    assert optimizer.state_tensors() == {}


def test_the_copy_is_allocated_once() -> None:
    optimizer = make_optimizer(3, 2)
    addresses = [tensor.data_ptr() for tensor in optimizer._copies.values()]
    for _ in range(2):
        optimizer.remember()
        step(optimizer)
    assert [tensor.data_ptr() for tensor in optimizer._copies.values()] == addresses


def test_loaded_state_shares_no_memory_with_what_was_given() -> None:
    optimizer, other = make_optimizer(3), make_optimizer(3)
    step(optimizer)
    other.load_state_tensors(optimizer.state_tensors())
    assert_equal(list(other.state_tensors().values()), list(optimizer.state_tensors().values()))
    assert other.state_tensors()["a.exp_avg"].data_ptr() != optimizer.state_tensors()["a.exp_avg"].data_ptr()


def test_loading_removes_what_is_not_given() -> None:
    optimizer = make_optimizer(3)
    step(optimizer)
    optimizer.load_state_tensors({})
    assert optimizer.state_tensors() == {}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"z.step": torch.zeros(())}, "unknown: z.step$"),
        ({f"{name}.step": torch.zeros(()) for name in "vwxyz"}, "unknown: v.step, w.step, x.step and 2 more$"),
        ({"b.exp_avg": None}, "missing: b.exp_avg$"),
        ({"a.exp_avg_sq": torch.zeros(4)}, r"misshapen: a.exp_avg_sq \[4\] not \[3\]$"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(
    changes: dict[str, Tensor | None], complaint: str
) -> None:
    optimizer = make_optimizer(3, 2)
    step(optimizer)
    before = everything(optimizer)
    tensors = {name: x for name, x in (optimizer.state_tensors() | changes).items() if x is not None}
    with pytest.raises(CheckpointError, match=complaint):
        optimizer.load_state_tensors(tensors)
    assert_equal(everything(optimizer), before)
