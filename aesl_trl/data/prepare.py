"""`aesl data --config data.yaml`: OpenR1-Math-46k or GSM8K -> sft.jsonl, rl.jsonl and held_out.jsonl, disjoint.

Problems are read (problems.py), rid of duplicates and of benchmark problems (decontaminate.py), put into the order of
the seed and cut to the tokenizer's lengths; then the first make the demonstrations, the last are held out for
measuring diversity, and RL has the rest. The order is by a hash of seed and problem: a subset holds every smaller one,
and a problem that is dropped moves no other. Writing is output.py, the base's pass rates are pass_rates.py.

Left out: problems that are the same in other words, and demonstrations that another model would have to write.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import parse
from ..errors import InputError, exit_on_input_error, nearest
from ..models.loading import CHECKED_ROWS, check_model, check_tokenizer
from ..rewards.functions import check_columns, load_reward_funcs, reward_name
from ..sampling.backends import choose_engine
from .config import DIFFICULTIES, DataArguments, difficulty_of, prompt_of
from .decontaminate import BenchmarkIndex, load_benchmarks
from .demonstrations import BATCH, Judge, gradable, num_tokens, take
from .output import HELD_OUT, PASS_RATES, RL, Output, check_output, locked, write
from .pass_rates import Sampling, rates_in_file, sample_rates
from .problems import Drops, Problem, demonstration_of, read_problems, schema_of
from .rows import load_rows


ARGUMENT_TYPES = (DataArguments,)


def main(argv: list[str] | None = None) -> None:
    """Write the files of `output_dir`, or say that they are there already.

    Raises:
        InputError: arguments, data or model that cannot be used, or another run's files in `output_dir`.
    """
    (args,) = parse(ARGUMENT_TYPES, sys.argv[1:] if argv is None else argv, prog="aesl data")
    for name in ("dataset_name", "output_dir", "model_name_or_path"):
        if not getattr(args, name):
            raise InputError(f"{name} is missing")
    check_output(args)
    rewards = load_reward_funcs(args.reward_funcs)
    check_columns(rewards, ("prompt", "solution"), where="reward_funcs", absent=("completion_ids",))
    if args.pass_rate_samples:
        check_model(args.model_name_or_path, "model_name_or_path", trust_remote_code=args.trust_remote_code)
        pass_rate_engine(args)
    benchmarks = load_benchmarks(args.decontaminate or [])
    known = rates_in_file(args.pass_rate_file) if args.pass_rate_file else {}
    with locked(args.output_dir):
        output = prepare(args, rewards, benchmarks, known)
        for line in write(output, args):
            print(line)


def prepare(
    args: DataArguments, rewards: list[Callable], benchmarks: dict[str, list[str]], known: dict[str, float]
) -> Output:
    """The rows of every file, and what became of the others."""
    rows = load_rows(args.dataset_name, split=args.dataset_split, config=args.dataset_config)
    schema = schema_of(rows)
    _check_column(args.pass_rate_column, rows.column_names)
    drops = Drops()
    problems = read_problems(rows, schema, drops, args.pass_rate_column)
    source = {"rows": len(rows), "schema": schema, "content": _content(problems)}
    say(f"{len(rows)} rows ({schema}) of {args.dataset_name}")
    problems = without_duplicates(problems, drops)
    index = BenchmarkIndex(benchmarks, n=args.ngram, share=args.ngram_share)
    problems, found = without_benchmarks(problems, index, drops)
    in_benchmarks = {name: {"problems": len(texts), "rows": found[name]} for name, texts in benchmarks.items()}
    problems = in_order(problems, args.seed)
    _check_left(problems, drops, len(rows), 0)
    tokenizer = load_tokenizer(args, problems[:CHECKED_ROWS])
    problems = short_enough(problems, args, tokenizer, drops)
    if args.verify:
        say(f"verifying {len(problems)} solutions with {reward_name(rewards[0])}")
        problems = gradable(problems, rewards[0], args, drops)
    _check_left(problems, drops, len(rows), args.largest + args.num_held_out + (args.num_rl or 1))
    judge = Judge(args, tokenizer, demonstration_of(rows, schema), rewards[0])
    demonstrations, rl, held_out = split(problems, args, judge, drops)
    _check_demonstrations(demonstrations, args, drops)
    _set_pass_rates([problem for problem, _ in demonstrations], args, rewards, known)
    files, difficulty = _files(args, demonstrations, rl, held_out)
    return Output(files, source, in_benchmarks, drops, difficulty)


def say(line: str) -> None:
    print(f"aesl data: {line}", flush=True)


def _check_column(column: str | None, columns: list[str]) -> None:
    if column is not None and column not in columns:
        raise InputError(
            f"pass_rate_column: dataset_name has no column {column!r}{nearest(column, columns)}; its columns are "
            f"{', '.join(columns)}"
        )


def _content(problems: list[Problem]) -> str:
    """A digest of what was read: two sources with the same problems and solutions in the same order share it."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.id} {problem.solution}\n".encode())
    return digest.hexdigest()[:16]


