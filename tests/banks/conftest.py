"""What the tests of banks share."""

from __future__ import annotations

import peft
import pytest
import torch

from tests.banks.common import adapted


@pytest.fixture(scope="session")
def judge() -> peft.PeftModel:
    return adapted("acd")


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(0, 128, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
