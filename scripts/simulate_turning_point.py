"""How often `find_turning_point` stops too early, too late or never, and what it costs, against argmax and patience.

python scripts/simulate_turning_point.py --output docs/turning_point.json     # its tables of simulated runs
python scripts/simulate_turning_point.py --calibrate 20000                    # the thresholds of turning_point.py
python scripts/simulate_turning_point.py --collect RUN --output FILE          # per-prompt values of an SFT run

A run is simulated measurement by measurement, as training asks. Values are means over prompts, and one value's
standard error over prompts is the unit: rise 12 is twelve of them. To this sampling noise comes noise of the training
that moves all prompts alike, correlated by 0.5 between neighbours, `training` times as large. The cases skills-tiny
draw the 96 prompts of a recorded run with replacement; their truth is the recorded curve.

Seeds: thresholds and settings were found on streams TUNING and frozen; what is reported comes from streams REPORT,
which nothing was tuned on. The recorded runs were looked at while tuning; their resamples were not.
Left out: what RL makes of the step (`aesl compare`).
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aesl_trl import files
from aesl_trl.diversity import self_bleu
from aesl_trl.diversity.turning_point import (
    MULTIPLE,
    ONLY_FALLS,
    STANDARD_ERRORS,
    THRESHOLD_COUNTS,
    THRESHOLDS,
    find_turning_point,
)


TUNING, REPORT = 1, 2  # first word of every seed
PROMPTS = 64
RECORDED = Path(__file__).parents[1] / "recipes/skills-tiny/results/first/by_prompt"
WITHIN = 0.1  # of the rise: places this near to the true peak count as the turning point
FALSE_STOPS = 0.05  # promised within THRESHOLD_COUNTS[-1] = 40 measurements


@dataclass(frozen=True)
class Curve:
    """Truth of one kind of run, high is diverse; `turns` is False where no step should be named."""

    name: str
    truth: np.ndarray
    turns: bool = True
    prompts: np.ndarray | None = None  # [step, prompt] of a recorded run

    @property
    def rise(self) -> float:
        return float(self.truth.max() - self.truth[0])

    @property
    def zone(self) -> np.ndarray:
        """Places as good as the turning point."""
        return np.flatnonzero(self.truth >= self.truth.max() - WITHIN * self.rise)


def synthetic() -> list[Curve]:
    def line(name, length, knots, turns=True):
        places, heights = zip(*knots, strict=True)
        return Curve(name, np.interp(np.arange(length), places, heights), turns)

    return [
        line("small: rise 6, fall 12 after 4 of 12", 12, [(0, 0), (4, 6), (11, -6)]),
        line("medium: rise 12, fall 24 after 4 of 12", 12, [(0, 0), (4, 12), (11, -12)]),
        line("early: rise 20, fall 40 after 2 of 10", 10, [(0, 0), (2, 20), (9, -20)]),
        line("long: rise 12, fall 24 after 12 of 40", 40, [(0, 0), (12, 12), (39, -12)]),
        line("plateau: rise 12 to 4, fall 24 after 10 of 20", 20, [(0, 0), (4, 12), (10, 12), (19, -12)]),
        line("still rising: 24 in 20", 20, [(0, 0), (19, 24)], turns=False),
        line("only falling: 24 in 20", 20, [(0, 0), (19, -24)], turns=False),
        line("flat: 20", 20, [(0, 0), (19, 0)], turns=False),
    ]


def recorded() -> list[Curve]:
    found = []
    for path in sorted(RECORDED.glob("*.json")):
        run = files.read_json(path)
        for metric, sign in (("entropy", 1), ("self_bleu", -1)):
            prompts = sign * np.array(run[metric])
            found.append(Curve(f"skills-tiny, {run['loss']}, {metric}", prompts.mean(axis=1), prompts=prompts))
    return found


def correlated(generator, length: int, correlation: float) -> np.ndarray:
    """Standard Gaussian noise whose neighbours correlate by `correlation`."""
    values = generator.standard_normal(length)
    for place in range(1, length):
        values[place] = correlation * values[place - 1] + math.sqrt(1 - correlation**2) * values[place]
    return values


def draw(generator, curve: Curve, training: float, correlation: float = 0.5, number: int = PROMPTS) -> np.ndarray:
    """Per-prompt values [step, prompt] of one run."""
    length = len(curve.truth)
    shared = training * correlated(generator, length, correlation)[:, None]
    if curve.prompts is None:
        return curve.truth[:, None] + shared + math.sqrt(number) * generator.standard_normal((length, number))
    number = curve.prompts.shape[1]
    changes = np.diff(curve.prompts, axis=0).std(axis=1, ddof=1)  # of each prompt from one measurement to the next
    unit = math.sqrt(np.mean(changes**2) / 2 / number)
    return curve.prompts[:, generator.integers(number, size=number)] + unit * shared


# ---- Methods: values and per-prompt values so far -> (place named or None, measurements taken)


def ours(values: list[float], prompts: list | None, patience: int = 3) -> tuple[int | None, int]:
    """Asked after every measurement, stops at the first step named."""
    for count in range(1, len(values) + 1):
        now = None if prompts is None else prompts[:count]
        found = find_turning_point(range(count), values[:count], patience=patience, by_prompt=now).step
        if found is not None:
            return found, count
    return None, len(values)


def early_stopping(values: list[float], patience: int = 3) -> tuple[int, int]:
    """transformers' EarlyStoppingCallback with the best checkpoint loaded at the end."""
    best = 0
    for place, value in enumerate(values):
        best = place if value > values[best] else best
        if place - best >= patience:
            return best, place + 1
    return best, len(values)


