"""The one contract that every method's study keeps: a configuration, arms, a run, and claims."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openwork import registry
from openwork.errors import MethodError, RecipeError
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm, Config


@dataclass
class Work:
    """What a trial is given beside its settings.

    Attributes:
        folder: the trial's own folder; what `run` leaves there (a model file, say) is kept with the result.
        scratch: a folder for checkpoints; a trial that is killed finds it again, and it goes when the trial is done.
        progress: to be called with the share that is done, from 0 to 1.
    """

    folder: Path
    scratch: Path
    progress: Callable[[float], None] = lambda _share: None


@dataclass
class Outcome:
    """What a trial found, in plain JSON values.

    Attributes:
        metrics: name -> number; fractions from 0 to 1, or ratios against dense.
        curves: name -> list of [step, value].
        layers: parameter name -> {"kept", "total", "shape"}.
        details: anything else worth keeping.
    """

    metrics: dict[str, float]
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A claim and how it is tested.

    Attributes:
        name: the study's name, that of its method; "compare" is the lab's own.
        config: its configuration class.
        presets: "smoke", "laptop" and "paper": values that differ from the configuration's defaults.
        arms: configuration -> what is compared, baselines included.
        run: (configuration, arm, seed, work) -> outcome; a pure function of the first three.
        claims: configuration -> what would count as true.
        columns: metric -> heading, for the study's table; the first is the main one.
        about: what is departed from, and what this scale cannot show.
    """

    name: str
    config: type[Config]
    presets: Mapping[str, Mapping[str, Any]]
    arms: Callable[[Any], Sequence[Arm]]
    run: Callable[[Any, Arm, int, Work], Outcome]
    claims: Callable[[Any], Sequence[Claim]]
    columns: Mapping[str, str] = field(default_factory=lambda: {"accuracy": "accuracy"})
    about: str = ""

    def preset(self, name: str, **values: Any) -> Config:
        """Return the configuration of a preset with some values changed.

        Raises:
            RecipeError: if there is no such preset or a value is wrong.
        """
        if name not in self.presets:
            raise RecipeError(f"study {self.name!r} has no preset {name!r}; it has {', '.join(self.presets)}")
        return self.config.read({**self.presets[name], **values})


def find(name: str) -> Study:
    """Return the study called `name`: "compare", a study of the folder, or `module:attribute`.

    Raises:
        MethodError: if there is none.
    """
    if name == "compare":
        name = "openwork.lab.compare:STUDY"
    if ":" in name:
        place, _, attribute = name.rpartition(":")
        try:
            found = getattr(importlib.import_module(place), attribute)
        except (ImportError, AttributeError) as error:
            raise MethodError(f"there is no study {name!r}: {error}") from error
    else:
        found = registry.study_module(name).STUDY
    if not isinstance(found, Study):
        raise MethodError(f"{name!r} is a {type(found).__name__}, not a Study")
    return found
