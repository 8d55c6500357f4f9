"""config: difficulties by their bounds, and the recipes' own settings."""

import pytest

from aesl_trl.arguments import parse
from aesl_trl.data.benchmarks import BENCHMARKS, PROMPT
from aesl_trl.data.config import DataArguments
from aesl_trl.data.prepare import ARGUMENT_TYPES
from aesl_trl.recipes.recipes import recipes_dir


@pytest.mark.parametrize(
    ("rate", "name"),
    [(0.0, "hard"), (0.25, "hard"), (0.26, "medium"), (0.75, "easy"), (1.0, "easy"), (None, "unknown")],
)
def test_bounds_belong_to_hard_and_easy(rate, name):
    assert DataArguments(difficulty_bounds=[0.25, 0.75]).difficulty_of(rate) == name


@pytest.mark.parametrize(
    "path", sorted(recipes_dir().glob("*/data*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_recipes_are_read(path):
    built = str(recipes_dir().parent / "runs/SmolLM2-135M-Instruct/model")  # by a script
    (args,) = parse(ARGUMENT_TYPES, ["--config", str(path)], prog="aesl data", to_come=[built])
    assert args.num_demonstrations in (1000, 3000) and set(args.decontaminate) <= BENCHMARKS.keys()
    assert args.prompt_template == PROMPT  # evaluation asks as training does
