"""bench/study.py: arms that are possible, a study killed and resumed, a report from the evidence alone, intervals."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation
import train
from bench import study, study_report
from fixtures import ROOT, editor_folder, refused
from test_train import digest

TINY = (f"--algo nft --model {editor_folder()} --judge exact --group 2 --denoise 2 --eval-denoise 2 --lora-rank 2 "
        "--lora-alpha 2 --lr .02 --min-std 0 --updates 1 --window 1 --train-steps 0-1 --save-every 1 --spread trajectory")
ARMS = {"one": "--turns 1 --tasks 4", "two": "--turns 2 --tasks 2"}
SCRIPT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
import data
from bench import study
study.OUT, study.RESULTS, study.STEPS = Path(sys.argv.pop(1)), Path(sys.argv.pop(1)), 3
tiny = {TINY!r}
arms = {{arm: f"{{tiny}} {{words}}" for arm, words in {ARMS!r}.items()}}
study.STUDIES["turns"] = study.Study("Is it?", ["O_3", "wear"], arms, clock="seconds/total", cosine=True)
data.run_main(study.main)
"""


def command(folder, *words):
    return [sys.executable, "-c", SCRIPT, str(folder / "out"), str(folder / "results"), *words]


def start(folder, *words):
    """The study of two arms, in a process group of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command(folder, *words), cwd=ROOT, env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines_of(file):
    return file.read_text().splitlines() if file.is_file() else []


# -------------------------------------------------------------------------------------------------------- what it runs

def test_every_arm_is_possible_and_has_as_many_edits_and_updates_as_the_others():
    """Catches: a flag that train.py has no more, or refuses; an arm that gets more to learn from than another."""
    assert set(study.STUDIES) == {"turns", "longer", "planning", "planning-grpo", "credit", "credit-longer", "aggregate",
                                  "fusion", "reasoning", "algorithms", "grpo-kl"}
    for name, one in study.STUDIES.items():
        edits, samples = set(), set()
        for arm, words in one.arms.items():
            cfg = train.parse(study.all_words(words, 1))
            train.check(cfg)
            train.divide(cfg, 0, 1)
            edits.add((cfg.turns == 5, cfg.tasks * cfg.group * cfg.turns))
            samples.add((cfg.algo, cfg.updates, cfg.steps, cfg.lr, cfg.min_std))
            long = {"longer": 80} | dict.fromkeys(("planning", "planning-grpo", "credit-longer"), 400)
            steps = long.get(name, study.STEPS)
            assert cfg.val_tasks == 0 and cfg.seed == 1 and cfg.steps == steps
        # 72 tasks' worth; five turns come nearest to it with 75 (NFT) and 70 (GRPO), which their updates divide
        usual = {(False, 72 * 8), (True, 75 * 8), (True, 70 * 8)}
        assert edits <= ({(False, 24 * 8)} if steps == 400 else usual), name
        assert len(samples) == len({algo for algo, *_ in samples}), name
        grouped = [arm for group in one.compare or [one.arms] for arm in group]
        assert set(grouped) == set(one.arms)
        assert set(one.metrics) <= {title for title, _, _ in study_report.COLUMNS}


@pytest.mark.parametrize("words, expected", [
    (["nosuch"], "'nosuch' is no study: name one of turns, longer, planning"), (["report"], "'' is no study"),
    (["report", "nosuch"], "'nosuch' is no study"), (["turns", "credit"], "'turns credit' is no study"),
    (["turns", "--seeds", "0"], "--seeds 0 must be at least 1"),
    (["turns", "--arms", "nft-k1,k9"], "--arms k9 is no arm of this study: name some of nft-k1, nft-k3"),
    (["report", "turns", "--jobs", "2"], "--jobs has no effect here")])
def test_what_is_no_study_is_refused(words, expected):
    """Catches: a misspelt name that runs something else, or a traceback."""
    assert expected in refused("bench/study.py", *words)


def test_studies_share_the_runs_that_they_have_in_common():
    """Catches: an arm trained once for every study that has it, or two arms in one folder."""
    runs = {(name, arm): study.run_name(words, 0)
            for name, one in study.STUDIES.items() for arm, words in one.arms.items()}
    common = [("turns", "nft-k3"), ("credit", "nft-k3-togo"), ("fusion", "k3-advantage"), ("reasoning", "logits"),
              ("algorithms", "nft")]
    assert len({runs[place] for place in common}) == 1
    assert runs["aggregate", "mean"] == runs["credit", "nft-k3-trajectory"]
    assert runs["credit-longer", "togo"] == runs["planning", "k3"]
    for name, one in study.STUDIES.items():
        assert len({runs[name, arm] for arm in one.arms}) == len(one.arms)
    assert study.run_name("--algo nft", 1) != study.run_name("--algo nft", 0) != study.run_name("--algo grpo", 0)


def test_a_study_of_some_arms_compares_those():
    """Catches: a group that names an arm that was not run, a first arm that everything was to be compared with lost."""
    some = study.only(study.STUDIES["fusion"], ["k1-following", "k3-following", "k3-advantage"])
    assert list(some.arms) == ["k1-following", "k3-following", "k3-advantage"]
    assert [group for group in some.compare if len(group) > 1] == [["k3-advantage", "k3-following"],
                                                                   ["k1-following", "k3-following"]]


def test_an_arm_that_fails_says_which_and_why(tmp_path, monkeypatch, capsys):
    """Catches: a failure that the next arm's output hides, or an older one of the same log; other arms that go on for
    hours without anybody."""
    (tmp_path / "bad.log").write_text("train.py: another process writes there\n")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(
        "import sys, time\nprint('\\rsomething')\n"
        "if sys.argv[1] == 'bad':\n    sys.exit('--tasks 7 is odd')\ntime.sleep(600)\n")
    jobs = [study.Job(f"arm {name}", tmp_path / f"{name}.log", lambda: False, lambda name=name: ["train.py", name])
            for name in ("good", "bad")]
    begun = time.time()
    with pytest.raises(ValueError, match=r"^arm bad failed \(exit code 1\): --tasks 7 is odd$"):
        study.work_through(jobs, 2, 1)
    assert time.time() - begun < 60


def test_a_job_of_a_killed_study_is_waited_for(tmp_path, capsys):
    """Catches: two processes that write into one run, since the first outlived the study that had started it."""
    log, end = tmp_path / "log", tmp_path / "end"
    with open(log, "a") as stream:
        study.fcntl.flock(stream, study.fcntl.LOCK_EX)
        child = subprocess.Popen(["sh", "-c", f"sleep 1; touch {end}"], stdout=stream)
    job = study.Job("arm a", log, end.exists, lambda: pytest.fail("started a second time"))
    study.work_through([job], 1, 0)
    assert child.wait() == 0 and capsys.readouterr().out.count("waiting for it") == 1


# ---------------------------------------------------------------------------------------------------- killed and resumed

def test_a_study_killed_in_the_middle_goes_on_and_its_evidence_makes_the_report(tmp_path):
    """Catches: an arm that is trained twice or starts again, a table that needs more than results/."""
    words = ["turns", "--seeds", "2", "--jobs", "2", "--tasks", "6"]
    first, runs = start(tmp_path, *words), tmp_path / "out" / "runs"
    folders = {f"{arm}-{seed}": runs / study.run_name(f"{TINY} {words}", seed)
               for arm, words in ARMS.items() for seed in (0, 1)}
    while len(lines_of(folders["one-0"] / "metrics.jsonl")) < 2:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(.05)
    processes = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], text=True, capture_output=True).stdout.split("\n")
    children = [int(line.split()[0]) for line in processes if line.split()[1:] == [str(first.pid)]]
    assert children
    for group in [first.pid, *children]:                     # each training has a session of its own
        os.killpg(group, signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "results").exists()

    said, _ = start(tmp_path, *words).communicate(timeout=900)
    assert "arm two, evaluation" in said and "## Means" in said, said
    for run in folders.values():
        rows = [json.loads(line) for line in lines_of(run / "metrics.jsonl")]
        assert [row["step"] for row in rows] == [1, 2, 3]
    trained = {run: digest(folders[run]) for run in ("one-0", "two-1")}

    # Once more: nothing is done again, and the report is the same.
    results = tmp_path / "results" / "turns"
    there = digest(results)
    settings = tmp_path / "out" / "eval" / "settings.json"               # as another study's evaluation would leave it
    record = json.loads(settings.read_text())
    settings.write_text(json.dumps(record | {"settings": record["settings"] | {"tasks": 3, "probes": 2}}))
    again, _ = start(tmp_path, *words).communicate(timeout=900)
    assert "[" not in again.split("# turns")[0] and digest(results) == there
    assert {run: digest(folders[run]) for run in trained} == trained

    # What would be lost is not written over.
    for less, what in ((["--seeds", "1"], "seed 1"), (["--tasks", "5"], "6 test tasks"), (["--arms", "one"], "arm two")):
        said, _ = start(tmp_path, "turns", "--seeds", "2", "--tasks", "6", *less).communicate(timeout=300)
        assert f"turns holds more than this ({what})" in said and digest(results) == there, said

    # A run that another judge has trained is another run.
    config = folders["one-0"] / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"content_of_judge": "', '"content_of_judge": "x'))
    said, _ = start(tmp_path, *words).communicate(timeout=300)
    assert "another config: content_of_judge 'x" in said and digest(results) == there, said

    # From the evidence alone.
    by_eval = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    shutil.rmtree(tmp_path / "out")
    for name in ("table.md", "results.json", "figure.png"):
        (results / name).unlink(missing_ok=True)
    said, _ = start(tmp_path, "report", "turns").communicate(timeout=300)
    assert digest(results) == there and (results / "table.md").read_text() in said

    # The numbers are those of eval.py, whose last arm was the second one.
    found = json.loads((results / "results.json").read_text())
    for arm, names in (("base", ["base"]), ("two", [folders[run].name for run in ("two-0", "two-1")])):
        for title, metric, place in (("O_3", "O", 2), ("CC_5", "CC", 4), ("IF_3", "IF", 2)):
            expected = sum(by_eval["arms"][name][metric][place] for name in names) / len(names)
            assert abs(found["arms"][arm][title]["value"] - expected) < 1e-3, (arm, title)
    by_seed = [by_eval["arms"][folders[run].name]["O"] for run in ("two-0", "two-1")]
    assert by_seed[0] != by_seed[1] != by_eval["arms"]["base"]["O"]
    assert set(found["arms"]) == {"base", "one", "two"}
    assert set(found["differences"]) == {"one - base", "two - base", "two - one"}
    gain = found["arms"]["two"]["O_3"]["value"] - found["arms"]["base"]["O_3"]["value"]
    assert abs(found["differences"]["two - base"]["O_3"]["value"] - gain) < 1e-12
    record = json.loads((results / "study.json").read_text())
    assert record["seeds"] == [0, 1] and record["tasks"] == 6 and record["commits"]
    assert all(-1 <= value <= 1 for values in record["cosines"].values() for value in values)
    assert "equal seconds" in said and "Cosine" in said


# ----------------------------------------------------------------------------------------------------------- the report

def evidence_of(tables, K=1):
    """Evidence of arms {arm: successes (seeds, n)} at each of K turns, whose base never succeeds."""
    seeds, n = next(iter(tables.values())).shape
    ones, parts = torch.ones(n, K, dtype=torch.float64), {}
    for arm, table in [("base", torch.zeros(1, n)), *tables.items()]:
        for seed, row in enumerate(table.double()):
            values = {"M": row[:, None].expand(n, K), "IF": row[:, None].expand(n, K), "CC0": ones}
            parts[arm if arm == "base" else f"{arm}-{seed}"] = {name: (v, ones) for name, v in values.items()}
    record = {"arms": dict.fromkeys(tables, ""), "seeds": list(range(seeds)), "compare": [list(tables)]}
    return study_report.Evidence(record, parts, {})


def difference(evidence, samples=20_000):
    """The last arm's M minus the first one's, and its interval."""
    arms, _ = study_report.estimate(evidence, samples)
    first, *_, last = evidence.study["arms"]
    draws = (arms[last]["M"] - arms[first]["M"])[:, 0]
    return draws[0].item(), study_report.interval(draws[1:])


def test_an_interval_is_that_of_the_closed_form():
    """Catches: seeds or tasks that are not resampled, or are resampled apart in the two arms.

    d_si = a_s + b_i resampled over seeds and tasks has the variance var(a) / S + var(b) / n.
    """
    S, n = 30, 400
    generator = torch.Generator().manual_seed(0)
    a, b = .3 * torch.randn(S, 1, generator=generator), torch.randn(1, n, generator=generator)
    common = torch.randn(S, n, generator=generator)              # as in the other arm: pairing takes it out
    value, (low, high) = difference(evidence_of({"x": common, "y": common + a + b}))
    deviation = (a.var(correction=0) / S + b.var(correction=0) / n).sqrt().item()
    assert abs(value - (a.mean() + b.mean()).item()) < 1e-6
    assert abs((high - low) / (2 * 1.96 * deviation) - 1) < .05
    assert abs((high + low) / 2 - value) < .1 * deviation


def test_an_interval_of_two_seeds_reaches_from_one_to_the_other():
    """Catches: an interval that knows nothing of the training seeds."""
    flat = torch.zeros(2, 50)
    value, bounds = difference(evidence_of({"x": flat, "y": flat + torch.tensor([[.1], [.3]])}), 2_000)
    assert abs(value - .2) < 1e-6 and torch.allclose(torch.tensor(bounds), torch.tensor([.1, .3]))


def test_a_mean_over_seeds_is_that_of_the_seeds_own_metrics():
    """Catches: O of the mean success in place of the mean of O."""
    table = torch.tensor([[1., 1, 1, 1], [1, 0, 0, 0]])
    arms, runs = study_report.estimate(evidence_of({"x": table}), 10)
    assert arms["x"]["O"][0].item() == (1 + .5) / 2 and runs["x-1"]["O"].item() == .5
    assert arms["base"]["M"][0].item() == 0


def test_scores_come_back_from_their_file_as_they_were():
    """Catches: an unknown turn that becomes a failure, tasks and turns changed over."""
    nan = float("nan")
    values = torch.tensor([[1, .25], [0, nan], [nan, .9996]], dtype=torch.float64)
    packed = json.loads(json.dumps(study_report.pack(values)))
    assert packed == ["10?", [250, None, 1000]]
    assert study_report.unpack(packed).nan_to_num(-1).tolist() == [[1, .25], [0, -1], [-1, 1]]


def test_what_the_world_measures_is_shown_where_it_is_there(tmp_path, monkeypatch, capsys):
    """Catches: a column that is left out or breaks the report where an evaluation has possible, M_clean and wear."""
    K, evidence = 5, evidence_of({"x": torch.tensor([[1., 0, 1, 1]]), "y": torch.tensor([[1., 1, 1, 0]])}, 5)
    plain = evaluation.metrics
    evidence.study.update(name="turns", question="?", metrics=["wear"], turns=K, steps=1, tasks=4, judge="exact",
                          commits=["abc"], cosines={}, clock="")
    for run in ("x-0", "y-0"):
        evidence.curves[run] = [{"step": 1, "reward/following": .5, "referee/following": None, "seconds/total": 1.}]
    monkeypatch.setattr(study_report, "read", lambda folder: evidence)
    without = study_report.write_report(tmp_path)
    assert "| arm | IF_3 | O_3 | O_5 | CC_3 | CC_5 | flatness |" in without and "wear" not in without.split("## Means")[1]
    monkeypatch.setattr(evaluation, "metrics", lambda parts, w: (found := plain(parts, w)) | {
        "possible": found["M"] ** 0, "M_clean": found["M"], "wear": -found["M"] / 10})
    table = study_report.write_report(tmp_path)
    assert "| flatness | possible | M_clean | wear |" in table and "| x | wear | -0.075 |" in table
    assert "| y - x | wear | +0.000 [" in table
