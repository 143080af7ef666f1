"""What several families share: checks of their arguments, and first values."""

from __future__ import annotations

from torch import nn

from openwork.errors import ModelError

SMALLEST = 8
"""Least height and width, in pixels, of the images that convolutional families take."""


def image_shape(name: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return `(channels, height, width)`; raise ModelError if `input_shape` is none or a side is below 8 pixels."""
    if len(input_shape) != 3:
        raise ModelError(
            f"{name} takes images (channels, height, width), not input_shape {input_shape}: "
            "for flat features take an mlp, such as mlp-300-100"
        )
    channels, height, width = input_shape
    if min(height, width) < SMALLEST:
        raise ModelError(f"{name} takes images of at least {SMALLEST}x{SMALLEST} pixels, not {height}x{width}")
    return channels, height, width


def sequence_length(name: str, input_shape: tuple[int, ...]) -> int:
    """Return the number of tokens in one example; raise ModelError unless `input_shape` is `(tokens,)`."""
    if len(input_shape) != 1:
        raise ModelError(f"{name} takes sequences of token numbers, input_shape (tokens,), not {input_shape}")
    return input_shape[0]


def check_positive(name: str, **options: float | None) -> None:
    """Raise ModelError for an option that is given and not above 0."""
    for option, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise ModelError(f"option {option!r} of {name} is {value!r}: it must be above 0")


def check_rate(name: str, **options: float) -> None:
    """Raise ModelError for an option outside [0, 1)."""
    for option, value in options.items():
        if not 0 <= value < 1:
            raise ModelError(f"option {option!r} of {name} is {value!r}: it must be at least 0 and below 1")


def initialise(model: nn.Module) -> nn.Module:
    """Draw first values for a rectifier network, in place, from torch's global generator; return the model.

    Convolutions: normal with variance 2 / fan-in (He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", ICCV 2015,
    Eq. (10)). Linear layers, which here only read out: variance 1 / fan-in. Norms 1 and 0, biases 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def divisible(channels: float, by: int = 8) -> int:
    """Return the multiple of `by` nearest to `channels`, at least `by` and never below nine tenths of `channels`.

    The rounding of the MobileNet family (Sandler et al. 2018, reference implementation).
    """
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded if rounded >= 0.9 * channels else rounded + by


def kept_strides(strides: list[int], side: int, least: int = 4) -> list[int]:
    """Turn the first strides of 2 into 1 until `side` pixels leave a last map of at least `least` pixels."""
    halvings = 0
    while halvings < strides.count(2) and -(-side // 2 ** (halvings + 1)) >= least:
        halvings += 1
    drop, kept = strides.count(2) - halvings, []
    for stride in strides:
        kept.append(1 if stride == 2 and drop > 0 else stride)
        drop -= stride == 2
    return kept
