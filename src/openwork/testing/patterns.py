"""`check_pattern`: the conformance suite of a sparsity pattern. Run it in the tests of a pattern of your own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from openwork.core.patterns import NM, Pattern
from openwork.core.rng import generator
from openwork.errors import MaskError, PatternError
from openwork.testing._toys import require

DENSITIES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_pattern(
    pattern: Pattern, shapes: Iterable[Sequence[int]], *, densities: Sequence[float] = DENSITIES, seed: int = 0
) -> None:
    """Check that a pattern selects an exact number of whole units, the best ones, ties to the lowest index.

    Covered, for every shape: exact counts and legal masks at every density and dtype; agreement with a sort by
    (-score, index) on scores with many ties; idempotence; NaN and infinity refused; equal masks for scaled scores and
    strided ones; permuted units keep permuted masks; densities 0 and 1; the score left as it was.

    Args:
        pattern: the pattern.
        shapes: weight shapes that it divides.
        densities: kept shares to ask for.
        seed: of the scores.

    Raises:
        AssertionError: names the shape, the density and what broke.
    """
    for shape in map(torch.Size, shapes):
        require(pattern.divides(shape), f"{pattern} does not divide {tuple(shape)}, one of the shapes given")
        units = unit_of_weight(pattern, shape)
        for density in densities:
            case = f"{pattern}, shape {tuple(shape)}, density {density}: "
            for score in _scores(shape, seed):
                _check_selection(pattern, score, density, units, f"{case}{score.dtype}: ")
            _check_refusals(pattern, shape, density, case)
            _check_permutation(pattern, shape, density, units, seed, case)


def unit_of_weight(pattern: Pattern, shape: torch.Size) -> Tensor:
    """Return for every weight, in its shape, the index of its unit in the flattened tiles.

    Raises:
        AssertionError: if units overlap, differ in size, or leave weights out.
    """
    rows, width = pattern.tiles(torch.zeros(shape)).shape
    index = torch.arange(rows * width).reshape(rows, width)
    found = torch.zeros(shape, dtype=torch.int64)
    for bit in range(max(1, (rows * width - 1).bit_length())):
        found += pattern.untile((index >> bit) % 2 == 1, shape).long() << bit
    sizes = torch.bincount(found.reshape(-1), minlength=rows * width)
    require(len(sizes) == rows * width, f"{pattern}: untile() of {tuple(shape)} yields units that tiles() does not have")
    require(bool((sizes == sizes[0]).all()), f"{pattern}: units of {tuple(shape)} hold {sizes.tolist()} weights")
    for unit in (0, rows * width - 1):
        lone = pattern.tiles((found == unit).double()).reshape(-1)
        alone = torch.where(torch.arange(len(lone)) == unit, sizes[0].double(), 0.0)
        require(torch.equal(lone, alone), f"{pattern}: untile() is not the inverse of tiles()")
    return found


def _scores(shape: torch.Size, seed: int) -> Iterable[Tensor]:
    for dtype in DTYPES:
        draw = generator(seed, "check_pattern", *shape, str(dtype))
        yield torch.randint(0, 4, shape, generator=draw).to(dtype)  # integers: sums of units are exact, ties are many
    draw = generator(seed, "check_pattern", *shape)
    yield torch.randint(-1000, 1000, shape, generator=draw).double() / 64


def _check_selection(pattern: Pattern, score: Tensor, density: float, units: Tensor, case: str) -> None:
    before = score.clone()
    mask = pattern.select(score, density)
    require(mask.dtype is torch.bool and mask.shape == score.shape, f"{case}the mask is {mask.dtype}, {tuple(mask.shape)}")
    require(torch.equal(score, before), f"{case}select() changes the score")
    tiles = pattern.tiles(score)
    rows, width = tiles.shape
    quota = pattern.quota(density, width)
    size = score.numel() // tiles.numel()
    require(int(mask.sum()) == rows * quota * size, f"{case}{int(mask.sum())} weights are kept, not {rows * quota * size}")
    expected = _brute_force(score, units, rows, width, quota)
    require(torch.equal(mask, expected), f"{case}the kept units are not the best by (-score, index)")
    if not isinstance(pattern, NM) or quota <= pattern.n:
        try:
            pattern.check(mask)
        except PatternError as error:
            raise AssertionError(f"{case}check() refuses the selected mask: {error}") from error
    again = pattern.select(mask.double(), density)
    require(torch.equal(again, mask), f"{case}selecting by the mask itself gives another mask")
    require(torch.equal(pattern.select(score * 0.25, density), mask), f"{case}scores times 1/4 give another mask")
    strided = score.repeat_interleave(2, dim=-1)[..., ::2]
    require(torch.equal(pattern.select(strided, density), mask), f"{case}a strided score gives another mask")
    flat = pattern.tiles(pattern.select(torch.ones_like(score), density).double()) > 0
    first = torch.arange(width) < quota
    require(bool((flat == first).all()), f"{case}equal scores do not keep the units of lowest index")
    if density == 1.0:
        require(bool(mask.all()), f"{case}not everything is kept")


def _brute_force(score: Tensor, units: Tensor, rows: int, width: int, quota: int) -> Tensor:
    """Return the mask of the best units of every competition, by a plain sort of Python numbers."""
    totals = [0.0] * (rows * width)
    for unit, value in zip(units.reshape(-1).tolist(), score.reshape(-1).tolist(), strict=True):
        totals[unit] += value
    kept = torch.zeros(rows * width, dtype=torch.bool)
    for row in range(rows):
        order = sorted(range(row * width, (row + 1) * width), key=lambda unit: (-totals[unit], unit))
        kept[order[:quota]] = True
    return kept[units]


def _check_refusals(pattern: Pattern, shape: torch.Size, density: float, case: str) -> None:
    _, width = pattern.tiles(torch.zeros(shape)).shape
    if not 0 < pattern.quota(density, width) < width:
        return
    for value in (torch.nan, torch.inf, -torch.inf):
        score = torch.ones(shape)
        score.view(-1)[-1] = value
        try:
            pattern.select(score, density)
        except MaskError:
            continue
        raise AssertionError(f"{case}a score of {value} is not refused with a MaskError")


def _check_permutation(pattern: Pattern, shape: torch.Size, density: float, units: Tensor, seed: int, case: str) -> None:
    """Permute the units of every competition; the mask must be permuted alike, since these scores have no ties."""
    rows, width = pattern.tiles(torch.zeros(shape)).shape
    draw = generator(seed, "check_pattern", "permutation", *shape)
    totals = torch.stack([torch.randperm(width, generator=draw) for _ in range(rows)])
    order = torch.stack([torch.randperm(width, generator=draw) for _ in range(rows)])
    plain = pattern.tiles(pattern.select(totals.double().reshape(-1)[units], density).double()) > 0
    moved = totals.gather(1, order).double()
    after = pattern.tiles(pattern.select(moved.reshape(-1)[units], density).double()) > 0
    require(torch.equal(after, plain.gather(1, order)), f"{case}permuted units do not keep a permuted mask")
