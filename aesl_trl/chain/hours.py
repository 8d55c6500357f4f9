"""How long a chain takes: a stage that is done says so itself, another one is estimated by arithmetic.

`aesl chain --dry_run`, `aesl compare --dry_run` and `aesl recipes check` show it.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ..arguments import parse
from ..errors import InputError
from ..estimates.facts import (
    Facts,
    Launch,
    cards_of,
    find_facts,
    hardware_of,
    local_facts,
    promised_files,
    read_launch,
    shape_of,
)
from ..estimates.hours import HOW, Span
from ..estimates.stage_hours import Site, stage_time, told
from .stages import ANYWHERE, NAME, Chain, argument_types, base_model


COUNTED = ("sft", "probe", "grpo", "eval")
EVALUATED = 2  # models of the evaluation: RL's start and its end


@dataclass(frozen=True)
class StageTime:
    """A stage's time: measured in its last run, or the sum of the estimate's parts."""

    seconds: Span
    text: str
    measured: bool


def chain_hours(chain: Chain, near: Path, to_come: Collection[str] = ()) -> dict[str, StageTime]:
    """Return the time of each stage that takes long.

    `near` is the file whose first line names the cards, and in whose folder the model is described. The configs may
    name the paths `to_come` although they do not exist yet.

    Raises:
        InputError: nothing tells the time of a stage that is still to run.
    """
    chain.read_record()
    found, site = {}, None
    for name in [name for name in COUNTED if name in chain.names]:
        record = chain.recorded(name)
        took = record.get("seconds")
        if record.get("status") == "done" and isinstance(took, int | float):
            seconds = Span(took, took)
            found[name] = StageTime(seconds, str(seconds), True)
            continue
        site = site or _site(chain, near)
        parts = _estimate(chain, name, site, to_come)
        found[name] = StageTime(sum(parts.values(), Span()), told(parts), False)
    return found


def _site(chain: Chain, near: Path) -> Site:
    hardware = hardware_of(near)
    if not hardware.gpus:
        raise InputError("a CPU's time is not estimated, only measured")
    cards_of(hardware.gpu_gb)
    facts = _facts(near, base_model((chain.config.sft or chain.config.grpo).config))
    return Site(shape_of(facts), facts.context, hardware, promised=promised_files(near.absolute().parent))


def _facts(near: Path, model: str) -> Facts:
    """Return the facts of `model`: of the recipe that describes it, else of its own files."""
    written = find_facts(near)
    facts = written if written and model in {written.name, *written.prepared} else local_facts(model)
    if facts is None:
        raise InputError(f"{model} is not here, and no model_config.json beside {near.name} describes it")
    return facts


def _estimate(chain: Chain, name: str, site: Site, to_come: Collection[str]) -> dict[str, Span]:
    section = getattr(chain.config, name)
    config = section.config or chain.config.grpo.config  # the probe may have none
    accelerate = getattr(section, "accelerate_config", None)
    launch = read_launch(Path(accelerate)) if accelerate else Launch()
    # What GRPO leaves free is for a vLLM server
    hardware = replace(site.hardware, vllm_gpus=max(0, site.hardware.gpus - launch.processes))
    flags = () if name == "eval" else ANYWHERE
    parsed = parse(argument_types(name), ["--config", config, *flags], prog=NAME, to_come=to_come)
    return stage_time(name, replace(site, hardware=hardware, launch=launch), parsed, models=EVALUATED)


def hours_lines(chain: Chain, near: Path, to_come: Collection[str] = ()) -> list[str]:
    """Return the time of each stage and of all as lines, or the reason why nothing tells it; see [`chain_hours`]."""
    try:
        found = chain_hours(chain, near, to_come)
    except InputError as error:
        return [f"time not estimated: {error}"]
    label = {True: "measured", False: "estimated"}
    lines = [f"  {name:5}  {time.text} ({label[time.measured]})" for name, time in found.items()]
    whole = sum((time.seconds for time in found.values()), Span())
    if all(time.measured for time in found.values()):
        return ["time of the last run:", *lines, f"time in all: {whole} (measured)"]
    fast, slow = cards_of(hardware_of(near).gpu_gb)
    cards = fast.name if fast is slow else f"{fast.name} to {slow.name}"
    return [f"time by stage, {cards}:", *lines, f"time in all: {whole} (estimated: {HOW})"]
