"""Checks of what a sparsifier holds: density, zeros, an untouched model, its state, its draws, its refusals."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from openwork.core.patterns import Unstructured
from openwork.core.select import count_of
from openwork.errors import MaskError
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.testing._toys import Loop, Make, batch, fill, hooks_of, network, require, same_masks, same_run


def final_density(make: Make, density: float, total_steps: int) -> None:
    """Check that round(density * total) weights are kept in the end, and what attaching and finalizing report."""
    run = Loop(make(density=density, total_steps=total_steps))
    run.run(total_steps)
    require(run.sparsifier.step == total_steps, f"{run.sparsifier.step} steps are counted after {total_steps}")
    masks = run.sparsifier.finalize()
    masks.check(run.model)
    check_count(run.sparsifier, density)
    last = run.sparsifier.history[-1][1]
    require(list(last) == [int(mask.sum()) for mask in masks.values()], "the history does not end with the final masks")


def check_count(sparsifier: Sparsifier, density: float) -> None:
    """Require exactly round(density * total) kept weights; with larger units, at most a unit a layer off."""
    masks, pattern = sparsifier.masks, sparsifier.pattern
    goal, kept, slack = count_of(density, masks.total()), masks.nnz(), 0
    if not isinstance(pattern, Unstructured):
        for mask in masks.values():
            pattern.check(mask)
            slack += mask.numel() // pattern.tiles(mask.float()).numel()
    require(abs(kept - goal) <= slack, f"{kept} of {masks.total()} weights are kept; density {density} is {goal}")


def zeros_from_the_start(make: Make, density: float, total_steps: int) -> None:
    """Check zeros right after attaching, also where the model holds infinity."""
    model = network()
    with torch.no_grad():
        for param in model.parameters():
            param.view(-1)[0] = 1e30
    sparsifier = make(density=density, total_steps=total_steps).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.masks.check(model)


def model_untouched(make: Make, density: float, total_steps: int) -> None:
    """Check keys, identity, hooks and deepcopy of a model in training."""
    model = network()
    keys, parameters, types = list(model.state_dict()), [*model.parameters()], [type(m) for m in model.modules()]
    run = Loop(make(density=density, total_steps=total_steps), model).run(max(2, total_steps // 4))
    require(list(model.state_dict()) == keys, f"the state's keys became {list(model.state_dict())}")
    require(all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "a parameter was replaced")
    require([type(module) for module in model.modules()] == types, "a module was replaced")
    found = hooks_of(model.modules())
    require(not found, f"the model carries {', '.join(found)}")
    twin = copy.deepcopy(model)
    x, _ = batch(0)
    require(torch.equal(twin(x), model(x)), "a deepcopy of the model computes something else")
    run.step()
    run.check()


def hooks_gone(make: Make, density: float, total_steps: int) -> None:
    """Check that `finalize` leaves optimizer and model as plain torch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = _optimizer_hooks(optimizer)
    run = Loop(make(density=density, total_steps=total_steps), model, lambda _: optimizer).run(3)
    masks = run.sparsifier.finalize()
    require(_optimizer_hooks(optimizer) == before, "hooks are left on the optimizer after finalize()")
    steps = run.sparsifier.step
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    require(run.sparsifier.step == steps, "steps are still counted after finalize()")
    params = dict(model.named_parameters())
    held = [name for name, mask in masks.items() if not bool(mask.all()) and not bool(params[name][~mask].all())]
    require(not held, f"masked weights of {', '.join(held)} are still held at zero after finalize()")


def _optimizer_hooks(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(value) for key, value in vars(optimizer).items() if "hook" in key)


def resume_before(make: Make, density: float, total_steps: int) -> None:
    """Check that a state loaded before `attach` goes on to the last bit."""
    _resume(make, density, total_steps, before=True)


def resume_after(make: Make, density: float, total_steps: int) -> None:
    """Check that a state loaded after `attach` goes on to the last bit."""
    _resume(make, density, total_steps, before=False)


