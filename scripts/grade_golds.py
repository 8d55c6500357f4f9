"""Grade gold answers against themselves: the share that no answer can earn, by reward.

    python scripts/grade_golds.py golds.jsonl --column gold

Each gold is given as the answer and graded against the same gold, in a box and bare. No model can earn a gold that
does not earn 1.0 here.
"""

import argparse
import json
from pathlib import Path

from aesl_trl.rewards.functions import load_reward_funcs
from aesl_trl.rewards.golds import lost_golds


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
            (function,) = load_reward_funcs([reward])
            lost = lost_golds(function, [form % gold for gold in golds])
            print(f"{reward} | {name} | {len(golds)} | {len(lost)} | {'; '.join(lost[:3])}")


if __name__ == "__main__":
    main()
