"""Offline, seeded, and nothing written outside temporary folders. HYPOTHESIS_PROFILE=thorough searches for longer."""

import os
import tempfile
from collections.abc import Iterator

# Before torch and transformers are imported: they read these once, and so do the processes that tests start. The models
# are tiny, a second thread would cost more than it gives, and other bits than those of one. Triton's kernels run on a
# CPU.
_hf_home = tempfile.TemporaryDirectory(prefix="baka-hf-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": _hf_home.name, "OMP_NUM_THREADS": "1"}
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers", "train_worker")  # what they assert fails as telling as in a test

import torch  # noqa: E402
from helpers import word_tokenizer  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=150)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite takes every core; tests that are named run in this process, where they are quick to begin."""
    is_worker = hasattr(config, "workerinput")  # it must not have workers of its own
    names_nothing = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if names_nothing and not is_worker and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = "logical", "worksteal"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()