def _resume(make: Make, density: float, total_steps: int, *, before: bool) -> None:
    def start(seed: int, attach: bool) -> Loop:
        fresh = make(density=density, total_steps=total_steps)
        return Loop(fresh, network(seed), lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), attach=attach)

    whole = start(0, attach=True).run(total_steps)
    first = start(0, attach=True)
    for point in (total_steps // 2, total_steps // 4 + 1):
        first = start(0, attach=True).run(point)
        states = first.states()
        _plain(states["sparsifier"])
        second = start(1, attach=not before)
        second.model.load_state_dict(states["model"])
        second.optimizer.load_state_dict(states["optimizers"][0])
        second.sparsifier.load_state_dict(states["sparsifier"])
        if before:
            second.attach()
        second.run(total_steps - point)
        same_run(second, whole, f"resumed after {point} of {total_steps} steps, not as uninterrupted")


def _plain(state: dict[str, Any]) -> None:
    for key, value in state.items():
        require(isinstance(value, Tensor | int | float | str), f"state {key!r} is a {type(value).__name__}, not plain data")


def same_seed(make: Make, density: float, total_steps: int) -> None:
    """Check that masks depend on the seed alone, and that torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            runs.append(Loop(make(density=density, total_steps=total_steps)).run(total_steps))
            require(torch.equal(before, torch.get_rng_state()), "torch's global generator was drawn from or seeded")
    same_run(runs[0], runs[1], "two runs of one seed")


def nan_gradient(make: Make, density: float, total_steps: int) -> None:
    """Check that a NaN gradient which masks depend on is refused by name, and that none wins a place in the masks."""
    plain = Loop(make(density=density, total_steps=total_steps))
    revisions = []
    for step in range(total_steps):
        before = len(plain.sparsifier.history)
        plain.step()
        if len(plain.sparsifier.history) > before:
            revisions.append((step, plain.sparsifier.masks))
    for step, expected in revisions[:2]:
        run = Loop(make(density=density, total_steps=total_steps)).run(step)
        masks, weights = dict(run.sparsifier.masks), copy.deepcopy(run.model.state_dict())
        run.backward()
        name = next((name for name, mask in masks.items() if not bool(mask.all())), next(iter(masks)))
        grad = dict(run.model.named_parameters())[name].grad
        for place in (masks[name], ~masks[name]):
            first = place.reshape(-1).nonzero().reshape(-1)[:1]
            grad.view(-1)[first] = torch.nan  # type: ignore[union-attr]
        try:
            run.optimizer.step()
        except MaskError as error:
            require(name in str(error), f"the error does not name {name!r}: {error}")
            moved = [n for n in masks if not torch.equal(masks[n], run.sparsifier.masks[n])]
            require(not moved, f"the masks of {', '.join(moved)} changed in spite of the error")
            changed = [n for n, w in run.model.state_dict().items() if not torch.equal(w, weights[n])]
            require(not changed, f"{', '.join(changed)} changed in spite of the error")
        else:
            wrong = [n for n in masks if not torch.equal(expected[n], run.sparsifier.masks[n])]
            require(not wrong, f"a NaN gradient of {name!r} changed the masks of {', '.join(wrong)} without an error")


def refuses_twice(make: Make, density: float, total_steps: int) -> None:
    """Check that attaching twice, and a state of another model, are refused."""
    run = Loop(make(density=density, total_steps=total_steps))
    try:
        run.attach()
    except MaskError:
        pass
    else:
        raise AssertionError("attach() on an attached sparsifier is not refused")
    other = fill(torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 4, bias=False)), 0)
    try:
        Loop(make(density=density, total_steps=total_steps), other).sparsifier.load_state_dict(run.sparsifier.state_dict())
    except MaskError:
        pass
    else:
        raise AssertionError("a state whose masks do not fit the model is not refused")


def again(make: Make, density: float, total_steps: int) -> None:
    """Check that a second sparsifier may follow on the same model and optimizer."""
    first = Loop(make(density=density, total_steps=total_steps)).run(total_steps)
    twin = Loop(make(density=density, total_steps=total_steps)).run(total_steps)
    first.sparsifier.finalize()
    same_masks(first.sparsifier, twin.sparsifier, "the same run twice")
    second = Loop(make(density=density, total_steps=total_steps), first.model, lambda _: first.optimizer)
    second.run(total_steps)
    check_count(second.sparsifier, density)


CHECKS = {
    "final density": final_density,
    "zeros from the start": zeros_from_the_start,
    "model untouched": model_untouched,
    "hooks gone": hooks_gone,
    "resume, loaded before attach": resume_before,
    "resume, loaded after attach": resume_after,
    "same seed": same_seed,
    "nan gradient": nan_gradient,
    "refusals": refuses_twice,
    "a second sparsifier": again,
}
