"""The command ``mobilemamba train``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mobilemamba.training.recipe import Recipe
from mobilemamba.training.run import Result, load_recipe


def recipe_from(
    changes: dict[str, Any], settings: tuple[str, ...], checkpoint: str | None, recipe_file: str | None
) -> Recipe:
    """The recipe that options of the command line ask for; ValueError, TypeError as :class:`Recipe`."""
    values = {name: value for name, value in changes.items() if value is not None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, but got {setting!r}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    if recipe_file is not None:
        if "model" in values:
            values = {"image_size": 0} | values
        return Recipe.from_dict(dataclasses.asdict(load_recipe(recipe_file)) | values)
    model = values.pop("model", "mobilemamba_s6")
    return Recipe.paper(model, **values) if checkpoint is None else Recipe.finetune(model, checkpoint, **values)


def summary(result: Result) -> str:
    minutes, seconds = divmod(round(result.seconds), 60)
    return (
        f"best top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % ({result.weights} weights, epoch {result.epoch}); "
        f"{minutes} min {seconds} s, {result.images_per_s:.1f} images/s"
        + (f", {100 * result.waiting:.1f} % of it waiting for images" if result.waiting is not None else "")
        + (f"; {result.unreadable} images could not be read" if result.unreadable else "")
        + f"; weights in {result.best}"
    )