def _check_left(problems: list[Problem], drops: Drops, num_rows: int, needed: int) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in drops.counts().items()) or "none dropped"
    if not problems:
        raise InputError(f"dataset_name: no problem is left of {num_rows} rows ({reasons})")
    if len(problems) < needed:
        raise InputError(
            f"dataset_name: {len(problems)} problems are left of {num_rows} rows ({reasons}), and {needed} are needed "
            "for the largest subset, num_held_out and num_rl (at least 1): lower them"
        )


def _check_demonstrations(demonstrations: list, args: DataArguments, drops: Drops) -> None:
    if len(demonstrations) < args.largest:
        reasons = ", ".join(f"{reason} {count}" for reason, count in drops.counts("sft").items()) or "none dropped"
        raise InputError(
            f"{len(demonstrations)} demonstrations are left ({reasons}), and {args.largest} are asked for: lower "
            "num_demonstrations and subsets, or raise max_length"
        )


# ---- Filters


def without_duplicates(problems: list[Problem], drops: Drops) -> list[Problem]:
    """The first of each normalised text."""
    first: dict[str, Problem] = {}
    for problem in problems:
        kept = first.setdefault(problem.id, problem)
        if kept is not problem:
            drops.add(problem.row, problem.id, "duplicate", f"of row {kept.row}")
    return list(first.values())


def without_benchmarks(
    problems: list[Problem], index: BenchmarkIndex, drops: Drops
) -> tuple[list[Problem], Counter[str]]:
    """Problems that are in no benchmark, and how many were in each."""
    kept, found = [], Counter()
    for problem in problems:
        overlap = index.find(problem.text)
        if overlap is None:
            kept.append(problem)
        else:
            detail = f"{overlap.benchmark}, problem {overlap.index}: {overlap.words}"
            drops.add(problem.row, problem.id, "in_benchmark", detail)
            found[overlap.benchmark] += 1
    return kept, found


def in_order(problems: list[Problem], seed: int) -> list[Problem]:
    """By a hash of seed and text: whatever else is there, two problems keep their order."""
    return sorted(problems, key=lambda problem: hashlib.sha256(f"{seed} {problem.id}".encode()).digest())


def load_tokenizer(args: DataArguments, problems: list[Problem]) -> Any:
    """The model's tokenizer, refused where it cannot write these prompts."""
    from transformers import AutoTokenizer

    name, trust = args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    try:
        check_tokenizer(
            name, name, [{"prompt": prompt_of(p, args)} for p in problems], field="model_name_or_path", **trust
        )
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"model_name_or_path: {name} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    return AutoTokenizer.from_pretrained(name, **trust)


def short_enough(problems: list[Problem], args: DataArguments, tokenizer: Any, drops: Drops) -> list[Problem]:
    if args.max_prompt_length is None:
        return problems
    kept = []
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        texts = [
            tokenizer.apply_chat_template(prompt_of(problem, args), tokenize=False, add_generation_prompt=True)
            for problem in batch
        ]
        for problem, tokens in zip(batch, num_tokens(tokenizer, texts), strict=True):
            if tokens <= args.max_prompt_length:
                kept.append(problem)
            else:
                drops.add(problem.row, problem.id, "prompt_too_long", f"{tokens} tokens")
    return kept


