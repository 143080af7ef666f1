from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from openwork.core.select import count_of
from openwork.errors import MethodError
from openwork.methods.sparsify.dpf import DPF
from openwork.sparsifier.prune_grow import shrink
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, batch, network

TOTAL = 352
CHECKS = [
    (name, check)
    for name, check in sparsifier_checks(DPF)
    if name != "gradient clipping"  # dense gradients are the point
]


@pytest.mark.parametrize(("name", "check"), CHECKS)
def test_conformance(name, check):
    check()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_dense_weights_follow_the_gradient_at_the_masked_ones(momentum):
    lr, steps, every = 0.1, 24, 3
    run = Loop(
        DPF(0.2, total_steps=steps, every=every, end=0.5), None,
        lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=momentum),
    )  # fmt: skip
    dense = {name: param.detach().clone() for name, param in network().named_parameters()}
    velocity = {name: torch.zeros_like(param) for name, param in dense.items()}
    masks = {name: torch.ones_like(param, dtype=torch.bool) for name, param in dense.items() if param.dim() == 2}
    twin = network()
    for step in range(steps):
        with torch.no_grad():
            for name, param in twin.named_parameters():
                param.copy_(torch.where(masks[name], dense[name], 0.0) if name in masks else dense[name])
        x, y = batch(step)
        grads = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
        if step and step % every == 0:
            scores = {name: dense[name].abs() for name in masks}
            density = 0.2 + 0.8 * max(0.0, 1 - step / 12) ** 3
            masks = shrink({n: torch.ones_like(m) for n, m in masks.items()}, scores, density, run.sparsifier.pattern)
        for (name, weight), grad in zip(dense.items(), grads, strict=True):
            velocity[name] = momentum * velocity[name] + grad
            dense[name] = weight - lr * velocity[name]
        run.step()
        assert all(torch.equal(mask, run.sparsifier.masks[name]) for name, mask in masks.items())
        for name in masks:
            assert torch.allclose(run.sparsifier.behind[name], dense[name], atol=1e-6)
        for name, param in run.model.named_parameters():
            shown = torch.where(masks[name], dense[name], 0.0) if name in masks else dense[name]
            assert torch.allclose(param, shown, atol=1e-6)


def test_the_number_kept_follows_the_cubic_schedule_and_weights_come_back():
    run = Loop(DPF(0.1, total_steps=60, every=3, end=0.5), None, lambda m: torch.optim.SGD(m.parameters(), lr=0.5))
    returned = 0
    for _ in range(60):
        before = dict(run.sparsifier.masks)
        run.step()
        returned += sum(int((run.sparsifier.masks[n] & ~mask).sum()) for n, mask in before.items())
    history = run.sparsifier.history
    assert [step for step, _ in history] == list(range(0, 60, 3))
    for j, (_, kept) in enumerate(history):
        assert sum(kept) == count_of(0.1 + 0.9 * max(0.0, 1 - j / 10) ** 3, TOTAL)
    assert returned > 0


def test_the_mask_stays_after_the_stop():
    history = Loop(DPF(0.1, total_steps=60, every=3, end=0.5, stop=0.7)).run(60).sparsifier.history
    assert history[-1][0] == 39
    early = DPF(0.1, total_steps=60, every=3, end=0.5, stop=0.0)
    assert Loop(early).run(60).sparsifier.history[-1][0] == 30  # never before the density is reached


def test_the_model_is_never_seen_dense():
    run = Loop(DPF(0.1, total_steps=20, every=2)).run(12)
    run.sparsifier.masks.check(run.model)
    hidden = torch.cat([run.sparsifier.behind[n][~mask] for n, mask in run.sparsifier.masks.items()])
    assert bool(hidden.ne(0).all())
    assert all(map(run.sparsifier.needs_dense_gradient, range(20)))


@pytest.mark.parametrize("wrong", [{"end": 1.5}, {"stop": -1.0}, {"every": 0}, {"total_steps": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        DPF(0.1, **{"total_steps": 10, **wrong})
