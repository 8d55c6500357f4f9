"""Which checkpoint of a cold start goes to reinforcement learning.

Works on the files of a finished or running SFT folder, so a selection can be replayed with another rule, metric or
patience without training. Writes `selection.json` and `selected/`.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import files
from ..errors import InputError, exit_on_input_error, nearest
from ..files import RunFolder, read_log, read_rows, read_settings
from ..provenance import __version__
from .readiness import rank
from .series import METRICS, by_step, check_settings, turning_point_of


EVAL_METRICS = {"eval_nll": "min", "pass@1": "max"}  # where the model is best
RULES = ("turning_point", "last", "best_eval", "readiness")


def select_checkpoint(
    diversity_rows: Sequence[dict],
    eval_rows: Sequence[dict],
    candidates: Iterable[int],
    *,
    rule: str,
    metric: str = "entropy",
    patience: int = 3,
    best_eval_metric: str = "eval_nll",
    readiness: dict | None = None,
) -> dict:
    """Choose one of the saved candidates.

    - "turning_point": where the diversity of the model's own samples peaks (CE-ES of the AESL paper). Undetermined,
      it falls back to "best_eval" where candidates were evaluated, else to "last".
    - "last": the end of training, for a loss that does the early stopping itself.
    - "best_eval": the best evaluation among the candidates, for comparison: the paper finds it too late for RL.
      Without any it falls back to "last".
    - "readiness": the best of the candidates that `aesl probe` found ready ([`~readiness.rank`]): by the reward after
      its short RL runs where it made them, else by the share of groups with signal. With none that is ready it falls
      back to "turning_point".

    The candidate nearest to the step wanted is taken when that step was not saved (the base model, step 0, never is);
    of two as near, the earlier.

    Args:
        diversity_rows: lines of diversity.jsonl. Of a step measured twice (a resumed run), the later line counts.
        eval_rows: rows with `step` and `eval_nll`, such as Trainer's log_history.
        candidates: steps of the saved candidates.
        rule: one of the above.
        metric: "entropy" or "self_bleu". The other one's turning point goes into the evidence.
        patience: of [`~turning_point.find_turning_point`].
        best_eval_metric: "eval_nll" (lowest) or "pass@1" of the diversity rows (highest).
        readiness: the contents of readiness.json, which the rule "readiness" needs.

    Returns:
        The contents of selection.json except `path`: `rule` (asked), `applied`, `step`, `reason`, `evidence`,
        `candidates`, `metric`. The evidence has `turning_point` (by metric: `step`, `reason` and the numbers),
        `evaluation` (`metric`, and its `values` by step), `measured` (the diversity row of the chosen step, or None),
        by readiness `verdicts` (by step) and, where it was not saved, `wanted_step`.

    Raises:
        InputError: no candidates, an unknown rule or metric, one that was not measured, candidates not probed, or rows
            that were measured with different settings.
    """
    for name, value, options in (
        ("rule", rule, RULES),
        ("metric", metric, METRICS),
        ("best_eval_metric", best_eval_metric, EVAL_METRICS),
    ):
        if value not in options:
            raise InputError(f"{name}={value!r} is not one of {', '.join(options)}{nearest(value, options)}")
    candidates = sorted(set(candidates))
    if not candidates:
        raise InputError("there are no saved candidates to select from: train with diversity_steps above 0")
    measured = by_step(diversity_rows)
    check_settings(measured.values())
    if rule == "turning_point" and measured and not any(metric in row for row in measured.values()):
        raise InputError(
            f"no row of {files.DIVERSITY} has {metric!r}: another version wrote it (this is aesl_trl {__version__}); "
            "measure again, or select by --rule last"
        )
    found = {name: turning_point_of(measured.values(), name, patience) for name in METRICS}
    turning_points = {name: {"step": at.step, "reason": at.reason, **at.evidence} for name, at in found.items()}
    evaluations = _evaluations(measured, eval_rows, best_eval_metric)
    probed = _probed(readiness, candidates) if rule == "readiness" else []
    applied, wanted, reason = _apply(rule, metric, turning_points, best_eval_metric, evaluations, candidates, probed)
    step = min(candidates, key=lambda candidate: (abs(candidate - wanted), candidate))
    evidence = {
        "turning_point": turning_points,
        "evaluation": {"metric": best_eval_metric, "values": evaluations},
        "measured": measured.get(step),
    }
    if probed:
        evidence["verdicts"] = {one["step"]: one["text"] for one in probed}
    if step != wanted:
        evidence["wanted_step"] = wanted
        reason += f"; step {wanted} was not saved, step {step} is the nearest candidate"
    return {
        "rule": rule,
        "applied": applied,
        "step": step,
        "reason": reason,
        "evidence": evidence,
        "candidates": candidates,
        "metric": metric,
    }


def _evaluations(measured: dict[int, dict], eval_rows: Iterable[dict], metric: str) -> dict[int, float]:
    rows = measured.values() if metric == "pass@1" else eval_rows
    known = [row for row in rows if row.get(metric) is not None and math.isfinite(row[metric])]
    return {row["step"]: row[metric] for row in known}


def _probed(readiness: dict | None, candidates: list[int]) -> list[dict]:
    """What readiness.json says of the saved candidates."""
    entries = [one for one in (readiness or {}).get("checkpoints", []) if one.get("step") in candidates]
    if not entries:
        raise InputError("no saved candidate has been probed: run aesl probe on the run's folder, then select again")
    return entries


def _apply(
    rule: str,
    metric: str,
    turning_points: dict[str, dict],
    eval_metric: str,
    evaluations: dict[int, float],
    candidates: list[int],
    probed: list[dict],
) -> tuple[str, int, str]:
    """The rule in effect after fallbacks, the step it wants and why."""
    reason = ""
    if rule == "readiness":
        best, reason = rank(probed)
        if len(probed) < len(candidates):
            reason += f" ({len(probed)} of {len(candidates)} candidates were probed)"
        if best is not None:
            return rule, best["step"], reason
        rule, reason = "turning_point", f"{reason}; falls back to turning_point: "
    if rule == "turning_point":
        found = turning_points[metric]
        reason += f"{metric}: {found['reason']}"
        if found["step"] is not None:
            return rule, found["step"], reason + _disagreement(metric, turning_points)
        rule = "best_eval" if any(step in evaluations for step in candidates) else "last"
        reason += f"; falls back to {rule}: "
    evaluated = [step for step in candidates if step in evaluations]
    if rule == "best_eval" and evaluated:
        best = (min if EVAL_METRICS[eval_metric] == "min" else max)(evaluated, key=evaluations.get)
        where = f"best {eval_metric} among {len(evaluated)} evaluated candidates"
        return rule, best, f"{reason}{where}, {evaluations[best]:.4g} at step {best}"
    if rule == "best_eval":
        reason = f"no candidate has {eval_metric}; falls back to last: "
    return "last", candidates[-1], f"{reason}the last candidate, step {candidates[-1]}"


def _disagreement(metric: str, turning_points: dict[str, dict]) -> str:
    """A clause on the other metrics' turning points where they lie elsewhere."""
    step = turning_points[metric]["step"]
    others = {name: found["step"] for name, found in turning_points.items() if found["step"] != step}
    texts = {name: "undetermined" if other is None else f"step {other}" for name, other in others.items()}
    return "".join(f"; {name} says {text}" for name, text in texts.items())


