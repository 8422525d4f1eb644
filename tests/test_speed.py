"""bench/speed.py: seconds that add up, two checkouts in turns, full-size editors."""
import json

import pytest
import torch

from bench import fullsize, speed


def test_the_clock_takes_an_inner_part_out_of_the_outer_one(monkeypatch):
    """Catches: time counted twice, or lost when a part raises."""
    now = [0., 0.]
    monkeypatch.setattr(speed, "clocks", lambda device: tuple(now))

    def pass_time(cpu, wall):
        now[0] += cpu
        now[1] += wall
    clock = speed.Clock(torch.device("cpu"))
    pass_time(1, 2)
    with pytest.raises(KeyError), clock.part("outer"):
        pass_time(4, 8)
        clock.around("inner", pass_time)(16, 32)
        pass_time(64, 128)
        raise KeyError
    assert clock.names == ["everything else"] and clock.calls == {"inner": 1, "outer": 1}
    assert clock.cpu == {"everything else": 1, "outer": 68, "inner": 16}
    assert clock.wall == {"everything else": 2, "outer": 136, "inner": 32}


@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_parts_of_a_step_add_up(algo, capsys):
    """Catches: a part that is never entered, since its function has another name now; a sum that leaves some out."""
    small = ["--tasks", "6", "--group", "2", "--turns", "1", "--min-std", "0", "--steps", "9"]
    result = speed.watch(algo, 1, *small)
    for kind in ("cpu", "wall"):
        parts = [result[kind][part] for part in speed.PARTS]
        assert min(parts) > 0 and abs(sum(parts) - result[kind]["step"]) < 1e-6
    assert result["forwards_per_second"] > 0 and result["peak_GB"] > .1
    assert "update forward" in speed.table({algo: result})


TRAIN = """
import time
from rollout import rollout
for step in range(100):
    rollout()
    end = time.process_time() + {seconds}
    while time.process_time() < end:
        pass
"""


def checkout(folder, seconds):
    """A training whose steps take so many CPU seconds."""
    folder.mkdir()
    (folder / "rollout.py").write_text("def rollout():\n    pass\n")
    (folder / "train.py").write_text(TRAIN.format(seconds=seconds))
    return folder


def test_two_checkouts_are_compared_step_by_step(tmp_path):
    """Catches: the ratio upside down, a start counted as a step, children that go on afterwards, or wait for ever."""
    theirs, ours = checkout(tmp_path / "theirs", .2), checkout(tmp_path / "ours", .1)
    result = speed.against(theirs, ours, "grpo", 3)
    assert result["ratio"] < 1 and len(result["ours"]) == len(result["theirs"]) == 3
    assert min(result["theirs"]) > .19 and min(result["ours"]) > .09
    (ours / "train.py").write_text("raise SystemExit(1)")
    with pytest.raises(ValueError, match="has ended before its next step"):
        speed.against(theirs, ours, "grpo", 3)


def test_what_a_real_editor_costs_can_be_measured(capsys, tmp_path):
    """Catches: a script for machines with a GPU that does not run there, because it never ran anywhere."""
    small = ["--tiny", "--resolution", "64", "--turns", "1", "--tasks", "2", "--group", "2", "--micro", "2"]
    speed.main([*small, "--family", *fullsize.FAMILIES, "--out", str(tmp_path / "speed.json")])
    rows = [line for line in capsys.readouterr().out.splitlines() if " B, " in line]
    assert len(rows) == 6 and all(row.count("|") == 10 for row in rows)
    assert all(row.split("|")[-2].strip() == ("-" if ", nft" in row else "0.0e+00") for row in rows)
    numbers = json.loads((tmp_path / "speed.json").read_text())["fullsize"]
    assert len(numbers) == 6 and all(0 < row["share"] and row["rollout_cpu"] > 0 for row in numbers)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--family wants a CUDA GPU"):
            speed.main(["--family", "kontext"])
