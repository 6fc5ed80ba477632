"""The quality benchmark, on a tiny random model."""

from __future__ import annotations

import pytest

from benchmarks import adapter_quality
from benchmarks.common import Setup, load_base


def test_tables_and_plot(tiny_llama_dir, tmp_path, capsys):
    flags = ["--model", str(tiny_llama_dir), "--splits", "8", "--steps", "1", "--seeds", "2", "--demo-steps", "1"]
    files = ["--markdown", str(tmp_path / "q.md"), "--plot", str(tmp_path / "q.png")]
    adapter_quality.main([*flags, *files, "--decode", "eager"])
    out = capsys.readouterr().out
    assert "nearest GAWSD, 8" in out and "decode eager, ms" in out
    lines = [line for line in (tmp_path / "q.md").read_text().splitlines() if line.startswith("| GAWS")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    counts = [row[2] for row in rows]
    assert [row[0] for row in rows] == ["GAWS", "GAWS-D"]
    assert counts[0] == counts[1]  # equal budgets
    pytest.importorskip("matplotlib")
    assert (tmp_path / "q.png").stat().st_size > 1000


def test_lora_gets_the_nearest_rank(tiny_llama_dir):
    base = load_base(Setup(str(tiny_llama_dir)))
    config, setting = adapter_quality.configuration("LoRA", base, 2)
    # 2 layers: q, o 64x64; k, v 32x64; gate, up, down 128x64
    sizes, widths = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64, 2 * 128 + 2 * 96 + 3 * 192
    assert config.r == round(sizes / 4 / widths) and setting == f"r = {config.r}"
