from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwork.core.rng import derive, generator
from openwork.errors import DataError, DivergedError, MaskError, ModelError, RecipeError
from openwork.methods.sparsify.rigl import RigL
from openwork.sparsifier import Fixed
from openwork.train import checkpoints, rates
from openwork.train.evaluate import evaluate
from openwork.train.loop import History, fit
from openwork.train.settings import Settings
from tests.train.toys import Toy, assert_same, net, stop_at, weights

STEPS = 24
SETTINGS = Settings(steps=STEPS, batch_size=8, lr=0.05, warmup=0.1, label_smoothing=0.1)


def plain_net() -> nn.Module:
    """Without dropout, so that a loop by hand needs no noise."""
    model = net()
    model[3].p = 0.0  # type: ignore[index]
    return model


def batches(seed: int, stream: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    source = Toy()
    for epoch in range(steps):
        yield from source.train_batches(derive(seed, "stream", stream), epoch, 8)


# ---- the loop is the loop one would write -------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05])
def test_fit_is_the_loop_by_hand(clip: float | None) -> None:
    settings = Settings(steps=STEPS, batch_size=8, lr=0.05, warmup=0.1, label_smoothing=0.1, clip=clip)
    model, twin = plain_net(), plain_net()
    history = fit(model, Toy(), settings, seed=3)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    twin.train()
    for step, (x, y) in zip(range(STEPS), batches(3, 0, STEPS), strict=False):
        t = step / STEPS
        optimizer.param_groups[0]["lr"] = 0.05 * (t / 0.1 if t < 0.1 else rates.cosine((t - 0.1) / 0.9))
        loss = nn.functional.cross_entropy(twin(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
            assert norm > clip, "otherwise this tests nothing"
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
        losses.append((step, loss.item()))
    assert_same(weights(model), weights(twin))
    assert history == History(STEPS, tuple(losses), history.seconds)
    assert history.seconds > 0
    assert all(param.grad is None for param in model.parameters())


def test_training_learns_and_scores_show_it() -> None:
    model, source = net(), Toy(240, spread=0.5)
    data = [(source.x, source.y)]
    before = evaluate(model, data)
    fit(model, source, Settings(steps=60, batch_size=32, lr=0.05), seed=0)
    after = evaluate(model, data)
    assert after.accuracy > 0.95 > before.accuracy
    assert after.nll < 0.5 * before.nll


def test_words_are_learnt_too() -> None:
    class Words:
        name = "words"

        def steps_per_epoch(self, batch_size: int) -> int:
            return 2

        def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            for index in range(2):
                x = torch.randint(0, 6, (batch_size, 5), generator=generator(seed, epoch, index))
                yield x, (x + 1) % 6

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 6)
            nn.init.zeros_(self.table.weight)

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return self.table(x), "cache"

    model = Model()
    history = fit(model, Words(), Settings(steps=60, batch_size=4, lr=0.05, optimizer="adam"), seed=0)
    assert history.losses[0][1] == pytest.approx(math.log(6))
    assert torch.equal(model.table.weight.argmax(-1), (torch.arange(6) + 1) % 6)


def test_overrides_take_the_place_of_settings() -> None:
    def trained(settings: Settings, **options: Any) -> dict[str, Tensor]:
        model = net()
        fit(model, Toy(), settings, seed=0, **options)
        return weights(model)

    wanted = Settings(steps=9, batch_size=8, lr=0.05, schedule="linear", weight_decay=0.01)
    given = Settings(steps=99, batch_size=8, lr=0.05, schedule="cosine", warmup=0.3, weight_decay=0.7)
    overridden = trained(given, steps=9, schedule=rates.linear, weight_decay=0.01)
    assert_same(trained(wanted), overridden)
    before = weights(net())
    assert_same(before, trained(given, steps=0))
    for bad in (-1, 1.5, True):
        with pytest.raises(RecipeError, match="whole number of at least 0"):
            trained(given, steps=bad)
    with pytest.raises(RecipeError, match="weight_decay is -1"):
        trained(given, weight_decay=-1)


# ---- randomness ---------------------------------------------------------------------------------------------------


def test_nothing_depends_on_or_disturbs_the_global_generator() -> None:
    results = []
    for seed in (1, 2):
        model = net()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        history = fit(model, Toy(), SETTINGS, seed=0, observe=lambda _step: torch.rand(3))
        assert torch.equal(torch.get_rng_state(), before)
        results.append((weights(model), history.losses))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_seed_and_stream_choose_order_and_noise() -> None:
    class Spy(Toy):
        seeds: list[int]

        def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            self.seeds.append(seed)
            return super().train_batches(0, 0, batch_size)  # the same batches for all: what differs is the noise

    found, seeds = {}, {}
    for seed, stream in [(0, 0), (0, 1), (1, 0)]:
        model, source = net(), Spy()
        source.seeds = []
        fit(model, source, SETTINGS, seed=seed, stream=stream, steps=3)
        found[seed, stream] = tuple(next(model.parameters()).flatten().tolist())
        seeds[seed, stream] = tuple(source.seeds)
    assert len(set(found.values())) == 3, "dropout differs"
    assert len(set(seeds.values())) == 3, "batch order differs"


def test_callbacks_may_evaluate_the_model() -> None:
    source, seen, reported = Toy(), [], []
    model, twin = net(), net()

    def observe(step: int) -> None:
        seen.append((step, evaluate(model, [(source.x, source.y)]).nll))

    fit(model, source, SETTINGS, seed=0, observe=observe, on_step=lambda step, loss: reported.append((step, loss)))
    history = fit(twin, source, SETTINGS, seed=0)
    assert_same(weights(model), weights(twin))
    assert [step for step, _ in seen] == list(range(1, STEPS + 1))
    assert tuple(reported) == history.losses


def test_history_keeps_about_two_hundred_losses() -> None:
    history = fit(plain_net(), Toy(), Settings(steps=1003, batch_size=8, lr=1e-4), seed=0)
    steps = [step for step, _ in history.losses]
    assert steps == [*range(0, 1003, 5), 1002]


# ---- sparsity -----------------------------------------------------------------------------------------------------


def masks(model: nn.Module) -> dict[str, Tensor]:
    draw = generator(0, "masks")
    return {
        name: torch.rand(param.shape, generator=draw) < 0.4 for name, param in model.named_parameters() if param.dim() > 1
    }


def test_masked_gradients_do_not_count_in_clipping_and_the_penalty_does() -> None:
    class Shrinking(Fixed):
        def penalty(self) -> Tensor:
            return 0.1 * sum((param.square().sum() for param in self._params.values()), torch.zeros(()))

    settings = Settings(steps=1, batch_size=8, lr=0.5, momentum=0.0, weight_decay=0.0, clip=0.01, schedule="constant")
    model, twin = plain_net(), plain_net()
    held = masks(model)
    history = fit(model, Toy(), settings, seed=0, sparsifier=Shrinking(held))
    with torch.no_grad():
        for name, mask in held.items():
            twin.get_parameter(name).mul_(mask)
    x, y = next(batches(0, 0, 1))
    loss = nn.functional.cross_entropy(twin(x), y) + 0.1 * sum(twin.get_parameter(n).square().sum() for n in held)
    loss.backward()
    params = dict(twin.named_parameters())
    grads = {n: p.grad.mul(held[n]) if n in held else p.grad for n, p in params.items() if p.grad is not None}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert history.losses[0][1] == pytest.approx(loss.item(), rel=1e-6)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, params[name] - 0.5 * grads[name] * 0.01 / (norm + 1e-6))


def test_clipping_leaves_dense_gradients_to_the_revision() -> None:
    found = {}
    for clip in (None, 1e-3):
        rigl = RigL(0.3, total_steps=STEPS, every=4)
        settings = Settings(steps=STEPS, batch_size=8, lr=0.05, clip=clip)
        fit(plain_net(), Toy(), settings, seed=0, steps=1, sparsifier=rigl)
        found[clip] = dict(rigl.masks)
    start = RigL(0.3, total_steps=STEPS, every=4).attach(plain_net()).masks
    assert any(bool((found[None][name] & ~start[name]).any()) for name in start), "weights have grown"
    assert_same(found[None], found[1e-3])


def test_the_model_ends_sparse_and_free_of_hooks() -> None:
    model, sparsifier = net(), RigL(0.2, total_steps=STEPS)
    keys = list(model.state_dict())
    fit(model, Toy(), SETTINGS, seed=0, sparsifier=sparsifier)
    sparsifier.masks.check(model)
    assert sparsifier.masks.density() == pytest.approx(0.2, abs=1 / sparsifier.masks.total())
    assert sparsifier.step == STEPS
    assert list(model.state_dict()) == keys
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(model, optimizer)  # would raise if it were still attached
    with pytest.raises(MaskError, match="attached already"):
        sparsifier.attach(model, optimizer)


def test_a_failed_run_lets_go_of_the_sparsifier() -> None:
    model, sparsifier = net(), RigL(0.2, total_steps=STEPS)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Toy(), SETTINGS, seed=0, sparsifier=sparsifier, on_step=stop_at(3))
    sparsifier.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


