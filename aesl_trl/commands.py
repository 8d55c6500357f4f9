"""What each command of `aesl` is for, how it is called, and what it cannot do without. Nothing is imported for it."""

from dataclasses import dataclass


CONFIG_FLAG = "--config"
CONFIG = "CONFIG.yaml"  # how a usage line shows the config
RUN = "RUN"  # the positional of a run's folder
EXITS = (
    "0  done",
    "1  the disk takes no more, or an error of the program, which has a traceback",
    "2  the input cannot be used, and nothing was changed",
)
TRAINING_EXITS = (
    *EXITS,
    "3  the training ended before its last step",
    "130, 143  Ctrl-C or SIGTERM ended it; `--resume_from_checkpoint true` goes on",
)
CHAIN_EXITS = (
    *EXITS,
    "3  a training ended before its last step, or the start is not ready for RL",
    "130, 143  Ctrl-C or SIGTERM ended it; the same command goes on",
    "otherwise that of the stage that failed",
)
MODEL = "model_name_or_path"
REWARD = ("reward_funcs", "reward_model_name_or_path")


@dataclass(frozen=True)
class Command:
    """A command: the module that holds its `main`, its texts, its positionals, and the settings that it needs.

    `names` are the positionals beside the config; one that ends with `...` may be given several times. Each of `needs`
    lists the settings of which one must be given, and each of `instead` the settings that stand for the positionals.
    """

    module: str
    line: str
    usage: str
    examples: tuple[str, ...]
    names: tuple[str, ...] = ()
    needs: tuple[tuple[str, ...], ...] = ()
    instead: tuple[str, ...] = ()
    reads_config: bool = True
    more: str = ""
    exits: tuple[str, ...] = EXITS

    @property
    def description(self) -> str:
        """The first lines of its help."""
        return f"{self.line[0].upper()}{self.line[1:]}." + (f"\n{self.more}" if self.more else "")

    @property
    def epilog(self) -> str:
        """The last lines of its help."""
        return "\n  ".join(["examples:", *self.examples]) + "\n\n" + "\n  ".join(["exit codes:", *self.exits])


