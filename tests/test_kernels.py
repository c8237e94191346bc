"""Torch's kernels for lists of tensors against plain torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asyncflow import kernels
from asyncflow.kernels import AdamTensors, adam_step_each, copy_each, norm_each, scale_each

REPOSITORY = Path(__file__).parents[1]
RATES = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-5}


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def _each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.HAS_KERNELS  # of the torch that is tested with
    monkeypatch.setattr(kernels, "HAS_KERNELS", request.param)


def draw(seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in ((5,), (3, 4), ())]


@pytest.mark.usefixtures("_each_way")
def test_copies_factors_and_norms_are_those_of_every_tensor() -> None:
    targets, sources = draw(0), draw(1)
    copy_each(targets, sources)
    assert all(torch.equal(a, b) for a, b in zip(targets, sources, strict=True))
    scale_each(targets, torch.tensor(0.5))
    assert all(torch.equal(a, b / 2) for a, b in zip(targets, sources, strict=True))
    assert [float(norm) for norm in norm_each(sources)] == pytest.approx([float(x.norm()) for x in sources])


@pytest.mark.usefixtures("_each_way")
def test_adam_takes_the_steps_of_torchs_and_leaves_out_those_that_are_not_taken() -> None:
    own, reference = draw(2), [x.requires_grad_() for x in draw(2)]
    tensors = AdamTensors(
        own, [], *([torch.zeros_like(x) for x in own] for _ in range(2)), [torch.zeros(()) for _ in own]
    )
    optimizer = torch.optim.Adam(reference, lr=0.1, eps=1e-5)
    for seed, is_taken in ((3, True), (4, False), (5, True)):
        gradients = [x if is_taken else x * torch.nan for x in draw(seed)]
        adam_step_each(tensors._replace(gradients=gradients), torch.tensor(is_taken), **RATES)
        if is_taken:
            for x, gradient in zip(reference, gradients, strict=True):
                x.grad = gradient
            optimizer.step()
    for x, wanted, step in zip(own, reference, tensors.steps, strict=True):
        torch.testing.assert_close(x, wanted.detach())
        assert float(step) == 2.0


def test_no_other_file_calls_what_has_no_public_name_in_torch() -> None:
    """The private names are attributes of `torch` itself that begin with an underscore."""
    found = set()
    for path in [*(REPOSITORY / "asyncflow").rglob("*.py"), *(REPOSITORY / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            is_private = isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)
            if is_private and isinstance(node.value, ast.Name) and node.value.id == "torch":
                found.add(path.name)
    assert found == {"kernels.py"}