METHODS = {
    "ours, by_prompt": lambda values, prompts: ours(values, prompts),
    "ours": lambda values, prompts: ours(values, None),
    "argmax at the end": lambda values, prompts: (int(np.argmax(values)), len(values)),
    "patience 3": lambda values, prompts: early_stopping(values),
}


def outcomes(curve: Curve, training: float, seed: list[int], replications: int) -> list[dict]:
    """One row a method: the shares of its runs that end well, too early, too late or without a step."""
    kept = {name: [] for name in METHODS}
    for run in range(replications):
        prompts = draw(np.random.default_rng([*seed, run]), curve, training)
        values = prompts.mean(axis=1).tolist()
        for name, method in METHODS.items():
            kept[name].append(method(values, list(prompts)))
    return [{"curve": curve.name, "training": training, "method": name} | judge(curve, kept[name]) for name in METHODS]


def judge(curve: Curve, ends: list[tuple[int | None, int]]) -> dict:
    """Where no step is named the last one goes to RL, and counts as such in the regret, which is in units of the rise.

    Of a curve that does not turn, naming any step is a mistake (`named`) and it has no regret, unless it rises.
    """
    named = [place for place, _ in ends if place is not None]
    row = {"measurements": float(np.mean([taken for _, taken in ends]))}
    if curve.rise > 0:
        chosen = [len(curve.truth) - 1 if place is None else place for place, _ in ends]
        lost = (curve.truth.max() - curve.truth[chosen]) / curve.rise
        row |= {"regret": float(lost.mean()), "regret_error": float(lost.std(ddof=1) / math.sqrt(len(lost)))}
    if not curve.turns:
        return row | {"named": len(named) / len(ends)}
    shares = {
        "early": sum(place < curve.zone[0] for place in named),
        "late": sum(place > curve.zone[-1] for place in named),
        "never": len(ends) - len(named),
    }
    return row | {name: count / len(ends) for name, count in shares.items()}


# ---- False stops on flat series

