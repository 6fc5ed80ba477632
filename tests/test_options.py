"""Options: ours, Inductor's, and everything else, which is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gawscompile.options import KINDS, OptionError, Options


def test_ours_and_inductors_are_told_apart():
    ours, inductor = Options.split({"strict": True, "max_autotune": True, "cpp.threads": 2, "epilogue-fusion": False})
    assert ours == Options(strict=True)
    assert inductor == {"max_autotune": True, "cpp.threads": 2, "epilogue_fusion": False}
    assert Options.split(None) == (Options(), {})


def test_of_dumping_only_whether_is_a_part_of_cache_keys(monkeypatch):
    assert KINDS.keys() == {field.name for field in dataclasses.fields(Options)}
    here, there, off = (Options(dump=place) for place in ("a", "b", ""))
    assert here.key(True) == there.key(True) != off.key(False)
    assert off.key(False) != Options(fuel=3).key(False) != Options(disable=("lower",)).key(False)
    monkeypatch.setenv("GAWS_DUMP", "here")
    monkeypatch.setenv("GAWS_DISABLE", "lower, fuse_zflora")
    ours, _ = Options.split({"fuel": 3})
    assert ours == Options(dump="here", disable=("lower", "fuse_zflora"), fuel=3)


@pytest.mark.parametrize(("said", "training"), [("0", False), ("1", True), (None, None)])
def test_the_environment_says_what_holds_where_no_option_does(monkeypatch, said, training):
    monkeypatch.delenv("GAWS_TRAINING", raising=False)
    if said is not None:
        monkeypatch.setenv("GAWS_TRAINING", said)
    assert Options.split({})[0].training is training
    assert Options.split({"training": True})[0].training is True


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"strikt": True}, r"unknown option 'strikt'.*strict: bool"),
        ({"strict": 1}, "option 'strict' takes a bool, not 1"),
        ({"strict": "yes"}, "option 'strict' takes a bool"),
        ({"dump": 1}, "option 'dump' takes a str .a folder., not 1"),
        ({"disable": "lower"}, "option 'disable' takes a list of pass names, not 'lower'"),
        ({"fuel": -1}, "option 'fuel' takes a int .0 or more., not -1"),
        ({"fuel": True}, "option 'fuel' takes a int .0 or more., not True"),
    ],
)
def test_bad_options_are_refused_with_the_good_ones(given, says):
    with pytest.raises(OptionError, match=says):
        Options.split(given)


def test_torch_compile_says_so_too():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(Exception, match="unknown option 'strikt'"), torch.no_grad():
        torch.compile(model, backend="gaws", options={"strikt": True})(torch.ones(1, 4))
