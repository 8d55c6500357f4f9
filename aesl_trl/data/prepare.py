"""`aesl data --config data.yaml`: OpenR1-Math-46k or GSM8K -> sft.jsonl, rl.jsonl and held_out.jsonl, disjoint.

`prepare` tells the story: read problems, drop duplicates and problems of benchmarks, put the rest into the order of
the seed, and drop what is too long or cannot be graded. Then the first problems give the demonstrations, the last are
held out for measuring diversity, and RL has the rest. The order is by a hash of seed and problem, so a subset holds
every smaller one, and a problem that is dropped moves no other.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import parse
from ..errors import InputError, exit_on_input_error, in_one_line, nearest, tell
from ..models.chat import ChatWriter
from ..models.folder import ModelFolder
from ..models.loading import CHECKED_ROWS, check_model, check_tokenizer
from ..processes import lock
from ..rewards.functions import check_columns, load_reward_funcs, reward_name
from .config import DIFFICULTIES, DataArguments
from .decontaminate import BenchmarkIndex, load_benchmark_problems
from .demonstrations import Judge, choose_demonstrations, count_tokens, keep_gradable
from .output import HELD_OUT, LOCK, RL, SFT, Output, check_output, progress, write
from .pass_rates import choose_sampler, rates_in_file, sample_rates
from .problems import BATCH, Drops, Problem, demonstration_of, listed, read_problems, schema_of
from .rendered import template_problem
from .rows import load_rows


ARGUMENT_TYPES = (DataArguments,)


def main(argv: list[str] | None = None) -> None:
    """Write the files of `output_dir`, or say that they are there already."""
    (args,) = parse(ARGUMENT_TYPES, sys.argv[1:] if argv is None else argv, prog="aesl data")
    for name in ("dataset_name", "output_dir", "model_name_or_path"):
        if not getattr(args, name):
            raise InputError(f"{name} is missing")
    check_output(args)
    rewards = load_reward_funcs(args.reward_funcs)
    check_columns(rewards, ("prompt", "solution"), where="reward_funcs", absent=("completion_ids",))
    if args.pass_rate_samples:
        check_model(args.model_name_or_path, "model_name_or_path", trust_remote_code=args.trust_remote_code)
        choose_sampler(args)
    benchmarks = {name: load_benchmark_problems(name) for name in args.decontaminate or []}
    known_rates = rates_in_file(args.pass_rate_file) if args.pass_rate_file else {}
    with lock(Path(args.output_dir) / LOCK, f"another aesl data is at work in {args.output_dir}"):
        output = prepare(args, rewards[0], benchmarks, known_rates)
        for line in write(output, args):
            tell(line)
        sft, rl = (Path(args.output_dir) / name for name in (SFT, RL))
        tell(f"next: dataset_name: {sft} in aesl sft's config, {rl} in aesl grpo's")


def prepare(
    args: DataArguments, reward: Callable, benchmarks: dict[str, list[str]], known_rates: dict[str, float]
) -> Output:
    """Return the rows of every file, and the counts of the rows that were dropped."""
    rows = load_rows(args.dataset_name, split=args.dataset_split, config=args.dataset_config)
    schema = schema_of(rows)
    column, columns = args.pass_rate_column, rows.column_names
    if column is not None and column not in columns:
        raise InputError(
            f"pass_rate_column: dataset_name has no column {column!r}{nearest(column, columns)}; its columns are "
            f"{', '.join(columns)}"
        )
    drops = Drops()
    problems = read_problems(rows, schema, drops, column)
    # Two sources that hold the same problems and solutions in the same order share this digest
    digest = hashlib.sha256("".join(f"{problem.id} {problem.solution}\n" for problem in problems).encode())
    source = {"rows": len(rows), "schema": schema, "content": digest.hexdigest()[:16]}
    progress(f"{len(rows)} rows ({schema}) of {args.dataset_name}")
    problems = without_duplicates(problems, drops)
    index = BenchmarkIndex(benchmarks, n=args.ngram, share=args.ngram_share)
    problems, found = without_benchmarks(problems, index, drops)
    in_benchmarks = {name: {"problems": len(texts), "rows": found[name]} for name, texts in benchmarks.items()}
    problems = in_order(problems, args.seed)
    _check_enough(problems, drops, len(rows), 0)
    tokenizer = load_tokenizer(args, problems[:CHECKED_ROWS])
    problems = short_enough(problems, args, tokenizer, drops)
    if args.verify:
        progress(f"verifying {len(problems)} solutions with {reward_name(reward)}")
        problems = keep_gradable(problems, reward, args.success_threshold, drops)
    _check_enough(problems, drops, len(rows), args.largest + args.num_held_out + (args.num_rl or 1))
    judge = Judge(args, tokenizer, demonstration_of(rows, schema), reward)
    demonstrations, rl, held_out = split(problems, args, judge, drops)
    if len(demonstrations) < args.largest:
        raise InputError(
            f"{len(demonstrations)} demonstrations are left ({listed(drops.counts('sft'), 'none dropped')}), and "
            f"{args.largest} are asked for: lower num_demonstrations and subsets, or raise max_length"
        )
    _set_pass_rates([problem for problem, _ in demonstrations], args, reward, known_rates)
    files, difficulty = _files(args, demonstrations, rl, held_out)
    return Output(files, source, in_benchmarks, drops, difficulty)


def _check_enough(problems: list[Problem], drops: Drops, num_rows: int, needed: int) -> None:
    reasons = listed(drops.counts(), "none dropped")
    if not problems:
        raise InputError(f"dataset_name: no problem is left of {num_rows} rows ({reasons})")
    if len(problems) < needed:
        raise InputError(
            f"dataset_name: {len(problems)} problems are left of {num_rows} rows ({reasons}), and {needed} are needed "
            "for the largest subset, num_held_out and num_rl (at least 1): lower them"
        )


def without_duplicates(problems: list[Problem], drops: Drops) -> list[Problem]:
    """Return the first problem of each normalised text."""
    first: dict[str, Problem] = {}
    for problem in problems:
        kept = first.setdefault(problem.id, problem)
        if kept is not problem:
            drops.add(problem.row, problem.id, "duplicate", f"of row {kept.row}")
    return list(first.values())


def without_benchmarks(
    problems: list[Problem], index: BenchmarkIndex, drops: Drops
) -> tuple[list[Problem], Counter[str]]:
    """Return the problems that are in no benchmark, and the number of problems found in each benchmark."""
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
    """Sort by a hash of seed and text, so that two problems keep their order whatever the other problems are."""
    return sorted(problems, key=lambda problem: hashlib.sha256(f"{seed} {problem.id}".encode()).digest())


def load_tokenizer(args: DataArguments, problems: list[Problem]) -> Any:
    """Load the model's tokenizer; refuse one that cannot write the prompts of `problems`."""
    from transformers import AutoTokenizer

    name, trust = args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    prompts = [{"prompt": args.prompt_of(problem)} for problem in problems]
    try:
        check_tokenizer(ModelFolder(name), prompts, field="model_name_or_path", **trust)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"model_name_or_path: {name} cannot be loaded: {in_one_line(error)}") from None
    return AutoTokenizer.from_pretrained(name, **trust)


