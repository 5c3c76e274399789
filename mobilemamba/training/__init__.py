"""Training and validation: the paper's recipe on Lightning, timm and torchmetrics (``pip install mobilemamba[train]``).

    recipe = Recipe.paper("mobilemamba_s6", epochs=100)
    result = train("imagenet", recipe, "runs/s6")

On the command line these are ``mobilemamba train`` and ``mobilemamba validate``.
"""

from mobilemamba.training.module import Teacher
from mobilemamba.training.recipe import Recipe
from mobilemamba.training.run import Result, load_recipe, train
from mobilemamba.training.sources import open_data, open_images
from mobilemamba.training.validation import Validation, validate

__all__ = ["Recipe", "Result", "Teacher", "Validation", "load_recipe", "open_data", "open_images", "train", "validate"]
