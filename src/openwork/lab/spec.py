"""What is run: configurations, arms, trials, and the content key by which finished work is found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from openwork.errors import RecipeError


class Config(BaseModel):
    """Base of every study's configuration: frozen, unknown keys refused, field descriptions become help.

    `plan` names the fields that say which trials there are and not what happens inside one; they stay out of the
    trials' keys, so that more seeds or more arms find the finished trials again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    plan: ClassVar[frozenset[str]] = frozenset({"seeds"})

    seeds: int = 3

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration of `values`.

        Raises:
            RecipeError: naming the first key that is unknown or whose value is wrong, and what is allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError(_explain(cls, error)) from None

    def identity(self) -> dict[str, Any]:
        """Return what a trial depends on beyond the configuration: digests of the user's data and code, say."""
        return {}

    def content(self) -> dict[str, Any]:
        """Return the fields that a trial depends on, in plain JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self.plan}


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Attributes:
        name: unique within the study, shown in tables.
        settings: what makes it this arm, in plain JSON values.
        method: the method's name, for colours and cards.
        density: the density that was asked for, 1.0 for dense.
        note: shown under the table.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    density: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Trial:
    """One arm with one seed: the unit of caching, of crashing and of resuming.

    Attributes:
        study: "compare", the name of a study, or `module:attribute` of a Study.
        config: the study's configuration, all fields.
        content: those of its fields that the trial depends on.
        arm: the arm.
        seed: the seed.
        identity: versions, code and data digests, threads: what else the numbers depend on.
    """

    study: str
    config: Mapping[str, Any]
    content: Mapping[str, Any]
    arm: Arm
    seed: int
    identity: Mapping[str, Any]

    @cached_property
    def question(self) -> str:
        """Return a digest of what is asked, whatever the versions: study, content, arm settings and seed."""
        return _digest([self.study, self.content, dict(self.arm.settings), self.seed])

    @cached_property
    def key(self) -> str:
        """Return the content key: a digest of the question and of the identity."""
        return _digest([self.question, self.identity])[:24]

    def to_json(self) -> dict[str, Any]:
        """Return the trial in plain JSON values."""
        return {**asdict(self), "key": self.key, "question": self.question}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the trial that `to_json` wrote."""
        plain = {k: v for k, v in values.items() if k not in ("key", "question")}
        return cls(**{**plain, "arm": Arm(**plain["arm"])})


def read_recipe(text: str, source: str = "the recipe") -> dict[str, Any]:
    """Return the keys and values of a YAML recipe.

    Raises:
        RecipeError: if it is no YAML, or no mapping, or larger than a megabyte.
    """
    if len(text) > 1_000_000:
        raise RecipeError(f"{source} holds {len(text):,} characters; a recipe has at most 1,000,000")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{source} must be a mapping of keys to values, such as 'data: fashion-mnist'")
    return values


def write_recipe(config: Config) -> str:
    """Return the configuration as YAML, one line of help above each key."""
    lines = []
    for name, info in type(config).model_fields.items():
        value = yaml.safe_dump({name: config.model_dump(mode="json")[name]}, sort_keys=False, allow_unicode=True)
        lines.append(f"# {info.description or name}\n{value}")
    return "".join(lines)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _explain(cls: type[Config], error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; known are {', '.join(cls.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {message[:1].lower()}{message[1:]}"