def short_enough(problems: list[Problem], args: DataArguments, tokenizer: Any, drops: Drops) -> list[Problem]:
    """Return the problems whose prompt, written by the chat template, has at most `max_prompt_length` tokens.

    A prompt that the template cannot write is refused.
    """
    writer = ChatWriter(tokenizer)
    for problem in problems:
        if spoilt := template_problem({"prompt": args.prompt_of(problem)}, writer):
            raise InputError(f"dataset_name, row {problem.row} (from 0): {spoilt}")
    if args.max_prompt_length is None:
        return problems
    kept = []
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        prompts = [args.prompt_of(problem) for problem in batch]
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
        for problem, tokens in zip(batch, count_tokens(tokenizer, texts), strict=True):
            if tokens <= args.max_prompt_length:
                kept.append(problem)
            else:
                drops.add(problem.row, problem.id, "prompt_too_long", f"{tokens} tokens")
    return kept


def split(
    problems: list[Problem], args: DataArguments, judge: Callable[[list[Problem]], list], drops: Drops
) -> tuple[list[tuple[Problem, str]], list[Problem], list[Problem]]:
    """Return demonstrations from the front, RL's problems behind them and held-out problems from the end, disjoint."""
    problems, held_out = problems[: -args.num_held_out], problems[-args.num_held_out :]
    demonstrations = choose_demonstrations(problems, args.largest, judge, drops)
    chosen = {problem.id for problem, _ in demonstrations}
    return demonstrations, [problem for problem in problems if problem.id not in chosen][: args.num_rl], held_out


def _set_pass_rates(problems: list[Problem], args: DataArguments, reward: Callable, known: dict[str, float]) -> None:
    """Fill `pass_rate` by sampling, else from the `known` rates; those of a column were read with the problems."""
    if args.pass_rate_samples:
        known = sample_rates(problems, args, reward)
    if not args.pass_rate_column:
        for problem in problems:
            problem.pass_rate = known.get(problem.id)
    if args.has_pass_rates and all(problem.pass_rate is None for problem in problems):
        raise InputError(
            f"no pass rate is known for any of the {len(problems)} demonstrations: the given rates are of other "
            "problems"
        )


def _files(args: DataArguments, demonstrations: list, rl: list, held_out: list) -> tuple[dict, dict[str, int]]:
    """Return the rows of each file, and the number of demonstrations of each difficulty."""
    sft = [_row(problem, args, text) for problem, text in demonstrations]
    files = {SFT: sft[: args.num_demonstrations]}
    files |= {f"sft_{size}.jsonl": sft[:size] for size in sorted(args.subsets or [])}
    files |= {RL: [_row(problem, args) for problem in rl], HELD_OUT: [_row(problem, args) for problem in held_out]}
    if not args.has_pass_rates:
        return files, {}
    rows = {name: [] for name in (*DIFFICULTIES, "unknown")}
    for row in sft:
        rows[args.difficulty_of(row["pass_rate"])].append(row)
    counts = {name: len(rows[name]) for name in rows}
    size = args.difficulty_size
    few = next((name for name in DIFFICULTIES if size and counts[name] < size), None)
    if few:
        raise InputError(
            f"difficulty_size is {size}, but {few} has {counts[few]} of {counts}: lower it, or enlarge subsets"
        )
    files |= {f"sft_{name}.jsonl": rows[name][:size] for name in DIFFICULTIES if rows[name]}
    return files, counts


def _row(problem: Problem, args: DataArguments, demonstration: str | None = None) -> dict:
    row = {"id": problem.id, "prompt": args.prompt_of(problem), "solution": problem.solution}
    if demonstration is not None:
        row["completion"] = [{"role": "assistant", "content": demonstration}]
        row |= {"pass_rate": problem.pass_rate} if args.has_pass_rates else {}
    return row


if __name__ == "__main__":
    exit_on_input_error("aesl data", main)
