"""A model without weights: the names and shapes of its modules, of the class that TRL loads, from its config alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def access_of(args: Any) -> dict:
    """Return the keywords with which a trainer reads the config of a model by name; `args` are its arguments.

    Those in `model_init_kwargs` come first, as in TRL.
    """
    given = args.model_init_kwargs or {}
    places = {name: given[name] for name in ("token", "cache_dir", "subfolder") if name in given}
    trust = given.get("trust_remote_code", args.trust_remote_code)
    return {"revision": given.get("revision") or "main", "trust_remote_code": trust, **places}


def builder_of(config: Any, *, trust_remote_code: bool = False) -> Callable[[Any], torch.nn.Module]:
    """Return what builds a model from `config`: the class that the config names, as TRL chooses it."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named or partial(AutoModelForCausalLM.from_config, trust_remote_code=trust_remote_code)


def skeleton(name: str, **kwargs: Any) -> torch.nn.Module:
    """Build the model `name`, a folder or a name on the hub, on PyTorch's meta device; random states stay.

    `kwargs` are those for loading its config, such as `revision` and `trust_remote_code`.
    """
    config = AutoConfig.from_pretrained(name, **kwargs)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = builder_of(config, trust_remote_code=kwargs.get("trust_remote_code", False))(config)
    # The embeddings of added tokens are drawn around the mean of the others, which have no values here
    model.resize_token_embeddings = partial(model.resize_token_embeddings, mean_resizing=False)
    return model
