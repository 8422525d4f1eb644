"""Files from strangers: nothing in them is ever run, and each is refused in one clear line."""
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
import train
from bench import edival
from fixtures import ROOT, editor_folder, new_editor, refused, run_script
from test_train import config, digest, flags, judge


class Payload:
    """Unpickling it writes a file: proof that something was run."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return exec, (f"open({self.proof!r}, 'w').write('it ran')",)


WRITERS = {     # a pickle as Python writes it, as torch writes it, and with tensors around the payload
    "pickle": lambda thing, path: Path(path).write_bytes(pickle.dumps(thing)),
    "torch": lambda thing, path: torch.save(thing, path),
    "old torch": lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
    "among tensors": lambda thing, path: torch.save({"step": 1, "policy": [torch.zeros(2)], "sets": thing}, path)}
HOSTILE = pytest.mark.parametrize("kind", WRITERS)


@pytest.fixture
def hostile(tmp_path):
    """hostile(path, kind) writes a pickle there that leaves a proof if it is ever unpickled; checked at the end."""
    proof = tmp_path / "proof"

    def write(path, kind="torch"):
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[kind](Payload(proof), path)
    write(tmp_path / "trial.pt", "pickle")
    pickle.loads((tmp_path / "trial.pt").read_bytes())
    assert proof.read_text() == "it ran", "the payload does nothing, so this test shows nothing"
    proof.unlink()
    yield write
    assert not proof.exists(), "a stranger's file was run"


# ------------------------------------------------------------------------------------------------------------- pickles

@HOSTILE
def test_a_hostile_checkpoint_is_not_run(kind, tmp_path, judge, hostile, capsys):
    """Catches: torch.load without weights_only: --resume on somebody's folder runs what he likes."""
    out = tmp_path / "run"
    train.main(config(out, steps=1))
    good = train.checkpoints(out)
    hostile(out / "checkpoint" / "step_000009.pt", kind)
    train.main(config(out, steps=2, resume=True))
    said = capsys.readouterr().err
    assert "step_000009.pt is damaged and left out" in said and "Traceback" not in said
    for file in good + train.checkpoints(out):
        hostile(file, kind)
    before = digest(out)
    code, _, err = run_script("train.py", *flags(out, steps=3, resume=True))
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert lines == [f"train.py: --resume: no checkpoint in {out / 'checkpoint'} can be read; nothing was changed"]
    assert code == 2 and "Traceback" not in err
    assert digest(out) == before


@HOSTILE
@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", model.LORA_FILE, model.WHOLE_FILE])
def test_a_hostile_lora_is_not_run(kind, name, tmp_path, hostile):
    """Catches: a pickle that is loaded for what it is, whatever its name says; a traceback of safetensors."""
    hostile(tmp_path / "lora" / name, kind)
    line = refused("train.py", *flags(tmp_path / "run", lora=tmp_path / "lora" / name, lora_rank=None, lora_alpha=None))
    assert f"{name} holds no LoRA that can be loaded" in line
    line = refused("eval.py", "--model", editor_folder(), "--lora", f"x={tmp_path / 'lora' / name}", "--out",
                   tmp_path / "eval", "--tasks", 2)
    assert f"{name} holds no LoRA that can be loaded" in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "eval").exists()


def test_a_folder_with_a_pickled_lora_holds_no_lora(tmp_path, hostile):
    """Catches: pytorch_lora_weights.bin, the name of diffusers' own pickles, found by diffusers' loader."""
    hostile(tmp_path / "lora" / "pytorch_lora_weights.bin")
    line = refused("train.py", *flags(tmp_path / "run", lora=tmp_path / "lora", lora_rank=None, lora_alpha=None))
    assert "no LoRA at" in line


