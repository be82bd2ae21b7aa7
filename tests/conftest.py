"What several test files start from."
import pytest
import torch

from relax.reasoner import load_reasoner


@pytest.fixture(scope="module")
def policy():
    "The shipped reasoner and its tokenizer."
    torch.set_num_threads(1)
    return load_reasoner("countdown-small")
