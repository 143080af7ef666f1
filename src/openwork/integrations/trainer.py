"""Holding masks through transformers' Trainer.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[holding(openwork.Fixed(masks))])
    trainer.train()

In a loop of one's own the sparsifier needs no callback: `openwork.Fixed(masks).attach(model, optimizer)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.errors import MaskError, MissingExtra
from openwork.runtime import files
from openwork.sparsifier.parameters import unwrap
from openwork.sparsifier.sparsifier import Fixed, Sparsifier
from openwork.train import state as states

FILE = "openwork-sparsifier.safetensors"
"""The sparsifier's state in each checkpoint of the Trainer."""


def holding(sparsifier: Sparsifier, *, resume: str | Path | None = None) -> Any:
    """Return a callback for transformers' Trainer that attaches `sparsifier` when training begins, and lets go at its end.

    Every checkpoint that the Trainer writes gets the sparsifier's state beside it. A training that is resumed takes it up
    from `resume`, else from `output_dir/checkpoint-STEP`, where the Trainer keeps its own. At the end the masks are exact:
    `sparsifier.masks.check(model)` holds.

    The Trainer clips before any callback sees the gradients. Under `Fixed`, whose masks never change, masked gradients are
    zero as soon as a backward has made them, so the clipped norm is that of the kept weights; methods that need dense
    gradients to revise their masks get them, and the norm counts all.

    Args:
        sparsifier: any, not attached yet; `openwork.Fixed(masks)` holds given masks.
        resume: the folder given to `trainer.train(resume_from_checkpoint=...)`, if it is not in `output_dir`.

    Raises:
        MissingExtra: if transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtra("the Trainer's callback needs transformers: pip install 'openwork[transformers]'") from error

    class Holding(TrainerCallback):
        """Attaches a sparsifier to the Trainer's model and optimizer."""

        def __init__(self) -> None:
            self.handles: list[Any] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Attach, after the state of a resumed training was found."""
            if state.global_step:
                place = Path(resume) if resume is not None else Path(args.output_dir) / f"checkpoint-{state.global_step}"
                sparsifier.load_state_dict(read(place / FILE))
            sparsifier.attach(kwargs["model"], _inner(kwargs["optimizer"]))
            if isinstance(sparsifier, Fixed):
                self.handles = list(_masking(unwrap(kwargs["model"]), sparsifier.masks))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Write the sparsifier's state into the checkpoint."""
            place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and place.is_dir():
                write(place / FILE, sparsifier)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Project once more and let go."""
            for handle in self.handles:
                handle.remove()
            self.handles = []
            sparsifier.finalize()

    return Holding()


def write(path: Path, sparsifier: Sparsifier) -> None:
    """Write the state of a sparsifier to one safetensors file."""
    tensors: dict[str, Any] = {}
    packed = states.pack(sparsifier.state_dict(), "state", tensors)
    files.write_state(path, tensors, {"sparsifier": type(sparsifier).__name__, "state": packed})


def read(path: Path) -> dict[str, Any]:
    """Return the state that `write` wrote.

    Raises:
        MaskError: if there is no such file.
        FormatError: if it is damaged.
    """
    if not path.is_file():
        raise MaskError(
            f"there is no {str(path)!r}, so the masks of the resumed training are not known: name its folder with resume="
        )
    tensors, metadata = files.read_state(path)
    found = states.unpack(metadata.get("state"), tensors)
    if not isinstance(found, dict):
        raise MaskError(f"{str(path)!r} holds no state of a sparsifier")
    return found


def _masking(model: nn.Module, masks: Masks) -> Iterator[Any]:
    """Set masked gradients to zero as soon as they are accumulated; yield the hooks' handles."""
    params = dict(model.named_parameters())
    for name, mask in masks.items():

        def hook(param: Tensor, gone: Tensor = ~mask) -> None:
            if param.grad is not None:
                param.grad.masked_fill_(gone, 0)

        register: Any = params[name].register_post_accumulate_grad_hook
        yield register(hook)


def _inner(optimizer: Any) -> Any:
    """Return torch's optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