@pytest.mark.parametrize("part, name", [
    ("transformer", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"),
    ("text_encoder", "pytorch_model.bin"), ("text_encoder_2", "pytorch_model.bin")])
def test_an_editor_with_pickled_weights_is_refused(part, name, tmp_path, hostile):
    """Catches: .bin files taken where safetensors are missing, which is the libraries' own default; a good pickle too:
    what may be loaded must not depend on what it does."""
    folder = tmp_path / "editor"
    shutil.copytree(editor_folder(), folder)
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    file.unlink()
    torch.save(state, folder / part / name)
    words = f"no editor that can be loaded: {part}/ holds no safetensors file"
    assert words in refused("train.py", *flags(tmp_path / "run", model=folder))
    hostile(folder / part / name, "torch")
    assert words in refused("train.py", *flags(tmp_path / "run", model=folder))
    assert words in refused("eval.py", "--model", folder, "--tasks", 2, "--out", tmp_path / "e")
    # beside good weights it is not looked at
    save_file(state, file, {"format": "pt"})
    model.load(str(folder))


def test_a_judge_with_pickled_weights_is_refused(tmp_path, hostile):
    """Catches: the judge's or the features' .bin files taken, where the editor's are not."""
    folder = tmp_path / "judge"
    shutil.copytree(ROOT / "shapes" / "judge", folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "--judge" in refused("train.py", *flags(tmp_path / "run", judge=folder))
    hostile(folder / "pytorch_model.bin")
    assert "--judge" in refused("train.py", *flags(tmp_path / "run", judge=folder))
    with pytest.raises(ValueError, match="--features .* no vision transformer"):
        edival.load_features(str(folder))


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    """Catches: a model's own Python files, run after a question that nobody sees, or without one; a module that
    model_index.json names, imported from wherever the command was typed."""
    proof = tmp_path / "proof"
    code = f"open({str(proof)!r}, 'w').write('it ran')\n"
    folder = tmp_path / "judge"
    shutil.copytree(ROOT / "shapes" / "judge", folder)
    (folder / "mine.py").write_text(code)
    settings = json.loads((folder / "config.json").read_text())
    auto = {name: "mine.Mine" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")}
    settings |= {"auto_map": auto, "model_type": "of_mine"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Mine", "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "--judge" in refused("train.py", *flags(tmp_path / "run", judge=folder))

    folder = tmp_path / "editor"
    shutil.copytree(editor_folder(), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "tokenizer" / "mine.py").write_text(code)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for part, library in (("tokenizer", "mine"), ("scheduler", "mine"), ("transformer", "mine"), ("tokenizer", "os")):
        (folder / "model_index.json").write_text(json.dumps(index | {part: [library, "Mine"]}))
        line = refused("train.py", *flags(tmp_path / "run", model=folder))
        assert f"its {part} is of '{library}'" in line
    assert not proof.exists() and "mine" not in sys.modules


# ---------------------------------------------------------------------------------------------------------------- JSON

DEEP = "[" * 100_000
NESTED = {n: '{"turns": ' + "[" * n + "]" * n + "}" for n in (500, 2_000)}
BAD_JSON = {"a list": "[1]", "nothing": "", "a number": "NaN", "deep": DEEP, "not UTF-8": b"\xff",
            "nested 500": NESTED[500], "nested 2000": NESTED[2_000], "NaN": '{"turns": NaN, "lr": NaN}',
            "a list of turns": '{"turns": [3]}',
            "a huge number": '{"turns": 1e999}', "many turns": '{"turns": true}', "no turns": '{"turns": 0}',
            "lists": '{"model": ["a"], "data": {"b": 1}, "judge": [], "turns": "3", "resolution": null}'}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_hostile_config_is_refused_in_one_line(case, tmp_path, judge):
    """Catches: a traceback, a page of nested brackets, a number of turns that is a list, in somebody's folder."""
    write_json(tmp_path / "run" / "config.json", BAD_JSON[case])
    (tmp_path / "run" / model.LORA_FILE).write_bytes(b"")
    for name, words in (("train.py", flags(tmp_path / "run", resume=True)), ("eval.py", ["--run", tmp_path / "run"])):
        line = refused(name, *words)
        assert "config.json" in line or "was started with another config" in line, line
        assert len(line) < 4000, len(line)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.json", model.LORA_FILE]


BAD_SETTINGS = {"a list": "[1]", "deep": DEEP, "made_of a list": '{"made_of": ["x"]}',
                "made_of null": '{"made_of": null}', "made_of a text": '{"made_of": "weights of base"}',
                "other values": '{"made_of": {"denoise": [NaN]}}'}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_hostile_settings_of_an_evaluation_are_refused_in_one_line(case, tmp_path):
    """Catches: a traceback where settings.json, or edival.json, is not what was written."""
    write_json(tmp_path / "out" / "settings.json", BAD_SETTINGS[case])
    line = refused("eval.py", "--model", editor_folder(), "--tasks", 2, "--out", tmp_path / "out")
    assert "settings.json" in line or "holds another evaluation" in line
    assert re.search("settings.json|holds pictures without scores", refused("bench/report.py", tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["settings.json"]


GOOD = {"model": "m", "lora": {}, "turns": 2, "tasks": 2, "split": "test"}
BAD_RECORDS = [
    {"settings": []}, {"settings": {"a": 1}, "judge": {}}, {"settings": GOOD | {"turns": "x"}, "judge": {}},
    {"settings": GOOD | {"lora": ["a"]}, "judge": {}}, {"settings": GOOD, "judge": 3}, {"settings": GOOD, "judge": {}},
    {"settings": GOOD, "judge": {"fingerprint": 1, "names": 2}}, {"judge": {"fingerprint": "1", "names": []}},
    {"settings": GOOD, "judge": {"fingerprint": "1", "names": ["following"]}, "made_of": []},
    {"settings": GOOD | {"split": "x"}, "judge": {"fingerprint": "1", "names": ["following"]}},
    {"settings": GOOD, "judge": {"fingerprint": "1", "names": ["following"]}}]


@pytest.mark.parametrize("record", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_report_of_a_folder_that_eval_did_not_write_is_refused_in_one_line(record, tmp_path):
    """Catches: a traceback of whatever is missing first."""
    write_json(tmp_path / "settings.json", json.dumps(record))
    refused("bench/report.py", tmp_path)


@pytest.mark.parametrize("record", [[1], {"made_of": [1]}, {"arms": "base"}, {"turns": [3]}, {"images": 3},
                                    {"data": {}}])
def test_an_edival_record_that_is_none_is_refused_in_one_line(record, tmp_path):
    """Catches: a traceback of score and report in a folder from elsewhere."""
    write_json(tmp_path / "edival.json", json.dumps(record))
    assert "edival.json" in refused("bench/edival.py", "score", "--judge", "x", "--out", tmp_path)


BAD_ADAPTERS = ['[1]', '{"transformer.lora_alpha": [1]}', '{"transformer.lora_alpha": NaN}',
                '{"transformer.alpha_pattern": "."}', '{"transformer.alpha_pattern": {"(": 1}}',
                '{"transformer.alpha_pattern": {".*": {}}}', DEEP, '{',
                '{"transformer.lora_alpha": "8x"}', '{"transformer.lora_alpha": null}',
                '{"transformer.lora_alpha": -1}']


@pytest.mark.parametrize("text", BAD_ADAPTERS)
def test_hostile_metadata_of_a_lora_is_refused_in_one_line(text, tmp_path):
    """Catches: a traceback from what PEFT's config is read with, after some layers have got their LoRA."""
    editor = new_editor(2, moved=.1)
    model.save_weights(editor, tmp_path)
    state = load_file(tmp_path / model.LORA_FILE)
    save_file(state, tmp_path / model.LORA_FILE, {"format": "pt", "lora_adapter_metadata": text})
    with pytest.raises(ValueError) as error:
        model.load_weights(new_editor(), tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("case", ["model_index.json", "transformer/config.json", "vae/config.json",
                                  "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[1]", DEEP, "{", '{"_class_name": []}', "null"], ids=range(5))
def test_hostile_files_of_an_editor_are_refused_in_one_line(case, content, tmp_path):
    """Catches: a traceback of the libraries for a file that is not theirs."""
    if content == '{"_class_name": []}' and case.startswith(("scheduler", "tokenizer")):
        pytest.skip("the libraries take their defaults for what a scheduler or a tokenizer leaves out")
    folder = tmp_path / "editor"
    shutil.copytree(editor_folder(), folder)
    (folder / case).write_text(content)
    with pytest.raises(ValueError, match="no editor that can be loaded") as error:
        model.load(str(folder))
    assert len(str(error.value).splitlines()) == 1
