import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests that start a Hub of their own unset it in the process that uses it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are slower on several threads; the tests' processes share the cores

import pytest
import torch

from tiny import tiny_model, tiny_processor

pytest_plugins = ["answering_runs"]  # fixtures that two files share


@pytest.fixture(scope="session")
def model():
    """Shared by tests that do not change it."""
    return tiny_model()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, model, processor):
    """What `save_pretrained` writes, ready to be loaded with `trust_remote_code`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-pheye"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
