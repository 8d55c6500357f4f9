"""Grade gold answers against themselves: the share that no answer can earn, by reward.

    python scripts/grade_golds.py golds.jsonl --column gold

Each gold is put into a completion as `So \\boxed{GOLD}.` and graded against the same gold, in a box and bare. No model
can earn a gold that does not earn 1.0 here.
"""

import argparse
import json
from pathlib import Path

from aesl_trl.rewards.grading import SHARED_GRADERS, Answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="JSONL with a gold answer in each row")
    parser.add_argument("--column", default="gold")
    parser.add_argument("--rewards", nargs="+", default=["math_reward", "accuracy_reward"])
    given = parser.parse_args()
    golds = [json.loads(line)[given.column] for line in given.file.read_text(encoding="utf-8").splitlines() if line]
    print("reward | gold | rows | not earned | examples\n--- | --- | ---: | ---: | ---")
    for reward in given.rewards:
        for name, form in (("boxed", r"\boxed{%s}"), ("bare", "%s")):
            answers = [Answer(reward, rf"So \boxed{{{gold}}}.", form % gold) for gold in golds]
            grades = SHARED_GRADERS.grade(answers, 10.0)
            lost = [gold for gold, grade in zip(golds, grades, strict=True) if grade.reward != 1.0]
            print(f"{reward} | {name} | {len(golds)} | {len(lost)} | {'; '.join(lost[:3])}")


if __name__ == "__main__":
    main()