COMMANDS = {
    "data": Command(
        module="data.prepare",
        line="write demonstrations, RL prompts and held-out prompts from a dataset",
        usage=f"[{CONFIG}] [--FLAG VALUE ...]",
        examples=(
            "aesl data data.yaml",
            "aesl data --dataset_name openai/gsm8k --dataset_config main --model_name_or_path "
            "Qwen/Qwen2.5-1.5B-Instruct --output_dir data",
        ),
        needs=(("dataset_name",), ("output_dir",), (MODEL,)),
        more="The files are sft.jsonl, rl.jsonl and held_out.jsonl. They share no problem.",
    ),
    "sft": Command(
        module="sft",
        line="train the cold start, in this process",
        usage=f"[{CONFIG}] [--FLAG VALUE ...]",
        examples=("aesl sft sft.yaml", "accelerate launch --num_processes 8 -m aesl_trl.sft sft.yaml --seed 1"),
        needs=((MODEL,), ("dataset_name",)),
        more="Every flag of TRL's SFTConfig, ModelConfig and ScriptArguments works too.",
        exits=TRAINING_EXITS,
    ),
    "grpo": Command(
        module="grpo",
        line="train with RL from it, in this process",
        usage=f"[{CONFIG}] [--FLAG VALUE ...]",
        examples=(
            "aesl grpo grpo.yaml",
            "aesl grpo grpo.yaml --model_name_or_path runs/x/handoff --output_dir runs/x/grpo",
        ),
        needs=((MODEL, "adapter_name_or_path"), ("dataset_name",), REWARD),
        more="Every flag of TRL's GRPOConfig, ModelConfig and GRPOScriptArguments works too.",
        exits=TRAINING_EXITS,
    ),
    "chain": Command(
        module="chain.chain",
        line="run the whole story: sft, select, handoff, probe, grpo, eval, report",
        usage=f"{CONFIG} [--output_dir DIR] [--seed N] [--dry_run]",
        examples=("aesl chain chain.yaml --dry_run", "aesl chain chain.yaml --seed 1"),
        needs=(("config",),),
        more="Each stage is a process of its own. Run it again after a kill: it goes on where it was.",
        exits=CHAIN_EXITS,
    ),
    "select": Command(
        module="diversity.selection",
        line="choose the checkpoint of a cold start that goes to RL",
        usage="RUN [--rule RULE | --step N] [--FLAG VALUE ...]",
        examples=("aesl select runs/x", "aesl select runs/x --rule turning_point"),
        names=(RUN,),
        reads_config=False,
        more="Writes selection.json and selected/.",
    ),
    "handoff": Command(
        module="models.handoff",
        line="make the folder that RL starts from, and check it",
        usage=f"RUN [{CONFIG}] [--FLAG VALUE ...]",
        examples=("aesl handoff runs/x", "aesl handoff runs/x --mode continue --output_dir runs/x/adapter"),
        names=(RUN,),
        instead=("run",),
    ),
    "mix": Command(
        module="evaluation.mix",
        line="average a cold start's checkpoint with its base (WiSE-FT), as candidates for RL",
        usage=f"RUN {CONFIG} [--FLAG VALUE ...]",
        examples=("aesl mix runs/x sft.yaml", "aesl mix runs/x sft.yaml --weights 0.5 0.7 --step 100"),
        names=(RUN,),
        needs=(("dataset_name",), ("diversity_steps",)),
        more="The config is that of the run's SFT.",
    ),
    "probe": Command(
        module="evaluation.probe",
        line="judge whether a checkpoint is ready for RL, with reasons",
        usage=f"CHECKPOINT... [{CONFIG}] [--FLAG VALUE ...]",
        examples=("aesl probe runs/x/selected grpo.yaml", "aesl probe runs/x grpo.yaml --reference base"),
        names=("CHECKPOINT...",),
        needs=(("dataset_name",), REWARD),
        more="A run's folder stands for all its candidates. The config is GRPO's, and may have the keys below.",
    ),
    "eval": Command(
        module="evaluation.evaluate",
        line="measure pass@k and diversity before and after RL",
        usage=f"MODEL... [{CONFIG}] [--FLAG VALUE ...]",
        examples=(
            "aesl eval runs/x/handoff runs/x/grpo eval.yaml",
            "aesl eval Qwen/Qwen2.5-1.5B-Instruct --benchmarks GSM8K",
        ),
        names=("MODEL...",),
        needs=(("dataset_name", "benchmarks"),),
        instead=("start", "final"),
    ),
    "interpolate": Command(
        module="models.interpolate",
        line="average two checkpoints of one run (WiSE-FT)",
        usage=f"A B [{CONFIG}] --output_dir DIR [--weight W]",
        examples=(
            "aesl interpolate runs/x/_aesl/candidates/step-50 runs/x/_aesl/candidates/step-200 --output_dir half",
            "aesl interpolate early late --weight 0.7 --output_dir late-0.7",
        ),
        names=("A", "B"),
        needs=(("output_dir",),),
        instead=("first", "second"),
        more="It writes (1 - W) A + W B.",
    ),
    "compare": Command(
        module="compare.compare",
        line="run methods x seeds from cold start to RL: table with intervals, tuning, plots",
        usage=f"{CONFIG} [--output_dir DIR] [--workers N] [--methods ...] [--seeds ...] [--dry_run | --table_only]",
        examples=("aesl compare compare.yaml --dry_run", "aesl compare compare.yaml --methods nll aesl --seeds 0 1"),
        needs=(("config",),),
        more="Run it again after a kill: it goes on where it was.",
        exits=(EXITS[0], "1  a cell failed, the disk takes no more, or an error of the program", EXITS[2]),
    ),
    "report": Command(
        module="report.report",
        line="write a run's figures as HTML, PNG and markdown",
        usage="RUN... [--compare RUN ...] [--output_dir DIR] [--title TITLE]",
        examples=("aesl report runs/x", "aesl report runs/aesl/seed-0 runs/aesl/seed-1 --compare runs/nll/seed-*"),
        names=("RUN...",),
        reads_config=False,
    ),
    "recipes": Command(
        module="recipes.recipes",
        line="list the recipes, copy them to a folder of your own, or check them",
        usage="list [NAME] | copy [NAME ...] [DIR] | check [FOLDER or FILE ...] [--gpus N] [--brief]",
        examples=("aesl recipes copy skills-tiny", "aesl recipes check recipes/Qwen2.5-1.5B-Instruct --brief"),
        reads_config=False,
    ),
    "env": Command(
        module="environment",
        line="print what a bug report needs: versions, platform, GPU, extras",
        usage="",
        examples=("aesl env", "aesl env > env.txt"),
        reads_config=False,
    ),
}


def command_of(prog: str) -> Command | None:
    """Return the command that runs under the name `prog`, such as `aesl sft`; None for another program."""
    return COMMANDS.get(prog.removeprefix("aesl "))
