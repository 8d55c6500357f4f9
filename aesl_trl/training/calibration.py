"""Where AESL begins to act: `t_scaling: auto` begins there, and a line says that a training has not come so far.

A token's weight falls below 1 once the token is the likely one at its temperature, `t_scaling` times the mean nll of
its prefix. Where the loss lies, that temperature is `t_scaling` times `nll_learnt` (token_sums.py). Far above 1 it
makes all tokens alike: every weight is near 1, and AESL is plain nll.
"""

import math
from collections.abc import Iterator
from functools import reduce
from itertools import chain, islice
from operator import add

from transformers import TrainerCallback

from ..errors import InputError, tell
from ..losses.scoring import score_batch
from ..sampling.groups import preserved_random_state
from .config import AUTO
from .run_record import EFFECTIVE, FOUND, renew_record
from .token_sums import TokenSums


TEMPERATURE = 0.9  # where the loss lies: `t_scaling` 3 at an nll of 0.3, that of long solutions under a 7B model
LOWEST, HIGHEST = 0.1, 10.0
STEPS = 8  # whose rows are scored
NLL = 0.95  # a weight_effective above it is plain nll's


def acting_t_scaling(nll_learnt: float) -> float:
    """Return the `t_scaling` at which AESL begins to act: 0.9 / `nll_learnt` (nats), within [0.1, 10]."""
    return min(max(TEMPERATURE / nll_learnt, LOWEST), HIGHEST) if nll_learnt > 0 else HIGHEST


class Calibration(TrainerCallback):
    """Finds the `t_scaling` of an AESLSFTTrainer before step 1 where it is "auto", and says where AESL does not act.

    The rows are those of the first 8 optimiser steps, or of the first epoch where it is shorter. The steps then train
    on the same batches. The value goes to Trainer's log, which each checkpoint holds, and to run.json. Until it is
    found, as in an evaluation before step 1, the loss is plain nll.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._epoch = self._batches = None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.t_scaling == AUTO:  # a resumed training has its value in the log, a new one finds its own
            self._take_token_rule()

    def next_step(self, epoch_iterator: Iterator[dict], num_batches: int) -> Iterator[dict]:
        """Return an iterator of the same batches. Score those of the first steps where no value is found yet."""
        if self.trainer.t_scaling == AUTO:
            steps = min(STEPS, self.trainer.state.max_steps)
            first = list(islice(epoch_iterator, steps * num_batches))
            self._epoch, self._batches = epoch_iterator, chain(first, epoch_iterator)
            if first:
                self._find(first)
        return self._batches if epoch_iterator is self._epoch else epoch_iterator

    def _find(self, batches: list[dict]) -> None:
        trainer = self.trainer
        with preserved_random_state():
            sums = [TokenSums.of_batch(score_batch(trainer, batch), trainer._eos_ids) for batch in batches]
        nll_learnt = reduce(add, sums).over_ranks(trainer.accelerator).nll_learnt
        if not math.isfinite(nll_learnt):
            raise InputError(f"cannot find t_scaling (nll_learnt is {nll_learnt} before step 1): give a number")
        found = acting_t_scaling(nll_learnt)
        trainer.log({FOUND: found})
        renew_record(trainer)
        self._take_token_rule()
        if trainer.accelerator.is_main_process:
            tell(f"aesl_trl: t_scaling auto is {found:.3g} (nll_learnt is {nll_learnt:.3g} before step 1)")

    def _take_token_rule(self) -> None:
        trainer = self.trainer
        trainer.take_token_rule()
        if trainer._token_rule.old_policy and trainer._old_policy is None:  # nll, the first rule, asked for none
            raise InputError(
                f"t_scaling is {AUTO!r}, but create_token_rule returns a rule with old_policy, which must be known "
                "from the start: give a number, such as 3.0"
            )

    def on_log(self, args, state, control, logs, **kwargs):
        """Say so where AESL does not act at a quarter of the steps; a row of the log is about all since the last."""
        if self._is_aesl and state.is_world_process_zero and logs.get(EFFECTIVE, 0) > NLL:
            steps = (row["step"] for row in reversed(state.log_history) if EFFECTIVE in row)
            step, before = next(steps), next(steps, 0)
            if before < state.max_steps / 4 <= step:
                figure = f"weight_effective is {logs[EFFECTIVE]:.2f} at step {step}"
                tell(f"aesl_trl: AESL is not acting yet: {figure}{self._begins_at(logs)}")

    def on_train_end(self, args, state, control, **kwargs):
        self._epoch = self._batches = None  # they hold the data loader's workers and batches
        rows = [row for row in state.log_history if EFFECTIVE in row]
        renew_record(self.trainer)
        if rows and self._is_aesl and state.is_world_process_zero and all(row[EFFECTIVE] > NLL for row in rows):
            figure = f"weight_effective stayed above {NLL}"
            tell(f"aesl_trl: AESL has not acted: this was nll ({figure}){self._begins_at(rows[-1])}")

    @property
    def _is_aesl(self) -> bool:
        """Whether the loss is AESL with a prefix, and not an ablation or a loss of the user's own."""
        args, rule = self.trainer.args, self.trainer._token_rule
        return args.cold_start_loss == "aesl" and args.prefix_mode != "none" and rule.temperatures is not None

    def _begins_at(self, row: dict) -> str:
        begin = acting_t_scaling(row["nll_learnt"])
        is_lower = self.trainer.args.prefix_mode == "inclusive" and begin < self.trainer.t_scaling
        return f"; at this nll it begins at t_scaling {begin:.2g}" if is_lower else ""