FLAT = Curve("flat", np.zeros(40), turns=False)
LONG = Curve("flat", np.zeros(100), turns=False)
# curve, by_prompt, size of the training noise, its correlation, patience, prompts
FLAT_CASES = [
    (FLAT, False, 1e3, 0.0, 3, 16),
    (FLAT, False, 1e3, 0.5, 3, 16),
    (FLAT, False, 1e3, 0.5, 1, 16),
    (FLAT, False, 1e3, 0.8, 3, 16),
    (LONG, False, 1e3, 0.5, 3, 16),
    (FLAT, True, 0, 0.0, 3, PROMPTS),
    (FLAT, True, 1, 0.5, 3, PROMPTS),
    (FLAT, True, 2, 0.5, 3, PROMPTS),
    (FLAT, True, 2, 0.5, 1, PROMPTS),
    (FLAT, True, 2, 0.5, 3, 16),
    (FLAT, True, 4, 0.5, 3, PROMPTS),
    (FLAT, True, 1e3, 0.5, 3, PROMPTS),
]


def false_stops(seed: list[int], replications: int) -> list[dict]:
    rows = []
    for case, (curve, by_prompt, training, correlation, patience, number) in enumerate(FLAT_CASES):
        stops = 0
        for run in range(replications):
            prompts = draw(np.random.default_rng([*seed, case, run]), curve, training, correlation, number)
            given = list(prompts) if by_prompt else None
            stops += ours(prompts.mean(axis=1).tolist(), given, patience)[0] is not None
        share = stops / replications
        rows.append(
            {
                "measurements": len(curve.truth),
                "by_prompt": by_prompt,
                "training": training,
                "correlation": correlation,
                "patience": patience,
                "prompts": number if by_prompt else 0,
                "stopped": share,
                "error": math.sqrt(max(share, 1 / replications) * (1 - share) / replications),
            }
        )
    return rows


# ---- The verdict "only falls", asked once at the end: of flat series by mistake, of falling ones rightly

HALVING = 40 * 0.5 ** np.arange(10)  # by 40 in all, half of what is left at each measurement
# curve, size of the training noise
FALL_CASES = [(Curve(f"flat: {length}", np.zeros(length)), 2.0) for length in (4, 5, 6, 8, 12, 20, 40)]
FALL_CASES += [(Curve(f"halving: 40 in {length}", HALVING[:length]), 1.0) for length in (4, 6, 10)]
FALL_CASES += [(Curve("steady: 24 in 20", np.linspace(0, -24, 20)), 1.0)]


def only_falls(seed: list[int], replications: int) -> list[dict]:
    rows = []
    for case, (curve, training) in enumerate(FALL_CASES):
        found = {"by_prompt": 0, "values": 0}
        for run in range(replications):
            prompts = draw(np.random.default_rng([*seed, case, run]), curve, training)
            for name, given in (("by_prompt", list(prompts)), ("values", None)):
                values = prompts.mean(axis=1).tolist()
                verdict = find_turning_point(range(len(values)), values, by_prompt=given).evidence["verdict"]
                found[name] += verdict == ONLY_FALLS
        shares = {name: count / replications for name, count in found.items()}
        rows.append({"curve": curve.name, "training": training} | shares)
    return rows


def calibrate(replications: int) -> list[float]:
    """Thresholds that spend FALSE_STOPS over the measurements in proportion to 1 / n^2, at correlation 0.5."""
    counts = np.arange(THRESHOLD_COUNTS[0], THRESHOLD_COUNTS[-1] + 1)
    sizes = np.zeros((replications, len(counts)))  # rise or fall over noise, where patience 3 would allow a stop
    for run in range(replications):
        values = correlated(np.random.default_rng([TUNING, run]), counts[-1], 0.5).tolist()
        for column, count in enumerate(counts):
            found = find_turning_point(range(count), values[:count]).evidence
            if found["later"] >= found["patience"]:
                sizes[run, column] = min(found["rise"], found["fall"]) / found["noise"]
    spent = np.cumsum(1.0 / counts**2)
    spent *= FALSE_STOPS / spent[-1]
    going, thresholds = np.ones(replications, dtype=bool), []
    for column, allowed in enumerate(spent):
        more = round(allowed * replications) - np.count_nonzero(~going)
        thresholds.append(np.sort(sizes[going, column])[::-1][more])
        going &= sizes[:, column] <= thresholds[-1]
    return [float(thresholds[count - counts[0]]) for count in THRESHOLD_COUNTS]