def split(
    problems: list[Problem], args: DataArguments, judge: Callable[[list[Problem]], list], drops: Drops
) -> tuple[list[tuple[Problem, str]], list[Problem], list[Problem]]:
    """Demonstrations from the front, held-out problems from the end, RL's from between; no problem is in two."""
    problems, held_out = problems[: -args.num_held_out], problems[-args.num_held_out :]
    demonstrations = take(problems, args.largest, judge, drops, say)
    chosen = {problem.id for problem, _ in demonstrations}
    return demonstrations, [problem for problem in problems if problem.id not in chosen][: args.num_rl], held_out


# ---- Difficulty, and the rows


def _set_pass_rates(problems: list[Problem], args: DataArguments, rewards: list, known: dict[str, float]) -> None:
    """Fill `pass_rate` from the file or by sampling; a column's were read with the problems."""
    if args.pass_rate_samples:
        accelerator, backend, why = pass_rate_engine(args)
        say(f"pass rates: sampled by {backend} ({why})")
        prompts = [{"prompt": prompt_of(problem, args), "solution": problem.solution} for problem in problems]
        known = sample_rates(
            problems,
            prompts,
            Path(args.output_dir) / PASS_RATES,
            _sampling(args, rewards, backend),
            rewards[:1],
            accelerator=accelerator,
            batch_size=args.batch_size,
            max_model_len=args.max_prompt_length and args.max_prompt_length + args.max_new_tokens,
            trust_remote_code=args.trust_remote_code,
            say=say,
        )
    if not args.pass_rate_column:
        for problem in problems:
            problem.pass_rate = known.get(problem.id)
    if args.has_pass_rates and all(problem.pass_rate is None for problem in problems):
        raise InputError(
            f"no pass rate is known for any of the {len(problems)} demonstrations: those given are of others"
        )


def pass_rate_engine(args: DataArguments) -> tuple:
    """What samples pass rates: an accelerator, the backend, and why that one."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.use_cpu)
    return accelerator, *choose_engine(args.backend, accelerator)


def _sampling(args: DataArguments, rewards: list, backend: str) -> Sampling:
    return Sampling(
        model=args.model_name_or_path,
        samples=args.pass_rate_samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        success_threshold=args.success_threshold,
        reward=reward_name(rewards[0]),
        backend=backend,
    )


def _files(args: DataArguments, demonstrations: list, rl: list, held_out: list) -> tuple[dict, dict[str, int]]:
    """The rows of each file, and the number of demonstrations of each difficulty."""
    sft = [_row(problem, args, text) for problem, text in demonstrations]
    files = {"sft.jsonl": sft[: args.num_demonstrations]}
    files |= {f"sft_{size}.jsonl": sft[:size] for size in sorted(args.subsets or [])}
    files |= {RL: [_row(problem, args) for problem in rl], HELD_OUT: [_row(problem, args) for problem in held_out]}
    if not args.has_pass_rates:
        return files, {}
    difficulties = [difficulty_of(problem.pass_rate, args.difficulty_bounds) for problem, _ in demonstrations]
    counts = {name: difficulties.count(name) for name in (*DIFFICULTIES, "unknown")}
    return files | _splits(sft, difficulties, counts, args.difficulty_size), counts


def _splits(sft: list[dict], difficulties: list[str], counts: dict[str, int], size: int | None) -> dict[str, list]:
    few = next((name for name in DIFFICULTIES if size and counts[name] < size), None)
    if few:
        raise InputError(
            f"difficulty_size is {size}, but {few} has {counts[few]} of {counts}: lower it, or enlarge subsets"
        )
    rows = {name: [row for row, own in zip(sft, difficulties, strict=True) if own == name] for name in DIFFICULTIES}
    return {f"sft_{name}.jsonl": rows[name][:size] for name in DIFFICULTIES if rows[name]}


def _row(problem: Problem, args: DataArguments, demonstration: str | None = None) -> dict:
    row = {"id": problem.id, "prompt": prompt_of(problem, args), "solution": problem.solution}
    if demonstration is None:
        return row
    row["completion"] = [{"role": "assistant", "content": demonstration}]
    return row | ({"pass_rate": problem.pass_rate} if args.has_pass_rates else {})


if __name__ == "__main__":
    exit_on_input_error("aesl data", main)
