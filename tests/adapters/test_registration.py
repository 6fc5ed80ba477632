"""What importing the adapters does to PEFT, and what it says where PEFT is missing or not as expected."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import peft
import pytest

from gawscompile.adapters import support
from gawscompile.adapters.support import AdapterType, register, require_peft
from tests.adapters.common import KINDS, config
from tests.graphs import small_llama

UNTOUCHED = """
import pickle, sys, peft
from peft import mapping
from peft.utils import peft_types
tables = [name for name in vars(mapping) if name.startswith("PEFT_TYPE_TO_")]
before = list(peft.PeftType), {name: dict(getattr(mapping, name)) for name in tables}
pickled = pickle.dumps(peft.LoraConfig(r=4))
import gawscompile.adapters
after = list(peft.PeftType), {name: dict(getattr(mapping, name)) for name in tables}
assert before[0] == after[0]
for name in tables:
    added = set(after[1][name]) - set(before[1][name])
    assert added <= {"GAWS", "GAWSD", "ZFLORA"}, (name, added)
    assert {key: after[1][name][key] for key in before[1][name]} == before[1][name]
assert peft.PeftType("LORA") is peft.PeftType.LORA and pickle.loads(pickled) == peft.LoraConfig(r=4)
print("untouched")
"""
TWICE = """
import importlib, peft
from gawscompile import adapters
importlib.reload(adapters)
importlib.reload(adapters.config)
importlib.reload(adapters)
print(type(adapters.GAWSConfig(input_splits=2)) is peft.PEFT_TYPE_TO_CONFIG_MAPPING["GAWS"])
"""
NO_PEFT_NEEDED = """
import sys
import gawscompile, gawscompile.backend
assert not {"peft", "transformers", "gawscompile.adapters"} & set(sys.modules), "imported by the backend"
sys.modules["peft"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
try:
    import gawscompile.adapters
except ImportError as error:
    print(error)
"""


def output_of(program: str) -> str:
    """What a process of its own prints: this one has imported the adapters already."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """What the two programs print, one after the other in one process."""
    return output_of(UNTOUCHED + TWICE).splitlines()


def test_pefts_own_types_and_tables_stay_as_they_were(imported):
    assert "untouched" in imported


@pytest.mark.slow  # test_models imports the package alone
def test_the_package_itself_needs_no_peft_and_the_adapters_say_how_to_get_it():
    assert "needs peft: pip install 'gawscompile[models]'" in output_of(NO_PEFT_NEEDED)


def test_lora_works_beside():
    model = small_llama()
    assert model.peft_config["default"].peft_type is peft.PeftType.LORA


def test_importing_twice_is_harmless(imported):
    assert imported[-1] == "True"


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_copy_and_pickle(kind):
    made = config(kind, input_splits_pattern={"q_proj": 8})
    assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))
    assert made.peft_type == kind.upper() and str(made.peft_type) == f"AdapterType.{kind.upper()}"


def test_a_name_that_another_package_took_is_not_overwritten():
    class Foreign:
        pass

    with pytest.raises(RuntimeError, match=r"already has a type GAWS, from gawscompile\.adapters"):
        register(AdapterType.GAWS, Foreign, Foreign, "GAWS")


def test_an_old_peft_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(support.metadata, "version", lambda name: "0.19.1")
    with pytest.raises(ImportError, match=r"needs peft >= 0\.21 .*this is peft 0\.19\.1: pip install -U"):
        require_peft()


@pytest.mark.parametrize("version", ["0.21rc1", "1.0.dev0"])
def test_a_peft_between_releases_is_taken(version, monkeypatch):
    monkeypatch.setattr(support.metadata, "version", lambda name: version)
    require_peft()


def test_a_changed_peft_is_named_with_what_it_lacks(monkeypatch):
    monkeypatch.setattr(support, "HOOKS", (*support.HOOKS, "_gone"))
    with pytest.raises(ImportError, match=r"too new .*no BaseTuner\._gone.*peft >= 0\.21 up to about"):
        require_peft()
