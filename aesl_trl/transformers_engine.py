"""Answers of a model or an adapter by `model.generate`, one piece of an evaluation at a time."""

from pathlib import Path

from .diversity.figures import Group
from .eval_samples import Piece, draw_seed
from .models.folder import ADAPTER_CONFIG, TOKENIZER_CONFIG, base_of
from .models.loading import load_model, put_adapter, release_memory
from .models.tokens import stop_at_turn_end
from .sampling import sample_groups


class TransformersEngine:
    """A loaded model; `close` frees its memory.

    Args:
        path: a folder or a name on the hub; an adapter comes on the base that it names.
        args: [`~evaluate.EvalArguments`].
        accelerator: splits the problems of a piece over its processes.
    """

    name = "transformers"

    def __init__(self, path: str, args, accelerator):
        self._args, self._accelerator = args, accelerator
        self._model, self._tokenizer = load(path, str(accelerator.device), trust_remote_code=args.trust_remote_code)

    def draw(self, rows: list[dict], piece: Piece) -> list[Group]:
        """The groups of `rows`, the problems of `piece`, on every process."""
        args = self._args
        if isinstance(rows[0]["prompt"], list):
            stop_at_turn_end(self._model, self._tokenizer)
        return sample_groups(
            self._model,
            self._tokenizer,
            rows,
            samples=piece.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=draw_seed(args.seed, piece.first, piece.chunk),
            accelerator=self._accelerator,
        )

    def close(self) -> None:
        del self._model
        release_memory()


def load(path: str, device: str, *, trust_remote_code: bool = False) -> tuple:
    """Model and tokenizer at `path`; an adapter comes on the base that it names, with the files that lie beside it."""
    from transformers import AutoTokenizer, GenerationConfig

    if not (Path(path) / ADAPTER_CONFIG).is_file():
        model = load_model(path, device=device, trust_remote_code=trust_remote_code)
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    base = base_of(path, "model")
    model = put_adapter(load_model(base, device=device, trust_remote_code=trust_remote_code), path, base).eval()
    if (Path(path) / "generation_config.json").is_file():
        model.base_model.model.generation_config = GenerationConfig.from_pretrained(path)
    beside = path if (Path(path) / TOKENIZER_CONFIG).is_file() else base
    return model, AutoTokenizer.from_pretrained(beside, trust_remote_code=trust_remote_code)
