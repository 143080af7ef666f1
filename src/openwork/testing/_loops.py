"""Checks of a sparsifier in all the loops that users write: accumulation, autocast, scaling, clipping, compile, ..."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from openwork.testing._holding import check_count
from openwork.testing._toys import Loop, Make, batch, network, require, same_run, tied


def accumulation(make: Make, density: float, total_steps: int) -> None:
    """Check two backward passes a step: steps are counted, not passes."""
    run = Loop(make(density=density, total_steps=total_steps))

    def take() -> None:
        run.optimizer.zero_grad()
        for half in range(2):
            x, y = batch(2 * run.sparsifier.step + half)
            (F.cross_entropy(run.model(x), y) / 2).backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()

    run.run(total_steps, take=take)
    require(run.sparsifier.step == total_steps, f"{run.sparsifier.step} steps are counted, not {total_steps}")
    check_count(run.sparsifier, density)


def autocast(make: Make, density: float, total_steps: int) -> None:
    """Check training under bfloat16 autocast."""
    run = Loop(make(density=density, total_steps=total_steps))

    def take() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            run.backward()
        run.optimizer.step()

    run.run(total_steps, take=take)
    check_count(run.sparsifier, density)


def _adamw(model: nn.Module, fused: bool) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def scaler(make: Make, density: float, total_steps: int) -> None:
    """Check a gradient scaler that skips steps, with clipping: equal to the run without either."""
    _scaled(make, density, total_steps, fused=False, unscale=True)


def scaler_fused(make: Make, density: float, total_steps: int) -> None:
    """Check a gradient scaler whose skipped steps a fused optimizer decides by itself."""
    _scaled(make, density, total_steps, fused=True, unscale=False)


def _scaled(make: Make, density: float, total_steps: int, *, fused: bool, unscale: bool) -> None:
    plain = Loop(make(density=density, total_steps=total_steps), None, lambda m: _adamw(m, fused)).run(total_steps)
    run = Loop(make(density=density, total_steps=total_steps), None, lambda m: _adamw(m, fused))
    scale = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    change = next((step for step, _ in plain.sparsifier.history[1:]), total_steps // 2)
    for step in range(total_steps):
        for overflow in [True, False] if step in (1, change) else [False]:
            _scaled_step(run, scale, overflow, unscale)
            require(
                run.sparsifier.step == step + (not overflow),
                f"{run.sparsifier.step} steps are counted after {step} and {'a skipped' if overflow else 'another'} one",
            )
            run.check()
    same_run(run, plain, "with a gradient scaler that skipped steps on inf, against the run without it")


def _scaled_step(run: Loop, scale: torch.amp.GradScaler, overflow: bool, unscale: bool) -> None:
    x, y = batch(run.sparsifier.step)
    run.optimizer.zero_grad()
    scale.scale(F.cross_entropy(run.model(x), y)).backward()  # type: ignore[no-untyped-call]
    if overflow:
        for param in run.model.parameters():
            param.grad.view(-1)[-1] = torch.inf  # type: ignore[union-attr]
    if unscale:
        scale.unscale_(run.optimizer)
        run.sparsifier.mask_gradients()
    scale.step(run.optimizer)
    scale.update()


def clipping(make: Make, density: float, total_steps: int) -> None:
    """Check that the clipped norm is that of the masked gradients, and that masks still see the dense ones."""
    plain = Loop(make(density=density, total_steps=total_steps)).run(total_steps)
    run = Loop(make(density=density, total_steps=total_steps))
    for step in range(total_steps):
        run.backward()
        expected = _masked_norm(run)
        run.sparsifier.mask_gradients()
        if step % 2:
            run.sparsifier.mask_gradients()
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1e9)
        require(
            torch.allclose(norm.double(), expected, rtol=1e-5),
            f"step {step}: the norm after mask_gradients() is {norm.item()}, that of masked gradients {expected.item()}",
        )
        run.optimizer.step()
        run.check()
    same_run(run, plain, "with mask_gradients() and a norm that never clips, against the run without")


def _masked_norm(run: Loop) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, param in run.model.named_parameters():
        grad = param.grad.double()  # type: ignore[union-attr]
        total += (grad[run.sparsifier.masks[name]] if name in run.sparsifier.masks else grad).square().sum()
    return total.sqrt()


def closure(make: Make, density: float, total_steps: int) -> None:
    """Check `optimizer.step(closure)`: one evaluation a step, its loss returned, the run as without a closure."""
    plain = Loop(make(density=density, total_steps=total_steps)).run(total_steps)
    for word in (False, True):
        run = Loop(make(density=density, total_steps=total_steps))
        calls: list[Tensor] = []

        evaluate: Any = partial(_evaluate, run, calls)
        for step in range(total_steps):
            loss: Any = run.optimizer.step(closure=evaluate) if word else run.optimizer.step(evaluate)
            require(len(calls) == step + 1, f"the closure was evaluated {len(calls)} times in {step + 1} steps")
            require(loss is calls[-1], "step(closure) does not return the closure's loss")
            run.check()
        same_run(run, plain, "with step(closure), against the run without")


def _evaluate(run: Loop, calls: list[Tensor]) -> Tensor:
    calls.append(run.backward())
    return calls[-1]


def groups(make: Make, density: float, total_steps: int) -> None:
    """Check parameter groups: of one rate as without groups, of several with zeros held."""

    def split(rates: tuple[float, float]) -> Loop:
        def build(model: nn.Module) -> Optimizer:
            params = list(model.parameters())
            apart = [{"params": params[:2], "lr": rates[0]}, {"params": params[2:], "lr": rates[1]}]
            return torch.optim.SGD(apart, momentum=0.9, nesterov=True, weight_decay=1e-3)

        return Loop(make(density=density, total_steps=total_steps), None, build).run(total_steps)

    plain = Loop(make(density=density, total_steps=total_steps)).run(total_steps)
    same_run(split((0.05, 0.05)), plain, "with two parameter groups of one rate, against a single group")
    check_count(split((0.1, 0.01)).sparsifier, density)


def tied_weights(make: Make, density: float, total_steps: int) -> None:
    """Check that a weight in two places has one mask, by its first name, that holds in both."""
    run = Loop(make(density=density, total_steps=total_steps), tied()).run(total_steps)
    require("middle.weight" in run.sparsifier.masks, "the tied weight has no mask under its first name")
    require("again.weight" not in run.sparsifier.masks, "the tied weight has a second mask under its other name")
    model: Any = run.model
    require(model.again.weight is model.middle.weight, "the weights are tied no more")
    require(bool((model.again.weight[~run.sparsifier.masks["middle.weight"]] == 0).all()), "the second use is not masked")
    check_count(run.sparsifier, density)


def compiled(make: Make, density: float, total_steps: int) -> None:
    """Check a compiled model: masks change without a new graph, and the run is the one of the plain model."""
    plain = Loop(make(density=density, total_steps=total_steps)).run(total_steps)
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = network()
    fast: Any = torch.compile(model, backend=backend)
    run = Loop(make(density=density, total_steps=total_steps), model, forward=fast, attach=False)
    run.sparsifier.attach(fast, run.optimizer)
    require(list(run.sparsifier.masks) == list(plain.sparsifier.masks), "a compiled model's masks have other names")
    run.run(1)
    first = len(graphs)
    require(first > 0, "the compiled model was never called")
    run.run(total_steps - 1)
    require(len(graphs) == first, f"{len(graphs) - first} more graphs were compiled as masks changed")
    same_run(run, plain, "with a compiled model, against the plain one")


def two_optimizers(make: Make, density: float, total_steps: int) -> None:
    """Check several optimizers that step one after the other: the run of a single one."""

    def build(model: nn.Module) -> list[Optimizer]:
        params = list(model.parameters())
        settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
        return [torch.optim.SGD(params[:2], **settings), torch.optim.SGD(params[2:], **settings)]

    plain = Loop(make(density=density, total_steps=total_steps)).run(total_steps)
    run = Loop(make(density=density, total_steps=total_steps), None, build).run(total_steps)
    require(run.sparsifier.step == total_steps, f"{run.sparsifier.step} steps are counted, not {total_steps}")
    same_run(run, plain, "with two optimizers, against a single one")


CHECKS = {
    "gradient accumulation": accumulation,
    "bfloat16 autocast": autocast,
    "gradient scaler": scaler,
    "gradient scaler, fused": scaler_fused,
    "gradient clipping": clipping,
    "closure": closure,
    "parameter groups": groups,
    "tied weights": tied_weights,
    "compiled model": compiled,
    "two optimizers": two_optimizers,
}