def select_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    rule: str | None = None,
    metric: str | None = None,
    patience: int | None = None,
    best_eval_metric: str | None = None,
    step: int | None = None,
) -> dict:
    """Select from the candidates of a run and write `selection.json` and `selected/`.

    Args:
        run: an SFT folder or a chain's.
        out: where to write, by default `run`: several chains can select from one SFT folder, each by its own rule.
        rule, metric, patience, best_eval_metric: by default what the run's run.json says; without one "turning_point"
            on entropy with patience 3.
        step: take this candidate, by no rule.

    Returns:
        The contents of selection.json; `path` is relative to its folder.

    Raises:
        InputError: `run` is no run, has no candidates or not the one asked for, or a file in it is unreadable.
    """
    if not Path(run).is_dir():
        siblings = [item.name for item in Path(run).absolute().parent.glob("*") if item.is_dir()]
        raise InputError(f"{run} is not a folder{nearest(Path(run).name, siblings)}")
    sft = files.sft_dir(run)
    out = Path(run if out is None else out)
    recorded = read_settings(sft)
    if recorded.get("stage", "sft") != "sft":
        raise InputError(f"{sft} is a run of {recorded['stage']}: name the folder of the cold start, or the chain's")
    rule = rule or recorded.get("selection") or default_rule(recorded.get("cold_start_loss"))
    candidates = RunFolder(sft).candidates
    if step is not None:
        candidates, rule = [_one_of(candidates, step, sft)], "last"
    selection = select_checkpoint(
        read_rows(sft / files.DIVERSITY) if (sft / files.DIVERSITY).exists() else [],
        read_log(sft),
        candidates,
        rule=rule,
        metric=metric or recorded.get("diversity_metric") or "entropy",
        patience=recorded.get("diversity_patience", 3) if patience is None else patience,
        best_eval_metric=best_eval_metric or recorded.get("best_eval_metric") or "eval_nll",
        readiness=_readiness(sft) if rule == "readiness" else None,
    )
    if step is not None:
        selection |= {"rule": "step", "applied": "step", "reason": f"step {step} was asked for"}
    out.mkdir(parents=True, exist_ok=True)
    # the weights first: a kill in between leaves a selection.json that is stale, never one that points nowhere
    files.replace_dir(sft / files.CANDIDATES / f"step-{selection['step']}", out / files.SELECTED)
    selection["path"] = files.SELECTED
    files.write_json(out / files.SELECTION, selection)
    return selection


