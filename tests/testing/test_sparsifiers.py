"""The suite of sparsifiers must find what is broken: every sabotage here fails the check that is about it."""

from __future__ import annotations

import pytest
import torch

from openwork.core import criteria
from openwork.core.masks import Masks
from openwork.core.schedules import Every
from openwork.errors import MethodError
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.testing import check_sparsifier, sparsifier_checks


class Sound(Sparsifier):
    every = Every(2)

    def __init__(self, density, *, total_steps):
        super().__init__(density)

    def initial(self, params):
        return self.random_masks(params)

    def revise(self, params, grads, step):
        return self.exchange(params, grads, self.masks, 0.4) if step in self.every else None


class OneShort(Sound):
    def initial(self, params):
        masks = dict(super().initial(params))
        mask = masks["0.weight"] if "0.weight" in masks else next(iter(masks.values()))
        mask.view(-1)[int(mask.reshape(-1).int().argmax())] = False
        return Masks(masks)


class Leaking(Sound):
    """Forgets the zeros."""

    def before_step(self, params):
        pass

    def after_step(self, params):
        pass


class GlobalDraw(Sound):
    def initial(self, params):
        shares = self.shares(params)
        return Masks({name: self.pattern.select(torch.rand_like(param), shares[name]) for name, param in params.items()})


class HookOnModel(Sound):
    def initial(self, params):
        next(iter(params.values())).register_hook(lambda grad: grad)
        return super().initial(params)


class Forgetful(Sound):
    """Keeps a number that masks depend on and does not save it."""

    calls = 0

    def revise(self, params, grads, step):
        self.calls += 1
        return self.exchange(params, grads, self.masks, 0.1 * (self.calls % 5))


class NanWins(Sound):
    def revise(self, params, grads, step):
        if step not in self.every:
            return None
        scores = {name: torch.nan_to_num(grad.abs(), nan=1e9) for name, grad in grads.items()}
        return Masks({name: torch.where(scores[name] > 1e8, True, mask) for name, mask in self.masks.items()})


class MaskedGrowth(Sound):
    """Looks at gradients after they were masked."""

    def mask_gradients(self):
        self._zero_gradients()


class HooksStay(Sound):
    def detach(self):
        self._handles = []


class CountsClosures(Sound):
    def _pre(self, optimizer, args, kwargs):
        super()._pre(optimizer, args, kwargs)  # the closure's loss is not passed on: it is evaluated once more


class WrongStep(Sound):
    def after_step(self, params):
        super().after_step(params)
        self.step += 1


class KeepsNames(Sound):
    def attach(self, model, optimizer=None):
        return super().attach(torch.nn.ModuleDict({"wrapped": model}), optimizer)


class DrawsAtEveryCall(Sound):
    """Draws for each step that is masked, so that clipping changes the masks."""

    def mask_gradients(self):
        torch.rand(1, generator=self.generator)
        super().mask_gradients()

    def revise(self, params, grads, step):
        return self.exchange(params, grads, self.masks, 0.4, grow=criteria.random)


SABOTAGE = [
    (OneShort, "final density"),
    (Leaking, "optimizer SGD"),
    (Leaking, "final density"),
    (GlobalDraw, "same seed"),
    (HookOnModel, "model untouched"),
    (Forgetful, "resume, loaded before attach"),
    (Forgetful, "resume, loaded after attach"),
    (NanWins, "nan gradient"),
    (MaskedGrowth, "gradient clipping"),
    (HooksStay, "hooks gone"),
    (CountsClosures, "closure"),
    (WrongStep, "gradient accumulation"),
    (KeepsNames, "tied weights"),
    (DrawsAtEveryCall, "gradient clipping"),
]


@pytest.mark.parametrize(("broken", "name"), SABOTAGE, ids=lambda value: getattr(value, "__name__", value))
def test_sabotage_is_found(broken, name):
    checks = dict(sparsifier_checks(Sound, density=0.3, total_steps=12))
    checks[name]()
    checks = dict(sparsifier_checks(broken, density=0.3, total_steps=12))
    with pytest.raises(Exception) as found:  # an AssertionError, or the MaskError of a check of masks
        checks[name]()
    assert str(found.value)


def test_every_check_has_a_name_of_its_own():
    names = [name for name, _ in sparsifier_checks(Sound)]
    assert len(set(names)) == len(names) >= 35


def test_as_one_call_it_names_the_check_and_skips():
    names = [name for name, _ in sparsifier_checks(Sound)]
    others = [name for name in names if name not in ("final density", "closure")]
    check_sparsifier(Sound, density=0.3, total_steps=6, skip=others)
    with pytest.raises(AssertionError, match=r"check 'final density': 104 of 352 weights are kept; density 0.3 is 106"):
        check_sparsifier(TwoShort, density=0.3, total_steps=6, skip=others)
    check_sparsifier(TwoShort, density=0.3, total_steps=6, skip=[*others, "final density"])
    with pytest.raises(MethodError, match="there is no check 'clipping' to skip; there are final density"):
        check_sparsifier(Sound, skip=["clipping"])


class TwoShort(Sound):
    def initial(self, params):
        masks = dict(super().initial(params))
        mask = masks["0.weight"]
        mask.view(-1)[mask.reshape(-1).nonzero()[:2, 0]] = False
        return Masks(masks)