# ---- divergence ---------------------------------------------------------------------------------------------------


class Poisoned(Toy):
    """The input of one step of the first epoch holds NaN."""

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (x, y) in enumerate(super().train_batches(seed, epoch, batch_size)):
            yield x * math.nan if (epoch, index) == (0, 3) else x, y


def test_a_bad_input_stops_at_once_and_leaves_the_last_finite_checkpoint(tmp_path: Path) -> None:
    sparsifier = RigL(0.5, total_steps=STEPS)
    with pytest.raises(DivergedError, match=r"step 3: the loss is nan .* the input batch"):
        fit(net(), Poisoned(), SETTINGS, seed=0, checkpoint=tmp_path, every_seconds=0, sparsifier=sparsifier)
    found, _ = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert all(bool(t.isfinite().all()) for t in found.tensors.values() if t.is_floating_point())


def test_a_bad_parameter_is_named_one_step_later_and_never_written(tmp_path: Path) -> None:
    model = net()

    def spoil(step: int) -> None:
        if step == 5:
            model[4].weight.data[0, 0] = math.inf  # type: ignore[index]

    with pytest.raises(DivergedError, match=r"step 5: .* parameter '4.weight'"):
        fit(model, Toy(), SETTINGS, seed=0, observe=spoil)
    model = net()
    with pytest.raises(DivergedError, match=r"within 5 steps: parameter '4.weight'"):
        fit(model, Toy(), SETTINGS, seed=0, observe=spoil, checkpoint=tmp_path, every_seconds=0)
    found, _ = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 4


