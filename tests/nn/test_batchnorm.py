from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import DataError
from openwork.nn.batchnorm import kept_modes, recalibrate_norm


def make() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Dropout(0.5), nn.Linear(6, 2)
    )


def data(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    draw = generator(0, "batches")
    return [(3 + 2 * torch.randn(n, 4, generator=draw), torch.zeros(n)) for n in sizes]


def norm(model: nn.Sequential, place: int) -> nn.BatchNorm1d:
    found = model[place]
    assert isinstance(found, nn.BatchNorm1d)
    assert found.running_mean is not None
    return found


def test_running_mean_is_the_mean_of_all_the_data() -> None:
    model, batches = make(), data(8, 8, 3)
    assert recalibrate_norm(model, batches) == 2
    x = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(norm(model, 0).running_mean, x.mean(0), atol=1e-5, rtol=0)
    # A later layer sees what the first makes of each batch with that batch's own statistics.
    deeper = torch.cat([model[1](nn.functional.batch_norm(x, None, None, training=True)) for x, _ in batches])
    torch.testing.assert_close(norm(model, 2).running_mean, deeper.mean(0), atol=1e-5, rtol=0)
    variance = sum(len(x) * x.var(0, unbiased=True) for x, _ in batches) / len(x)
    torch.testing.assert_close(norm(model, 0).running_var, variance, atol=1e-4, rtol=0)


def test_only_statistics_change() -> None:
    model = make()
    model[3].eval()
    params = [param.clone() for param in model.parameters()]
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    recalibrate_norm(model, data(8))
    assert torch.equal(torch.get_rng_state(), before), "dropout must not draw"
    assert all(torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert (norm(model, 0).momentum, norm(model, 2).momentum) == (0.1, 0.3)
    assert all(param.grad is None for param in model.parameters())


def test_old_statistics_do_not_matter() -> None:
    one, other = make(), make()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        norm(other, 0).running_mean.fill_(1e6)  # type: ignore[union-attr]
        norm(other, 2).running_var.fill_(float("inf"))  # type: ignore[union-attr]
    recalibrate_norm(one, data(8, 5))
    recalibrate_norm(other, data(8, 5))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_a_momentum_gives_torchs_own_moving_average() -> None:
    model, batches = make(), data(8, 6, 4)
    recalibrate_norm(model, batches, momentum=0.25)
    mean = torch.zeros(4)
    for x, _ in batches:
        mean = 0.75 * mean + 0.25 * x.mean(0)
    torch.testing.assert_close(norm(model, 0).running_mean, mean)


@pytest.mark.parametrize(("share", "used"), [(1.0, 5), (0.5, 3), (0.2, 1), (0.01, 1)])
@pytest.mark.parametrize("lazily", [False, True])
def test_share_takes_the_first_batches(share: float, used: int, lazily: bool) -> None:
    model, batches = make(), data(4, 4, 4, 4, 4)
    recalibrate_norm(model, iter(batches) if lazily else batches, share=share)
    expected = torch.cat([x for x, _ in batches[:used]]).mean(0)
    torch.testing.assert_close(norm(model, 0).running_mean, expected, atol=1e-5, rtol=0)


def test_single_examples_are_left_out_and_bare_tensors_taken() -> None:
    model, batches = make(), data(8, 1)
    recalibrate_norm(model, [x for x, _ in batches])
    torch.testing.assert_close(norm(model, 0).running_mean, batches[0][0].mean(0), atol=1e-5, rtol=0)


def test_without_data_the_statistics_stay() -> None:
    model = make()
    recalibrate_norm(model, data(8))
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(DataError, match="two or more examples"):
        recalibrate_norm(model, data(1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    with pytest.raises(DataError, match="got 0"):
        recalibrate_norm(model, data(8), share=0)


def test_without_batch_norm_no_data_is_read() -> None:
    def never() -> Tensor:
        raise AssertionError

    assert recalibrate_norm(nn.Linear(4, 2), (never() for _ in range(1))) == 0


def test_modes_come_back_after_an_error() -> None:
    model = make()
    model[1].eval()

    def fail() -> None:
        with kept_modes(model):
            model.eval()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    assert [module.training for module in model] == [True, False, True, True, True]
