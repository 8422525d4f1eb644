"""README.md: what it tells its readers to write runs, and it is as long as it may be."""
import re

import torch

import model
import reward
import train
from fixtures import ROOT, make_tasks, new_editor
from rollout import rollout
from test_train import config, metrics

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def block(first):
    """The README's code that begins with a word."""
    (code,) = [code for code in BLOCKS if code.startswith(first)]
    return code


def test_the_readme_is_read_in_a_few_minutes():
    """Catches: studies and asides that push the first command off the first screen."""
    lines = TEXT.splitlines()
    assert len(lines) <= 160
    assert "torchrun train.py --algo grpo" in "\n".join(lines[:20])


def test_a_reward_of_ones_own_trains(tmp_path, monkeypatch):
    """Catches: a judge without following or consistency that breaks the loop, its pictures or its metrics."""
    names = dict(vars(reward))
    exec(block("class Redness(Judge)"), names)
    monkeypatch.setattr(reward, "load", lambda spec, *_, **__: names["Redness"]())
    train.main(config(tmp_path, judge="red", referee="none", steps=1))
    (row,) = metrics(tmp_path)
    assert 0 < row["reward/redness"] < 1 and row["teaches/redness"] == 1 and row["update/grad_norm"] > 0


def test_an_objective_of_ones_own_trains(tmp_path, monkeypatch):
    """Catches: a loop that knows its two algorithms by name."""
    exec(block("def rwr_terms("), vars(train))
    monkeypatch.setitem(train.TERMS, "rwr", train.rwr_terms)
    monkeypatch.setitem(train.LOGGED, "rwr", ["loss"])
    cfg = config(tmp_path, algo="nft", steps=1)
    cfg.algo = "rwr"
    train.main(cfg)
    (row,) = metrics(tmp_path)
    assert row["update/loss"] > 0 and row["update/taken"] == 2 and row["update/grad_norm"] > 0


def test_an_editor_of_ones_own_edits(monkeypatch):
    """Catches: a base class that asks more of a family than the three functions that the README names."""
    code = block("class MyEditor(Editor)")
    assert set(re.findall(r"def (\w+)", code)) == {"statistics", "encode_text", "predict"}
    names = dict(vars(model))
    exec(code, names)
    for name in ("statistics", "encode_text", "predict"):
        setattr(names["MyEditor"], name, vars(model.KontextEditor)[name])
    usual = rollout(new_editor(), make_tasks(1), 1, 2, 3, (0, 0))
    monkeypatch.setitem(model.FAMILIES, "FluxKontextPipeline", names["MyEditor"])
    editor = new_editor(guidance=2.5)
    editor.max_text = model.KontextEditor.max_text
    own = rollout(editor, make_tasks(1), 1, 2, 3, (0, 0))
    assert type(editor) is names["MyEditor"] and torch.equal(own.images, usual.images)


def test_every_link_of_the_documents_leads_somewhere():
    """Catches: a renamed file, picture or heading that a document still points to (headings by GitHub's rule)."""
    def anchors(file):
        headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}

    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lost = []
    for file in files:
        for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            if not link.startswith("http") and (not target.exists() or anchor and anchor not in anchors(target)):
                lost.append(f"{file.name}: {link}")
    assert not lost