def test_a_learning_rate_too_high_is_divergence() -> None:
    with pytest.raises(DivergedError, match=r"at step \d+: the loss is"):
        fit(net(norm=False), Toy(), Settings(steps=STEPS, batch_size=8, lr=1e30), seed=0)


class Root(nn.Module):
    """A root of zero: a finite output whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.inner = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shift.sqrt()  # type: ignore[no-any-return]


def test_a_bad_gradient_is_named_where_it_is_looked_at() -> None:
    settings = Settings(steps=3, batch_size=8, clip=1.0)
    with pytest.raises(DivergedError, match="step 0: the loss is finite but gradient of 'shift' is not"):
        fit(Root(), Toy(), settings, seed=0)
    with pytest.raises(DivergedError, match=r"step 1: the loss is nan .* parameter 'shift'"):
        fit(Root(), Toy(), Settings(steps=3, batch_size=8), seed=0)
    with pytest.raises(DivergedError, match="within 1 steps: parameter 'shift'"):
        fit(Root(), Toy(), Settings(steps=1, batch_size=8), seed=0)


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_a_source_that_gives_too_little_is_refused() -> None:
    class Short(Toy):
        def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            return islice(super().train_batches(seed, epoch, batch_size), 3)

    with pytest.raises(DataError, match="epoch 0 of 'toy' ended after 3 batches; it says it has 5"):
        fit(net(), Short(), SETTINGS, seed=0)


def test_a_model_that_gives_no_logits_is_refused() -> None:
    class Sum(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sum()

    with pytest.raises(ModelError, match=r"logits of shape \(\) for targets of shape \(8,\)"):
        fit(Sum(12, 3), Toy(), SETTINGS, seed=0)
    with pytest.raises(RecipeError, match="'muon' refuses"):
        fit(net(), Toy(), Settings(steps=1, optimizer="muon"), seed=0)
