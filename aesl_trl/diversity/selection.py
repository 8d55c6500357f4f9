"""Which checkpoint of a cold start goes to reinforcement learning.

Works on the files of a finished or running SFT folder, so a selection can be replayed with another rule, metric or
patience without training. Writes `selection.json` and `selected/`.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import files
from ..arguments import ArgumentParser, check_replaceable
from ..errors import InputError, exit_on_input_error, say, tell
from ..files import RunFolder
from ..identity import identity_of
from ..provenance import __version__
from ..values import check_choice
from .intervals import is_number, paired_interval, with_interval
from .readiness import rank
from .series import METRICS, by_step, check_settings, nearest_step, turning_point_of
from .turning_point import ONLY_FALLS


EVAL_METRICS = {"eval_nll": "min", "pass@1": "max"}  # on which side of the figure the model is best
RULES = ("turning_point", "last", "best_eval", "readiness", "mix")
# The rules that read what a command measured after the training, and that command
LEFT_TO = {"readiness": "aesl probe", "mix": "aesl mix"}
DEFAULT_RULE = "turning_point"  # whatever the loss: AESL's last step was never a better start than its turning point


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
    mixes: dict | None = None,
) -> dict:
    """Choose one of the saved candidates.

    - "turning_point": where the diversity of the model's own samples peaks (CE-ES of the AESL paper).
    - "last": the end of training.
    - "best_eval": the best evaluation among the candidates, for comparison: the paper finds it too late for RL.
      Without any evaluation it falls back to "last".
    - "readiness": the best of the candidates that `aesl probe` found ready ([`~readiness.rank`]): by the reward after
      its short RL runs where it made them, else by the share of groups that differ in reward. Where no candidate is
      ready it falls back to "turning_point".
    - "mix": the best of the averages with the base that `aesl mix` wrote ([`best_mix`]).

    A series without a turning point is undetermined or only falls. Then the candidate with the most mixed groups goes
    to RL, where rewards found any: by paired intervals over prompts, the earliest of equals; else, where the series
    only falls, the earliest candidate whose held-out nll has covered half of its fall; else the last, with a warning
    that names the next command.

    The step that a rule wants may not be saved (the base model, step 0, never is). Then the nearest candidate is
    taken, and the earlier of two that are equally near.

    Args:
        diversity_rows: lines of diversity.jsonl. Of a step measured twice (a resumed run), the later line counts.
        eval_rows: rows with `step` and `eval_nll` (nats per token), such as Trainer's log_history. The fall of
            `eval_nll` goes from its first row to its lowest.
        candidates: steps of the saved candidates.
        rule, patience: one of the above; and the patience of [`~turning_point.find_turning_point`].
        metric: "entropy" or "self_bleu". The turning point of the other metric goes into the evidence.
        best_eval_metric: "eval_nll" (lowest) or "pass@1" of the diversity rows (highest).
        readiness: the contents of readiness.json, which the rule "readiness" needs.
        mixes: the contents of mix.json, which the rule "mix" needs.

    Returns:
        The contents of selection.json except `path`: `rule` (asked for), `applied`, `step`, `candidate` (`step-400`,
        or `mix-0.7`: an average of the base and `step`), `reason`, `evidence`, `candidates`, `metric`. `applied` is a
        rule, or "mixed_groups" or "half_fall" where a series has no turning point. The evidence has `turning_point`
        (by metric: `step`, `reason`, `verdict` and the numbers), `evaluation` (`metric`, and its `values` by step) and
        `measured` (the row of the chosen candidate, or None). It has `verdicts` (by step) under the rule "readiness",
        and `wanted_step` where that was not saved.
    """
    check_choice("rule", rule, RULES)
    check_choice("metric", metric, METRICS)
    check_choice("best_eval_metric", best_eval_metric, EVAL_METRICS)
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
    points = {name: turning_point_of(measured.values(), name, patience) for name in METRICS}
    turning_points = {name: {"step": it.step, "reason": it.reason, **it.evidence} for name, it in points.items()}
    nll = _figures(eval_rows, "eval_nll")
    evaluations = nll if best_eval_metric == "eval_nll" else _figures(measured.values(), best_eval_metric)
    entries = (readiness or {}).get("checkpoints", []) if rule == "readiness" else []
    probed = [entry for entry in entries if entry.get("step") in candidates]
    if rule == "readiness" and not probed:
        raise InputError("no saved candidate has been probed: run aesl probe on the run's folder, then select again")
    mix = None
    if rule == "mix":
        if not mixes:
            raise InputError(f"the rule mix reads {files.MIXES}, and there is none: run aesl mix on the run's folder")
        mix, reason = best_mix(mixes["candidates"])
        applied, wanted = rule, mixes["step"]
    else:
        without = _without_turning_point(turning_points[metric]["verdict"], measured, nll, candidates)
        applied, wanted, reason = _apply(
            rule, metric, turning_points, without, best_eval_metric, evaluations, candidates, probed
        )
    step = wanted if mix else nearest_step(wanted, candidates)
    evidence = {
        "turning_point": turning_points,
        "evaluation": {"metric": best_eval_metric, "values": evaluations},
        "measured": mix or measured.get(step),
    }
    if probed:
        evidence["verdicts"] = {entry["step"]: entry["text"] for entry in probed}
    if step != wanted:
        evidence["wanted_step"] = wanted
        reason += f"; step {wanted} was not saved, step {step} is the nearest candidate"
    return {
        "rule": rule,
        "applied": applied,
        "step": step,
        "candidate": mix["candidate"] if mix else f"step-{step}",
        "reason": reason,
        "evidence": evidence,
        "candidates": candidates,
        "metric": metric,
    }


def best_mix(rows: Sequence[dict]) -> tuple[dict, str]:
    """Return the best of mix.json's rows, and why.

    It is the row with the largest share of mixed groups where every row has it, else that with the largest entropy in
    nats a token. Of equal rows the one nearest to the base wins.

    Raises:
        InputError: no row has a figure.
    """
    measured = [row for row in rows if is_number(row.get("entropy"))]
    if not measured:
        raise InputError(f"no average in {files.MIXES} has been measured: run aesl mix again")
    rewarded = all(is_number(row.get("groups_mixed")) for row in measured)
    name, words = ("groups_mixed", "share of mixed groups") if rewarded else ("entropy", "entropy")
    best = max(measured, key=lambda row: (row[name], -row["weight"]))
    try:
        shown = with_interval(best[name], (best.get("intervals") or {}).get(name))
    except (TypeError, AttributeError) as error:
        raise InputError(f"{files.MIXES} has a value of another kind ({error!r}): run aesl mix again") from None
    return best, f"largest {words}, {shown}, of {len(measured)} averages of the base and the candidate"


def _figures(rows: Iterable[dict], name: str) -> dict[int, float]:
    """Return the known values of a figure by step."""
    known = [row for row in rows if is_number(row.get(name)) and isinstance(row.get("step"), int)]
    return {row["step"]: row[name] for row in known}


def _without_turning_point(
    verdict: str, measured: dict[int, dict], nll: dict[int, float], candidates: list[int]
) -> tuple[str, int, str]:
    """Return what is applied to a series without a turning point, the candidate that it takes, and why."""
    if (found := _most_mixed(measured, candidates)) is not None:
        return "mixed_groups", *found
    if verdict == ONLY_FALLS and (found := _half_fallen(nll, candidates)) is not None:
        return "half_fall", *found
    return "last", candidates[-1], f"the last candidate, step {candidates[-1]}"


def _most_mixed(measured: dict[int, dict], candidates: list[int]) -> tuple[int, str] | None:
    """Return the candidate with the most mixed groups, the earliest of equals, and why; None without a mixed group.

    A candidate equals the best where the interval of their difference, paired by prompt, includes zero. Rows without
    the values of each prompt (of an older version) are equal where their shares are.
    """
    rows = {step: measured[step] for step in candidates if step in measured}
    shares = _figures(rows.values(), "groups_mixed")
    if not any(shares.values()):
        return None
    best = max(shares, key=shares.get)

    def mixed(step: int) -> list[bool | None]:
        rates = (rows[step].get("by_prompt") or {}).get("pass@1") or []
        return [None if rate is None else 0 < rate < 1 for rate in rates]

    def equals_best(step: int) -> bool:
        before, after = mixed(step), mixed(best)
        is_paired = len(before) == len(after)
        return shares[step] == shares[best] or (is_paired and paired_interval(before, after)[1] <= 0)

    step = next(step for step in shares if equals_best(step))
    why = f"most mixed groups, {shares[step]:.2f} at step {step}"
    return step, why if step == best else f"{why}, not told apart from {shares[best]:.2f} at step {best}"


def _half_fallen(nll: dict[int, float], candidates: list[int]) -> tuple[int, str] | None:
    """Return the earliest candidate whose held-out nll has covered half of its fall, and why; None without a fall."""
    if not nll:
        return None
    first, lowest = nll[min(nll)], min(nll.values())
    there = min(step for step, value in nll.items() if value <= (first + lowest) / 2)
    later = [step for step in candidates if step >= there]
    if first == lowest or not later:
        return None
    why = f"held-out nll has covered half of its fall from {first:.4g} to {lowest:.4g}"
    return later[0], f"{why} by step {there}, and step {later[0]} is the earliest candidate from there on"


def _apply(
    rule: str,
    metric: str,
    turning_points: dict[str, dict],
    without: tuple[str, int, str],
    eval_metric: str,
    evaluations: dict[int, float],
    candidates: list[int],
    probed: list[dict],
) -> tuple[str, int, str]:
    """Return the rule in effect after fallbacks, the step that it wants, and why.

    `without` is what is applied where the series has no turning point.
    """
    reason = ""
    if rule == "readiness":
        try:
            best, reason = rank(probed)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{files.READINESS} has a value of another kind ({error!r}): run aesl probe again"
            ) from None
        if len(probed) < len(candidates):
            reason += f" ({len(probed)} of {len(candidates)} candidates were probed)"
        if best is not None:
            return rule, best["step"], reason
        rule, reason = "turning_point", f"{reason}; falls back to turning_point: "
    evaluated = [step for step in candidates if step in evaluations]
    if rule == "turning_point":
        step = turning_points[metric]["step"]
        reason += f"{metric}: {turning_points[metric]['reason']}"
        if step is not None:
            for name, other in turning_points.items():
                if other["step"] != step:
                    found = other["verdict"] if other["step"] is None else f"step {other['step']}"
                    reason += f"; {name} says {found}"
            return rule, step, reason
        applied, step, why = without
        return applied, step, f"{reason}; falls back to {applied}: {why}"
    if rule == "best_eval" and evaluated:
        best = (min if EVAL_METRICS[eval_metric] == "min" else max)(evaluated, key=evaluations.get)
        where = f"best {eval_metric} among {len(evaluated)} evaluated candidates"
        return rule, best, f"{reason}{where}, {evaluations[best]:.4g} at step {best}"
    if rule == "best_eval":
        reason = f"no candidate has {eval_metric}; falls back to last: "
    return "last", candidates[-1], f"{reason}the last candidate, step {candidates[-1]}"


def select_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    rule: str | None = None,
    metric: str | None = None,
    patience: int | None = None,
    best_eval_metric: str | None = None,
    step: int | None = None,
    verify: bool = False,
) -> dict:
    """Select from the candidates of a run and write `selection.json` and `selected/`.

    Args:
        run: an SFT folder, or a chain's folder.
        out: where to write, by default [`~files.RunFolder.own`] of `run`. Several chains can select from one SFT
            folder, each by its own rule.
        rule, metric, patience, best_eval_metric: by default as recorded in the run's run.json, by the config or by
            DiversityCallback. Without a record the rule is "turning_point" on entropy with patience 3.
        step: take this candidate, by no rule.
        verify: also record the sha256 of each weight file, which a handoff can then compare. Files are read whole.
            With no other option the selection that is in `out` is made again.

    Returns:
        The contents of selection.json, whose `path` is relative to its folder. `weights` is that folder as seen from
        here, and `replaces` says in words which other step an earlier selection had chosen, or is None.

    Raises:
        InputError: `run` is no run, it has no candidates or not the one asked for, a file in it is unreadable, or
            something else would be replaced in `out`.
    """
    folder = RunFolder(run)
    out, recorded = folder.own if out is None else Path(out), folder.settings
    if recorded.get("stage", "sft") != "sft":
        raise InputError(
            f"{folder.sft} is a run of {recorded['stage']}: name the folder of the cold start, or the chain's"
        )
    if verify and not any((rule, metric, patience, best_eval_metric)) and step is None:
        before = files.repeats(_before(out / files.SELECTION))
        rule, metric, best_eval_metric, step = map(before.get, ("rule", "metric", "best_eval_metric", "step"))
    rule = rule or recorded.get("selection") or DEFAULT_RULE
    candidates = folder.candidates
    if step is not None:
        if step not in candidates:
            raise InputError(
                f"{folder.candidates_folder} holds no step {step}, "
                f"the nearest is {nearest_step(step, candidates)}; raise max_candidates to keep more"
            )
        candidates, rule = [step], "last"
    selection = select_checkpoint(
        folder.rows(files.DIVERSITY),
        folder.log,
        candidates,
        rule=rule,
        metric=metric or recorded.get("diversity_metric") or "entropy",
        patience=recorded.get("diversity_patience", 3) if patience is None else patience,
        best_eval_metric=best_eval_metric or recorded.get("best_eval_metric") or "eval_nll",
        readiness=_read_readiness(folder.sft) if rule == "readiness" else None,
        mixes=_read_mixes(folder) if rule == "mix" else None,
    )
    if step is not None:
        selection |= {"rule": "step", "applied": "step", "reason": f"step {step} was asked for"}
    candidate, target = folder.candidate(selection["candidate"]), out / files.SELECTED
    # In the run's own folder these names are ours. Older versions wrote no identity into selected/.
    is_own = out.resolve() == folder.own.resolve()
    is_ours = is_own or files.wrote(out / files.SELECTION, "applied")
    check_replaceable("--output_dir", out / files.SELECTION, is_ours, is_file=True)
    is_ours = (target / files.IDENTITY).is_file() or (out / files.SELECTION).is_file() or out.name == files.OWN
    if is_own or (out / files.CHAIN).exists():  # version 0.1.0 may have been cut off before its selection.json
        is_ours = is_ours or any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    check_replaceable("--output_dir", target, is_ours, [candidate])
    # The weights come first: a kill in between leaves a selection.json that is stale, never one that points nowhere.
    # A handoff finds it, since the weights say which candidate they are.
    with files.swapped(target) as place:
        shutil.copytree(candidate, place, copy_function=files.link_or_copy, dirs_exist_ok=True)
        selection["identity"] = identity_of(place, selection, contents=verify)
        files.write_json(place / files.IDENTITY, selection["identity"])
    selection["path"] = files.SELECTED
    replaces = _replaced(out / files.SELECTION, files.chosen(selection))
    files.write_json(out / files.SELECTION, selection)
    if selection["applied"] == "last" != rule and step is None:
        say(f"aesl_trl: warning: {_not_chosen(folder, out, rule)}")
    return selection | {"weights": str(out / files.SELECTED), "replaces": replaces}


def _before(path: Path) -> dict:
    """Read the selection.json `path` of an earlier selection; a torn one reads as empty."""
    try:
        return files.read_object(path)
    except InputError:
        return {}


def _replaced(path: Path, now: str) -> str | None:
    """Say which candidate other than `now` (`step 400`) the selection.json `path` names. A torn one names none."""
    before = _before(path)
    is_other = files.chosen(before) not in (None, now)
    return f"{files.chosen(before)}, chosen by {before.get('applied')}" if is_other else None


def _not_chosen(folder: RunFolder, out: Path, rule: str) -> str:
    """Say that the last candidate was taken for want of a reason, and what to run next."""
    taken = "nothing measured says which candidate RL should start from, the last was taken"
    if rule == "readiness":
        return f"{taken}; why none is ready: {files.own_folder(folder.sft) / files.READINESS}"
    if (out / files.CHAIN).exists():  # whose next start selects by chain.yaml
        return f"{taken}; to ask each candidate: set selection: {{rule: readiness}} in chain.yaml, run the chain again"
    into = "" if out == folder.own else f" --output_dir {out}"
    ask = f"aesl probe {folder.sft} --config FILE, then aesl select {folder.path} --rule readiness{into}"
    return f"{taken}; to ask each candidate: {ask}"


def _read_readiness(sft: Path) -> dict:
    """Read the readiness.json of the SFT folder's own candidates; that of a chain's folder is about its handoff."""
    path = files.own_folder(sft) / files.READINESS
    if not path.exists():
        raise InputError(
            f"{sft} has no {files.READINESS}, which the rule readiness reads: run aesl probe {sft} --config FILE "
            "(GRPO's config, or a probe.yaml)"
        )
    found = files.read_json(path)
    entries = found.get("checkpoints") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "verdict" in entry for entry in entries):
        raise InputError(f"{path} is not what aesl probe writes: run aesl probe {sft} again")
    return found


def _read_mixes(run: RunFolder) -> dict:
    """Read the mix.json of the run's SFT folder; refuse one that lacks an average that was asked for."""
    path = files.own_folder(run.sft) / files.MIXES
    if not path.exists():
        raise InputError(
            f"{run.sft} has no {files.MIXES}, which the rule mix reads: run aesl mix {run.sft} --config FILE (SFT's "
            "config)"
        )
    found, rows = files.read_object(path), run.mixes.values()
    asked, step, weights = found.get("asked"), found.get("step"), [row.get("weight") for row in rows]
    is_ours = isinstance(asked, list) and all(map(files.is_mix, asked)) and all(map(is_number, weights))
    if not is_ours or not isinstance(step, int):
        raise InputError(f"{path} is not what aesl mix writes: run aesl mix {run.sft} again")
    missing = [name for name in asked if name not in run.mixes or not run.candidate(name).is_dir()]
    if missing:
        raise InputError(f"{path} lacks {missing[0]}, aesl mix was cut off: run it again to go on")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run `aesl select`: apply a rule to the saved candidates of a run."""
    exit_on_input_error("aesl select", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = ArgumentParser(
        "aesl select",
        "Choose which saved candidate of a cold start goes to RL; write selection.json and selected/.",
    )
    parser.add_argument("run", metavar="RUN", help="an SFT output folder, or a chain's folder")
    parser.add_argument("--rule", help=f"{', '.join(RULES)}; default: that of the run's config or DiversityCallback")
    parser.add_argument("--metric", help=f"the figure whose turning point counts: {', '.join(METRICS)}")
    parser.add_argument("--patience", type=int, help="number of measurements that must follow the peak")
    parser.add_argument("--step", type=int, help="take this candidate, by no rule")
    parser.add_argument("--best_eval_metric", help=f"the figure that best_eval compares: {', '.join(EVAL_METRICS)}")
    parser.add_argument("--output_dir", help=f"folder to write to (default: RUN, for an SFT folder RUN/{files.OWN})")
    recorded = "also record the sha256 of the weights, for aesl handoff --verify"
    parser.add_argument("--verify", action="store_true", help=recorded)
    given = vars(parser.parse_args(argv))
    run, out = given.pop("run"), given.pop("output_dir")
    selection = select_run(run, out, **given)
    replaces = f"; replaces {selection['replaces']}" if selection["replaces"] else ""
    chosen = f"selected {files.chosen(selection)} by {selection['applied']}: {selection['reason']}{replaces}"
    tell(f"{chosen} -> {selection['weights']}" + ("" if out else f"; next: aesl handoff {run}"))


if __name__ == "__main__":
    main()
