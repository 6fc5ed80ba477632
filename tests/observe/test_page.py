"""The page of a dump, in a headless browser: steps, jumps and search work by real events, and no error is logged."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gawscompile import explain
from gawscompile.observe.html import page
from tests.graphs import small_llama, tokens

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no headless browser: apt-get install chromium")

SCRIPT = """
<script>
const said = {};
const press = (target, type, options) => target.dispatchEvent(new KeyboardEvent(type, { bubbles: true, ...options }));
const type = text => { $("search").value = text; $("search").dispatchEvent(new Event("input")); };
const texts = selector => [...document.querySelectorAll(selector)].map(element => element.textContent);
BODY
const out = document.createElement("output");
out.textContent = "SAID" + JSON.stringify(said) + "END";
document.body.append(out);
</script>
"""


def browse(index: Path, body: str, folder: Path, anchor: str = "") -> dict:
    """What `body`, run in the page after it has loaded, put into `said`. Fails where the console says anything."""
    driven = folder / "driven.html"
    driven.write_text(index.read_text() + SCRIPT.replace("BODY", body))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command += ["--dump-dom", f"file://{driven}{anchor}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search("<output>SAID(.*?)END</output>", done.stdout)
    assert found, (done.stdout[-500:], done.stderr[-2000:])
    return json.loads(html.unescape(found[1]))


def dumped(folder: Path, model: torch.nn.Module, *args, **inputs) -> Path:
    with torch._inductor.config.patch(force_disable_caches=True):
        explain(model, *args, options={"dump": str(folder)}, **inputs)
    (graph,) = folder.iterdir()
    return graph / "index.html"


WALK = """
said.ready = Number(document.documentElement.dataset.ready);
said.steps = texts("#steps .what");
said.modules = texts("#modules .what"); said.shared = $("shared").textContent;
for (let i = 0; i < 3; i++) press(document.body, "keydown", { key: "ArrowRight" });
said.stepped = $("about").textContent;
said.added = texts(".add").length; said.removed = texts(".del").length;
document.querySelectorAll("#steps .row")[5].click();
said.clicked = $("about").textContent;
$("only").click(); said.whole = document.querySelectorAll("#code > [data-node]").length; $("only").click();
type("layers.1.mlp.down_proj");
said.filtered = texts("#modules .what");
said.found = texts(".found").length;
press($("search"), "keydown", { key: "Enter" });
document.querySelector("#modules .row").click();
said.detail = $("detail").textContent;
said.mine = texts(".mine").length;
document.getElementById("to-kernel").click();
said.kernel = $("detail").textContent;
said.hash = location.hash;
"""


@needs_browser
def test_steps_jumps_and_search(tmp_path):
    index = dumped(tmp_path / "dump", small_llama(layers=2), tokens(1, 3), use_cache=False)
    said = browse(index, WALK, tmp_path)
    assert said["steps"][0] == "0 captured" and said["steps"][4] == "4 recover_operators" and len(said["steps"]) == 12
    assert len(said["modules"]) == 15
    assert said["stepped"].startswith("recover_operators: ") and said["added"] >= 15 and said["removed"] >= 75
    assert said["clicked"].startswith("group_siblings: ")
    assert said["whole"] > 150
    assert said["filtered"] == ["model.layers.1.mlp.down_proj"] and said["found"] >= 1
    assert said["shared"] == "under base_model.model"
    said_of_it = ["64 × 96", "2·LowRank(r=8)", "gemv_cpp", "Why this plan", "gemm_accumulate", "1, as traced 6"]
    assert [word for word in said_of_it if word not in said["detail"]] == []
    assert said["mine"] >= 1 and "kernel=cpp" in said["hash"] and "down_proj" in said["kernel"]


class Fates(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, torch.nn.Linear(8, 8))
        self.wide = torch.nn.Linear(8, 4).double()
        self.name = name

    def forward(self, x):
        return self.wide(getattr(self, self.name)(x).double())


@needs_browser
def test_why_a_linear_was_not_fused_and_hostile_names(tmp_path):
    name = "<img src=x onerror=\"evil=1\"></script><script>evil=1</script>\n\u202e"
    index = dumped(tmp_path / "dump", Fates(name), torch.randn(2, 8))
    body = 'said.detail = $("detail").textContent; said.modules = texts("#modules .what"); said.tags = texts("img");'
    body += "said.evil = String(window.evil);"
    said = browse(index, body, tmp_path, anchor="#step=3&module=wide")
    assert "Not fused: DTYPE" in said["detail"] and "recover_operators" in said["detail"]
    assert said["evil"] == "undefined" and not said["tags"]
    assert any("<img src=x" in text and "\n" not in text for text in said["modules"])


def test_no_text_ends_the_element_that_holds_the_data():
    data = {"key": "</script><!--", "options": {}, "record": {}, "kernels": {}, "steps": [], "paths": ["a&b"]}
    text = page(data)
    assert text.count("</script>") == 2
    held = text.partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(held) == data


@needs_browser
@pytest.mark.slow
def test_all_of_smollm2(tmp_path, smollm2_dir):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear")).eval()
    index = dumped(tmp_path / "dump", model, torch.zeros((1, 1), dtype=torch.int64), use_cache=False)
    size = index.stat().st_size
    said = browse(index, WALK, tmp_path)
    print(f"index.html {size / 1e6:.1f} MB, ready after {said['ready']} ms")
    assert size < 10e6 and said["ready"] < 5000 and len(said["modules"]) == 211
