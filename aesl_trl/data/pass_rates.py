"""How often the base model solves a problem: rates from a file, or of answers that are sampled and graded here.

Sampling is the dear part (problems x samples completions), so each chunk is written once it is graded, and a run that
was cut off goes on with the missing problems. Rates that were drawn with other settings stay in the file and are not
used. One process samples, by vLLM where it can.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..files import append_jsonl, read_jsonl
from ..models.folder import ModelFolder
from ..progress import bar
from ..rewards.functions import reward_name, score_groups
from ..sampling.backends import choose_engine
from ..sampling.draws import Piece, SamplingSettings
from ..sampling.offline import open_engine
from .config import DataArguments
from .output import PASS_RATES, progress
from .problems import Problem, checked_rate, problem_id
from .rows import load_rows


CHUNK = {"transformers": 64, "vllm": 512}  # problems between two writes; vLLM runs empty at the end of each chunk


def rates_in_file(path: str) -> dict[str, float]:
    """Read pass rates by problem id, from rows with `pass_rate` and `id` or `problem`; refuse two of one problem."""
    field = "pass_rate_file"
    rows = load_rows(path, field=field)
    name = next((column for column in ("id", "problem") if column in rows.column_names), None)
    if name is None or "pass_rate" not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise InputError(f"{field}: {path} needs the columns pass_rate and id or problem, its columns are {found}")
    rates: dict[str, float] = {}
    for number, row in enumerate(rows.select_columns([name, "pass_rate"])):
        where = f"{field}: {path}, row {number} (from 0)"
        rate = checked_rate(row["pass_rate"], where)
        id = row["id"] if name == "id" else problem_id(row["problem"])
        if rate is not None and rates.setdefault(id, rate) != rate:
            raise InputError(f"{where}: {id} has the pass rate {rate} here and {rates[id]} above: keep one of them")
    return rates


def choose_sampler(args: DataArguments) -> tuple:
    """Return an accelerator, the backend that samples pass rates, and why that backend."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.use_cpu)
    return accelerator, *choose_engine(args.backend, accelerator)


def sample_rates(problems: list[Problem], args: DataArguments, reward: Callable) -> dict[str, float | None]:
    """Return by problem id the share of right answers among those that `reward` could grade, None where none could.

    Answers are sampled to the problems whose rate pass_rates.jsonl does not hold.
    """
    accelerator, backend, why = choose_sampler(args)
    progress(f"pass rates: sampled by {backend} ({why})")
    rows = [{"prompt": args.prompt_of(problem), "solution": problem.solution} for problem in problems]
    keys = dict(zip((problem.id for problem in problems), _keys(rows, args, backend, reward), strict=True))
    path = Path(args.output_dir) / PASS_RATES
    lines = read_jsonl(path) if path.exists() else []
    rates = {line["id"]: line["pass_rate"] for line in lines if keys.get(line["id"]) == line.get("key")}
    unknown = [(problem, row) for problem, row in zip(problems, rows, strict=True) if problem.id not in rates]
    progress(f"pass rates: {len(rates)} of {len(problems)} known from {path}, {len(unknown)} to sample")
    if unknown:
        settings = SamplingSettings(
            num_samples=args.pass_rate_samples,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=args.seed,
            max_model_len=args.max_prompt_length and args.max_prompt_length + args.max_new_tokens,
            trust_remote_code=args.trust_remote_code,
        )
        engine, samples = open_engine(backend, args.model_name_or_path, settings, accelerator), args.pass_rate_samples
        shown = bar(len(problems) * samples, "pass rates", done=len(rates) * samples, unit="answer")
        for start in range(0, len(unknown), CHUNK[backend]):
            chunk, rows = zip(*unknown[start : start + CHUNK[backend]], strict=True)
            # The chunk's seed comes from its first problem: chunks differ, and a chunk that is redrawn repeats
            first = int(hashlib.sha256(chunk[0].id.encode()).hexdigest()[:8], 16)
            groups = engine.sample(list(rows), Piece(first, len(rows), 0, samples))
            for problem, group in zip(chunk, score_groups(groups, list(rows), [reward]), strict=True):
                graded = [values[0] for values in group.rewards if not math.isnan(values[0])]
                right = sum(value >= args.success_threshold for value in graded)
                rates[problem.id] = right / len(graded) if graded else None
                counts = {"right": right, "graded": len(graded), "truncated": sum(group.truncated)}
                line = {"id": problem.id, "pass_rate": rates[problem.id], **counts, "key": keys[problem.id]}
                append_jsonl(path, line)
            shown.update(len(chunk) * samples)
            if shown.disable:
                progress(f"pass rates: {start + len(chunk)} of {len(unknown)} sampled")
        shown.close()
        engine.close()
    return {problem.id: rates[problem.id] for problem in problems}


def _keys(rows: list[dict], args: DataArguments, backend: str, reward: Callable) -> list[str]:
    """Return a digest for each row of all that its pass rate depends on: equal keys mean the same draw."""
    settings = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed", "success_threshold")}
    settings |= {"model": args.model_name_or_path, "samples": args.pass_rate_samples}
    settings |= {"backend": backend, "reward": reward_name(reward)}
    files = ModelFolder.find(args.model_name_or_path).identity().get("files", [])
    weights = [file for file in files if file[0].endswith(".safetensors")]
    common = json.dumps([settings, weights], sort_keys=True)
    return [hashlib.sha256((common + json.dumps(row, sort_keys=True)).encode()).hexdigest()[:16] for row in rows]