def _readiness(sft: Path) -> dict:
    """readiness.json of the run's candidates. Raises [`InputError`] where there is none, or another file."""
    path = sft / files.READINESS
    if not path.exists():
        raise InputError(
            f"{sft} has no {files.READINESS}, which the rule readiness reads: run aesl probe {sft} --config FILE "
            "(GRPO's config, or a probe.yaml)"
        )
    found = files.read_json(path)
    entries = found.get("checkpoints") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(isinstance(one, dict) and "verdict" in one for one in entries):
        raise InputError(f"{path} is not what aesl probe writes: run aesl probe {sft} again")
    return found


def default_rule(cold_start_loss: str | None) -> str:
    """AESL stops early token by token and needs no early stop; any other loss does."""
    return "last" if cold_start_loss == "aesl" else "turning_point"


def _one_of(steps: list[int], step: int, sft: Path) -> int:
    if step not in steps:
        near = min(steps, key=lambda saved: (abs(saved - step), saved))
        raise InputError(
            f"{sft / files.CANDIDATES} holds no step {step}, the nearest is {near}; raise max_candidates to keep more"
        )
    return step


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (see aesl select --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """`aesl select`: apply a rule to a run's saved candidates."""
    exit_on_input_error("aesl select", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = _Parser(
        prog="aesl select",
        description="Choose which saved candidate of a cold start goes to RL; writes selection.json and selected/.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="an SFT output folder, or a chain's")
    parser.add_argument("--rule", help=f"{', '.join(RULES)}; default: as the run was configured")
    parser.add_argument("--metric", help=f"diversity of the model's own samples: {', '.join(METRICS)}")
    parser.add_argument("--patience", type=int, help="measurements that must follow the peak")
    parser.add_argument("--step", type=int, help="take this candidate, by no rule")
    parser.add_argument("--best_eval_metric", help=f"what best_eval looks at: {', '.join(EVAL_METRICS)}")
    parser.add_argument("--out", help="folder to write to (default: RUN)")
    given = vars(parser.parse_args(argv))
    selection = select_run(given.pop("run"), given.pop("out"), **given)
    print(f"selected step {selection['step']} by {selection['applied']}: {selection['reason']}")


if __name__ == "__main__":
    main()
