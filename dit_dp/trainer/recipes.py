"""Recipes: training runs by name, in YAML. No torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from dit_dp.errors import UsageError
from dit_dp.trainer.config import FIELDS, TrainConfig


def recipe_names() -> list[str]:
    """Return the names of the recipes that are shipped."""
    return sorted(file.name.removesuffix(".yaml") for file in _shipped().iterdir() if file.name.endswith(".yaml"))


def load_recipe(name: str, **changes: Any) -> TrainConfig:
    """Return the configuration of a recipe.

    Args:
        name: Of a shipped recipe, or a YAML file.
        changes: Fields that are set otherwise.

    Raises:
        UsageError: There is no such recipe, or something in it is not accepted.
    """
    return _built({**read_recipe(name), **changes}, name)


def read_recipe(name: str) -> dict[str, Any]:
    """Return what a recipe says.

    Raises:
        UsageError: There is no such recipe, or it is not YAML of known fields.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else _shipped() / f"{name}.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError.for_value("recipe", name, [*recipe_names(), "a YAML file"]) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"recipe: cannot read {name}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise UsageError.for_value("recipe", name, "a mapping of options to values")
    unknown = [str(key) for key in content if key not in FIELDS]
    if unknown:
        raise UsageError.for_value(f"recipe {name}", unknown[0], FIELDS)
    return dict(content)


def _built(content: Mapping[str, Any], name: str) -> TrainConfig:
    """Return a configuration of YAML's values, or raise `UsageError` on the first field that is not accepted."""
    try:
        return TypeAdapter(TrainConfig).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UsageError):
            raise UsageError(f"recipe {name}: {cause}") from error
        place = ".".join(map(str, first["loc"]))
        raise UsageError.for_value(f"recipe {name}: {place}", first["input"], first["msg"].lower()) from error


def _shipped() -> Any:
    return resources.files("dit_dp") / "recipes"


def with_recipe(argv: Sequence[str]) -> list[str]:
    """Return a command line in which ``--recipe NAME|FILE`` has become the recipe's options; those after it win.

    Raises:
        UsageError: There is no such recipe.
    """
    rest = list(argv)
    name = take_option(rest, "--recipe")
    return [*([] if name is None else _as_words(read_recipe(name))), *rest]


_SWITCHES = {field.name for field in fields(TrainConfig) if isinstance(field.default, bool)}
"""Options without a value; those that may also be `None` take one."""


def _as_words(content: Mapping[str, Any]) -> list[str]:
    """Return YAML's values as a command line says them; what comes after them there takes their place."""
    words: list[str] = []
    for key, value in content.items():
        option = key.replace("_", "-")
        if isinstance(value, bool) and key in _SWITCHES:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


def take_option(argv: list[str], option: str) -> str | None:
    """Take an option and its value out of a command line."""
    for place, word in enumerate(argv):
        if word == option:
            if place + 1 == len(argv):
                raise UsageError.for_value(option.strip("-"), None, [*recipe_names(), "a YAML file"])
            del argv[place]
            return argv.pop(place)
        if word.startswith(f"{option}="):
            del argv[place]
            return word.partition("=")[2]
    return None
