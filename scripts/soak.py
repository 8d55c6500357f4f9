"""Kill small chains at random moments, and see that each ends as an undisturbed one, bit for bit.

    python scripts/soak.py --kills 200 --seed 0 --output_dir soak

Each kind of kill comes in turn: the chain's own process, accelerate's launcher, a training process, all of a stage, a
grading process, a disk that takes no more. A chain is started again after every kill until it has had a few; then it
is left alone. Every weight, JSON and JSONL file is compared with those of a chain that was never touched, and what is
still running counts as orphans.

OUTPUT_DIR/soak.json holds every kill and chain so far: the same command goes on from there. The exit code is 1 where a
chain was not equal or left an orphan. The chains are those of the tests, so this runs in a checkout.
"""

import argparse
import json
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from aesl_trl import files
from aesl_trl.evaluation.figures import aligned
from aesl_trl.processes import MARK, end_processes
from aesl_trl.training.checkpoints import last_whole_checkpoint, step_of


sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
from crash_runs import chained, contents, crash_project  # noqa: E402


KILLS_A_CHAIN = 5
BARREN = 2  # kills in a row that may come before any progress; the next one waits for it
STEP_S = 0.3  # that each training step takes longer: most of a small chain is imports
CHECK_S = 10.0  # that a chain takes before its first stage
LOOK_S = 0.3
WAIT_S = 1200  # for a chain to end
FULL_AT = (0, 1_000, 30_000, 60_000)  # bytes beyond which no file grows once the disk is full


# ---- What is struck


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return all that the process has started, those by which it was started before what they have started."""
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def running(chain: psutil.Process, *modules: str) -> list[psutil.Process]:
    """Return those of the chain's processes that run one of `modules`; a launcher only runs what stands first."""
    found = []
    for process in family(chain):
        with suppress(psutil.Error):
            words = process.cmdline()
            if "-m" in words and words[words.index("-m") + 1] in modules:
                found.append(process)
    return found


def stage_of(chain: psutil.Process) -> list[psutil.Process]:
    return [process for child in family(chain)[:1] for process in (child, *family(child))]


def writers(chain: psutil.Process) -> list[psutil.Process]:
    """Return all processes but the grading ones, which may not write anyway."""
    graders = running(chain, GRADER)
    return [chain, *(process for process in family(chain) if process not in graders)]


GRADER = "aesl_trl.rewards.grading"
TARGETS = {
    "parent": lambda chain: [chain],
    "launcher": lambda chain: running(chain, "accelerate.commands.launch"),
    "rank": lambda chain: running(chain, "aesl_trl.sft", "aesl_trl.grpo"),
    "stage": stage_of,
    "grader": lambda chain: running(chain, GRADER),
    "full disk": writers,
}


def strike(kind: str, targets: list[psutil.Process], chance: random.Random) -> None:
    """Kill one of `targets`, or all of a stage, or let the disk be full for all. What has just ended is let go."""
    full = (chance.choice(FULL_AT), resource.RLIM_INFINITY)
    for process in targets if kind in ("stage", "full disk") else [chance.choice(targets)]:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if kind == "full disk":
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, full)
            else:
                process.kill()


# ---- How far a chain is


def stages_done(run: Path) -> list[str]:
    with suppress(Exception):  # it is not there yet
        stages = files.read_json(run / files.CHAIN)["stages"]
        return [name for name, facts in stages.items() if facts["status"] == "done"]
    return []


def progress(run: Path) -> list[int]:
    """Return the number of stages that are done, and the steps that SFT and RL would go on from."""
    newest = [last_whole_checkpoint(run / name)[0] for name in ("sft", files.GRPO_DIR)]
    return [len(stages_done(run)), *(step_of(path) if path else 0 for path in newest)]


def seconds_left(run: Path, whole: Path, until: str) -> float:
    """Return how long the chain would go on from here to the end of stage `until`, by the undisturbed one's stages."""
    done, stages = stages_done(run), files.read_json(whole / files.CHAIN)["stages"]
    ahead = list(stages)[: list(stages).index(until) + 1]
    return CHECK_S + sum(stages[name]["seconds"] for name in ahead if name not in done)


# ---- One chain after the other