# ---- Files and tables


def collect(run: Path, output: Path, last: int = 200) -> None:
    """Per-prompt values of the samples that an SFT run kept, up to step `last`, to 4 digits."""
    described = files.read_settings(run)
    table = {
        "loss": described["cold_start_loss"],
        "seed": described["seed"],
        "steps": [],
        "entropy": [],
        "self_bleu": [],
    }
    paths = files.RunFolder(run).sample_files
    for step in sorted(step for step in paths if step <= last):
        groups = files.read_jsonl(paths[step])
        entropies = [np.average(group["entropy"], weights=group["num_tokens"]) for group in groups]
        table["steps"].append(step)
        table["entropy"].append([round(float(value), 4) for value in entropies])
        table["self_bleu"].append([round(self_bleu(group["completions"]), 4) for group in groups])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(table, separators=(",", ":")) + "\n", encoding="utf-8")


def markdown(report: dict) -> str:
    def line(*cells):
        return "| " + " | ".join(cells) + " |"

    def figure(row, key):
        return f"{row[key]:.2f}" if key in row else ""

    keys = ("early", "late", "never", "named", "regret", "measurements")
    lines = [line("curve", "training noise", "method", *keys), line(*["---"] * (3 + len(keys)))]
    lines += [
        line(row["curve"], f"{row['training']:g}", row["method"], *(figure(row, key) for key in keys))
        for row in report["runs"]
    ]
    keys = ("measurements", "by_prompt", "prompts", "training", "correlation", "patience")
    lines += ["", line(*keys, "stopped"), line(*["---"] * (1 + len(keys)))]
    for row in report["false_stops"]:
        cells = [str(row[key]) if key != "training" else f"{row[key]:g}" for key in keys]
        lines.append(line(*cells, f"{row['stopped']:.3f} ± {row['error']:.3f}"))
    lines += ["", line("curve", "training", "by_prompt", "values"), line(*["---"] * 4)]
    for row in report["only_falls"]:
        lines.append(
            line(row["curve"], f"{row['training']:g}", *(f"{row[key]:.3f}" for key in ("by_prompt", "values")))
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--replications", type=int, default=400, help="runs a case; flat series get four times as many"
    )
    parser.add_argument("--stream", type=int, default=REPORT, help=f"{TUNING} to tune, {REPORT} to report")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--calibrate", type=int, metavar="SERIES", help="print thresholds from so many series")
    parser.add_argument("--collect", type=Path, metavar="RUN", help="an SFT output folder with its samples")
    args = parser.parse_args()
    if args.calibrate:
        table = zip(THRESHOLD_COUNTS, calibrate(args.calibrate), THRESHOLDS, strict=True)
        print("\n".join(f"{count:4d} {found:6.1f} (in use {used})" for count, found, used in table))
        return
    if args.collect:
        collect(args.collect, args.output)
        return
    start = time.perf_counter()
    curves = [(curve, training) for curve in synthetic() + recorded() for training in (0.0, 1.0)]
    runs = [
        row
        for case, (curve, training) in enumerate(curves)
        for row in outcomes(curve, training, [args.stream, 0, case], args.replications)
    ]
    report = {
        "settings": {"thresholds": dict(zip(THRESHOLD_COUNTS, THRESHOLDS, strict=True))}
        | {"standard_errors": STANDARD_ERRORS, "multiple": MULTIPLE, "within": WITHIN, "prompts": PROMPTS},
        "stream": args.stream,
        "replications": args.replications,
        "runs": runs,
        "false_stops": false_stops([args.stream, 1], 4 * args.replications),
        "only_falls": only_falls([args.stream, 2], 4 * args.replications),
    }
    if args.output:
        files.write_json(args.output, report)
    print(markdown(report))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
