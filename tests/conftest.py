"""Offline, seeded, and nothing written outside temporary folders. HYPOTHESIS_PROFILE=thorough searches for longer."""

import os
import tempfile

# Before transformers is imported: it reads these once.
_hf_home = tempfile.TemporaryDirectory(prefix="baka-hf-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": _hf_home.name}

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=150)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