class Soak:
    """The kills and chains of a folder, and the record from which another call goes on."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.whole = folder / "whole"
        self.record = files.read_object(folder / "soak.json") or {
            "seed": seed,
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
            "kills": [],
            "chains": [],
        }
        if self.record["seed"] != seed:
            sys.exit(f"{folder} was begun with --seed {self.record['seed']}: go on with it, or name another folder")

    def save(self) -> None:
        files.write_json(self.folder / "soak.json", self.record)

    def prepare(self) -> None:
        """Make the project and the undisturbed chain. End what a killed soak left at work."""
        end_processes(str(self.folder))
        project = self.folder / "project"
        if not (project / "chain.yaml").exists():
            from tiny_models import build_tokenizer, save_model

            shutil.rmtree(project, ignore_errors=True)
            project.mkdir(parents=True)
            crash_project(project, save_model(build_tokenizer(), self.folder / "model").absolute())
        process = self.start(self.whole)
        if process.wait(WAIT_S) != 0:
            sys.exit(f"the undisturbed chain failed; its log is {self.log(self.whole)}")

    def log(self, run: Path) -> Path:
        return run.with_name(f"{run.name}.log")

    def start(self, run: Path) -> subprocess.Popen:
        with open(self.log(run), "ab") as log:
            config, env = self.folder / "project/chain.yaml", {MARK: str(self.folder)}
            return chained(config, run, STEP_S, stdout=log, env=env, text=False)

    @property
    def struck(self) -> list[dict]:
        """The kills of the chain that has not ended yet."""
        return [kill for kill in self.record["kills"] if kill["chain"] == len(self.record["chains"])]

    def go_on(self, kills: int) -> None:
        """Strike chains until there were `kills` kills, and the last chain has ended."""
        while len(self.record["kills"]) < kills or self.struck:
            number = len(self.record["chains"])
            run, most = (
                self.folder / f"chain-{number}",
                random.Random(f"{self.seed} {number}").randint(2, KILLS_A_CHAIN),
            )
            code = None
            while code != 0:
                process, before = self.start(run), len(self.struck)
                while len(self.struck) < most and len(self.record["kills"]) < kills and self.strike_once(process, run):
                    print(f"kill {len(self.record['kills'])} of {kills}: {json.dumps(self.struck[-1])}", flush=True)
                    if process.poll() is not None:
                        break
                code = process.wait(WAIT_S)
                if code != 0 and len(self.struck) == before:
                    sys.exit(f"{run} failed with exit code {code}, unstruck; its log is {self.log(run)}")
            self.close(run)

    def strike_once(self, process: subprocess.Popen, run: Path) -> bool:
        """Strike at a random moment, and wait for what that ends. Return False where the chain ended first."""
        number = len(self.record["kills"])
        kind = list(TARGETS)[number % len(TARGETS)]
        chance = random.Random(f"{self.seed} kill {number}, chain {len(self.record['chains'])}")
        before = [kill["progress"] for kill in self.struck[-BARREN:]]
        is_barren = len(before) == BARREN and before[0] == before[-1]
        chain, began = psutil.Process(process.pid), time.monotonic()
        # RL is the last stage that has a launcher, a rank and a grader
        until = "grpo" if kind in ("launcher", "rank", "grader") else "report"
        moment = chance.uniform(0, seconds_left(run, self.whole, until))
        while process.poll() is None:
            if time.monotonic() - began > WAIT_S:
                sys.exit(f"{run} stands still; its log is {self.log(run)}")
            if is_barren and progress(run) == before[-1]:
                began = time.monotonic()  # the moment counts from the next progress
            elif time.monotonic() - began >= moment and (targets := TARGETS[kind](chain)):
                facts = {"chain": len(self.record["chains"]), "kind": kind, "progress": progress(run)}
                strike(kind, targets, chance)
                if kind != "grader":  # which the training survives
                    process.wait(WAIT_S)
                self.record["kills"].append({**facts, "code": process.poll()})
                self.save()
                return True
            time.sleep(LOOK_S)
        return False

    def close(self, run: Path) -> None:
        """Compare a chain that has ended with the undisturbed one, and count what it left at work."""
        places = [self.folder, run, *(path for path in run.iterdir() if path.is_dir())]
        orphans = sum(len(end_processes(str(place))) for place in places)
        found, expected = contents(run), contents(self.whole)
        names = sorted({*found, *expected})
        differs = [name for name in names if found.get(name, "missing") != expected.get(name, "missing")]
        print(f"{run.name}: {len(self.struck)} kills, {len(differs)} files differ, {orphans} orphans", flush=True)
        self.record["chains"].append({"kills": len(self.struck), "differs": differs, "orphans": orphans})
        self.record["ended"] = datetime.now(UTC).isoformat("T", "seconds")
        self.save()
        if not differs:
            shutil.rmtree(run)
            self.log(run).unlink()


def table(record: dict) -> str:
    """Lay out the kills of each kind, the chains that had one, how many ended equal, and the orphans they left."""
    rows, chains = [("kind", "kills", "chains", "equal", "orphans")], record["chains"]
    for kind in (*TARGETS, "all"):
        kills = [kill for kill in record["kills"] if kind in (kill["kind"], "all")]
        ended = [chains[number] for number in {kill["chain"] for kill in kills} if number < len(chains)]
        equal = sum(not chain["differs"] for chain in ended)
        counts = (len(kills), len(ended), equal, sum(chain["orphans"] for chain in ended))
        rows.append((kind, *map(str, counts)))
    return aligned(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, those of an earlier call included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("soak"))
    args = parser.parse_args(argv)
    soak = Soak(args.output_dir.absolute(), args.seed)
    soak.prepare()
    soak.go_on(args.kills)
    print(table(soak.record))
    return int(any(chain["differs"] or chain["orphans"] for chain in soak.record["chains"]))


if __name__ == "__main__":
    sys.exit(main())
