"""Options: ours, Inductor's, and everything else, which is refused by name."""

from __future__ import annotations

import pytest
import torch

from gawscompile.options import OptionError, Options


def test_ours_and_inductors_are_told_apart():
    ours, inductor = Options.split({"strict": True, "max_autotune": True, "cpp.threads": 2, "epilogue-fusion": False})
    assert ours == Options(strict=True)
    assert inductor == {"max_autotune": True, "cpp.threads": 2, "epilogue_fusion": False}
    assert Options.split(None) == (Options(), {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"strikt": True}, r"unknown option 'strikt'.*strict: bool"),
        ({"strict": 1}, "option 'strict' takes a bool, not 1"),
        ({"strict": "yes"}, "option 'strict' takes a bool"),
    ],
)
def test_bad_options_are_refused_with_the_good_ones(given, says):
    with pytest.raises(OptionError, match=says):
        Options.split(given)


def test_torch_compile_says_so_too():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(Exception, match="unknown option 'strikt'"), torch.no_grad():
        torch.compile(model, backend="gaws", options={"strikt": True})(torch.ones(1, 4))
