"""Every Python block of the README runs, top to bottom, on the shipped model."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    blocks = FENCE.findall(README.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        # nnsight reads a traced block from its source file, so each block needs one.
        file = tmp_path / f"block_{number}.py"
        file.write_text(block, encoding="utf-8")
        exec(compile(block, str(file), "exec"), names)
    assert len(blocks) >= 7
    assert names["steered"][1] != names["replies"][1]
    assert names["steered"][0] == names["replies"][0]
    assert names["acts"].values.shape == (2, 2, names["model"].d_model)
    assert (tmp_path / "guard.json").exists()
    assert "capital" in names["replies"][0]
    moved = [abs(float(shift["evil"][2])) for shift in (names["before"], names["after"])]
    assert moved[1] < moved[0] / 2
