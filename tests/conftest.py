"""Settings that every test needs before aesl_trl is imported, and the fixtures that many tests share."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import build_tokenizer, save_model  # noqa: E402


hypothesis.settings.register_profile("no deadline", deadline=None)  # no clock: other processes may take the cores
hypothesis.settings.load_profile("no deadline")

# Read where a kernel is defined, so before aesl_trl is imported: without a GPU the tests interpret the Triton kernels
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """Keep the garbage collector off what the imports made: each trainer asks for a collection, 0.4 s of walking."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # else nanobind reports each of its objects as leaked


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tokenizer):
    """Save an untrained two-layer Qwen2 of width 16 as a hub model would be, and return the folder."""
    return str(save_model(tokenizer, tmp_path_factory.mktemp("tiny-qwen2")))
