"""edival.py, and EdiVal in data.py and eval.py: published counts, the baselines' own pictures, results read back."""
import csv
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
import edival
import eval as evaluation
import model
import reward
from fixtures import ROOT, Judge, editor_folder, load_pipe
from rollout import Task

GOLDEN = ROOT.parent / "shared" / "data" / "edival" / "oai_instruction_generation_output.csv"
golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="EdiVal's CSV is not in ../shared/data/edival")

# index -> turns (type, instruction, with brackets), objects that should be unchanged, all objects
DIALOGUES = {
    3: [("subject_add", "Add [hat]", ["cat"], ["cat", "hat"]),
        ("color_alter", "Change the color of [hat] to [red]", ["cat"], ["cat", "hat", "red hat"]),
        ("subject_remove", "Remove [cat]", [], ["cat", "hat", "red hat"])],
    10: [("background_change", "Change the background to [sea]", ["dog"], ["dog"]),
         ("subject_add", "Add [ball]", ["dog"], ["dog", "ball"]),
         ("count_change", '"Change the count of [ball] to [3]"', [], ["dog", "ball"])],
    11: [("text_change", "Add text '[HI]' on the image", ["dog"], ["dog"]),
         ("subject_remove", "Remove [dog]", [], ["dog"]),
         ("background_change", "Change the background to [park]", [], [])]}


def write_csv(folder, dialogues=DIALOGUES, size=(40, 40)):
    """EdiVal's files in small: the CSV and its pictures. Returns the CSV's path."""
    with open(folder / "edival.csv", "w", newline="") as file:
        names = ("image_index turns task_type instructions format_instructions bg_consistency "
                 "unchanged_objects all_objects").split()
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for index, turns in dialogues.items():
            for k in range(len(turns)):
                kinds, told = ([turn[c] for turn in turns[:k + 1]] for c in (0, 1))
                writer.writerow(dict(zip(names,
                                         [index, k + 1, kinds, [t.replace("[", "").replace("]", "") for t in told],
                                          told, "background_change" not in kinds, turns[k][2], turns[k][3]])))
    for index in dialogues:
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{index}_input_raw.jpg", quality=95)
    return folder / "edival.csv"


# ------------------------------------------------------------------------------------------------------------ its data

@golden
def test_the_published_counts_of_the_benchmark():
    """Catches: rows lost or read twice, types of another turn, consistency where EdiVal has none."""
    tasks = data.read_edival(GOLDEN, 3, None)
    assert len(tasks) == 572 and sum(len(task.instructions) for task in tasks) == 1716
    assert Counter(kind for task in tasks for kind in task.kinds) == {
        "subject_add": 237, "subject_remove": 205, "background_change": 192, "count_change": 191,
        "material_alter": 188, "text_change": 188,
        "color_alter": 186, "subject_replace": 166, "position_change": 163}
    kept = [[task.meta["background_kept"][k] for task in tasks] for k in range(3)]
    objects = [[task.meta["background_kept"][k] and bool(task.meta["objects_kept"][k]) for task in tasks]
               for k in range(3)]
    assert [sum(k) for k in kept] == [507, 452, 380] and [sum(k) for k in objects] == [453, 354, 261]
    dependent = [sum(task.meta["dependent"][k] for task in tasks) / 572 for k in range(3)]
    assert dependent == pytest.approx([0, .138, .208], abs=.005)
    quotes = sum(text.startswith('"') for task in tasks for text in task.instructions)
    assert quotes > 150                                                      # kept as they are, like the baselines


@golden
def test_words_shared_with_an_earlier_edit_find_what_the_object_lists_find():
    """Catches: dependent instructions of a JSONL file, which has no lists, that pass for independent."""
    tasks = data.read_edival(GOLDEN, 3, None)
    pairs = [(task.meta["dependent"][k], data._speaks_of_earlier(task, k)) for task in tasks for k in (1, 2)]
    assert sum(listed and not guessed for listed, guessed in pairs) <= 1 and sum(listed for listed, _ in pairs) == 201
    assert sum(guessed for _, guessed in pairs) < 400


def test_a_small_table_gives_its_dialogues(tmp_path):
    """Catches: prefixes taken for dialogues, the row number for the index, a picture of another dialogue."""
    tasks = data.load(write_csv(tmp_path), "test", 2, 32, images=str(tmp_path))
    assert [task.meta["index"] for task in tasks] == [3, 10, 11] and tasks[0].image.size == (32, 32)
    assert tasks[1].instructions == ["Change the background to sea", "Add ball", '"Change the count of ball to 3"']
    assert [task.meta["background_kept"] for task in tasks] == [[True] * 3, [False] * 3, [True, True, False]]
    assert [task.meta["dependent"] for task in tasks] == [[False, True, False], [False, False, True], [False] * 3]
    assert data.alone(tasks[0], 1) is None and data.alone(tasks[0], 2).instructions == ["Remove cat"]
    assert data.alone(tasks[0], 2).image is tasks[0].image


@pytest.mark.parametrize("spoil, expected", [
    ("hole", "dialogue 10 has turns \\[1, 3\\], expected 1 to 3"),
    ("list", "line 3 cannot be read"),
    ("other", "is no CSV of EdiVal's form: it has no column"), ("picture", "holds no 11_input_raw"),
    ("short", "line 4 has 3 instructions, fewer than the 4"), ("none", "holds no tasks")])
def test_a_bad_table_is_refused_with_its_place(tmp_path, spoil, expected):
    """Catches: a dialogue without its second turn evaluated as one of two turns, a traceback of the parser."""
    path = write_csv(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    if spoil == "hole":
        lines.pop(5)
    elif spoil == "list":
        lines[2] = lines[2].replace("]", "", 1)
    elif spoil == "other":
        lines = ["a,b\n", "1,2\n"]
    elif spoil == "none":
        lines = lines[:1]
    elif spoil == "picture":
        (tmp_path / "11_input_raw.jpg").unlink()
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match=expected):
        data.load(path, "all", 4 if spoil == "short" else 3, 32, images=str(tmp_path))


# ------------------------------------------------------------------------------------------------------- its protocol

def test_the_protocol_gives_the_pictures_of_the_baselines_own_loop(tmp_path, monkeypatch):
    """Catches: other noise than seed 1234 every turn, noise packed otherwise, guidance, steps, another way of scaling,
    a first turn from the original file in place of what is written. EdiVal's loop over the pipeline, in small."""
    from diffusers.pipelines.flux import pipeline_flux_kontext
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64)])
    monkeypatch.setitem(edival.BASELINES, "FluxKontextPipeline", edival.Baseline(3, 3., 64, "", 2, 512))
    monkeypatch.setattr(evaluation, "SIZE", 32)
    path = write_csv(tmp_path, {index: DIALOGUES[index] for index in (3, 10)}, (32, 32))
    evaluation.main(["generate", "--model", editor_folder(), "--data", str(path), "--images", str(tmp_path),
                     "--protocol", "edival", "--turns",
                     "2", "--probes", "0",
                     "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["denoise"], manifest["guidance"], manifest["resolution"], manifest["split"]) == (3, 3., 32, "all")
    pipe, folder = load_pipe(), tmp_path / "out" / "base_generation" / "multipass"
    for index in (3, 10):
        current = Image.open(folder / f"{index}_input_raw.png")
        assert np.array_equal(np.array(current),
                              np.array(Image.open(tmp_path / f"{index}_input_raw.jpg").convert("RGB")))
        for k in range(2):
            torch.manual_seed(1234)
            text = DIALOGUES[index][k][1].replace("[", "").replace("]", "")
            edited = pipe(image=current, prompt=text, guidance_scale=3., num_inference_steps=3, height=64, width=64,
                          max_area=64 * 64,
                          max_sequence_length=14).images[0]
            current = edited.resize((32, 32), Image.LANCZOS)
            ours = np.array(Image.open(folder / f"{index}_input_raw_turn_{k + 1}.png")).astype(int)
            assert np.abs(ours - np.array(current)).max() <= 1, (index, k)


def test_every_family_packs_its_noise_as_its_pipeline_does():
    """Catches: FLUX.2's latents, which are patches already, packed like FLUX.1's."""
    from diffusers import Flux2KleinPipeline, FluxKontextPipeline
    kontext, klein = torch.randn(1, 16, 8, 12), torch.randn(1, 64, 4, 6)
    expected = {"FluxKontextPipeline": FluxKontextPipeline._pack_latents(kontext, 1, 16, 8, 12)[0],
                "Flux2KleinPipeline": Flux2KleinPipeline._pack_latents(klein)[0]}
    for (family, packed), z in zip(expected.items(), (kontext, klein)):
        editor = type("Editor", (), {"pipe": type(family, (), {})(), "device": "cpu", "multiple": 16, "size": (64, 96),
                                     "latent_shape": lambda self, size: (24, 64),
                                     "transformer": torch.nn.Linear(1, 1)})()
        editor.transformer.dtype = torch.float32
        noise = edival.baseline_noise(editor, 1234)((24, 64), 5, 2)
        z.copy_(torch.randn(z.shape, generator=torch.Generator().manual_seed(1234)))
        assert torch.equal(noise, (FluxKontextPipeline._pack_latents(z, 1, 16, 8, 12)
                                   if family[:5] == "FluxK" else Flux2KleinPipeline._pack_latents(z))[0])
        assert packed.shape == noise.shape


# ---------------------------------------------------------------------------------------------------------- its results

def write_results(folder, s, kinds=None, consistency=None):
    """What EdiVal's eval.py leaves: s {index: K scores}, consistency {index: K pairs (object, background) or None}."""
    folder.mkdir(parents=True)
    by_task = {"overall": [float(x) for row in s.values() for x in row]}
    (folder / "image_rate.json").write_text(json.dumps(s))
    (folder / "task_rate.json").write_text(json.dumps(by_task))
    for index in consistency or {}:
        turns = {str(k + 1): {"instruction_following": s[index][k], "task_type": kinds[index][k],
                              "object_dinov3_consistency_mean": pair and pair[0],
                              "background_dinov3_consistency": pair and pair[1]} for k,
                              pair in enumerate(consistency[index])}
        (folder / f"{index}_input_raw.json").write_text(json.dumps({"base_image_quality": {}} | turns))


@golden
def test_results_with_a_third_partys_counts_give_its_published_rates(tmp_path):
    """Catches: CC pooled over object and background samples in place of the mean of their means; wrong denominators."""
    tasks = data.read_edival(GOLDEN, 3, None)
    s = {task.meta["index"]: [0, 0, 0] for task in tasks}
    rows = list(s.values())
    for i, turns in enumerate([3] * 93 + [2] * (190 - 93) + [1] * (354 - 190)):
        rows[i][:turns] = [1] * turns
    for k, count in ((1, 311 - 190), (2, 292 - 93)):
        for row in rows[354:354 + count]:
            row[k] = 1
    pair = lambda task, k: (.7 if task.meta["objects_kept"][k] else None,
                            .9) if task.meta["background_kept"][k] else None
    consistency = {task.meta["index"]: [pair(task, k) for k in range(3)] for task in tasks}
    write_results(tmp_path / "Lance_generation" / "multipass", s, {task.meta["index"]: task.kinds for task in tasks},
                  consistency)
    evaluation.main(["report", "--edival", str(tmp_path / "Lance_generation"), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "edival" / "results.json").read_text())
    lance = result["arms"]["Lance"]
    assert [round(100 * x, 2) for x in lance["IF"]] == [61.89, 33.22, 16.26]
    assert [round(100 * x, 2) for x in lance["M"]] == [61.89, 54.37, 51.05]
    assert lance["n"]["CC"] == [[453, 507], [354, 452], [261, 380]] and lance["CC"] == pytest.approx([.8] * 3)
    assert lance["n"]["kind subject_add"] == [237] and result["profile"] == "EdiVal" and result["n"] == 572
    assert "proxy" not in (tmp_path / "edival" / "tables.md").read_text()


def test_two_models_are_compared_and_types_come_from_the_csv(tmp_path):
    """Catches: rows of two models paired by place and not by index; a report of EdiVal's that overwrites ours."""
    path, random_ = write_csv(tmp_path), random.Random(0)
    s = {str(i): [random_.randint(0, 1) for _ in range(3)] for i in DIALOGUES}
    write_results(tmp_path / "base_generation" / "multipass", s)
    write_results(tmp_path / "tuned_generation" / "multipass", {i: [1, 1, 1] for i in reversed(s)})
    (tmp_path / "results.json").write_text("ours")
    evaluation.main(["report", "--edival", str(tmp_path / "base_generation"), "--edival",
                     str(tmp_path / "tuned_generation" / "multipass"),
                     "--data", str(path), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "edival" / "results.json").read_text())
    assert (tmp_path / "results.json").read_text() == "ours" and result["arms"]["tuned"]["IF"] == [1, 1, 1]
    assert result["arms"]["base"]["M"] == pytest.approx(np.mean(list(s.values()), 0))
    assert result["arms"]["base"]["CC"] == [None] * 3
    assert result["arms"]["base"]["turns count_change"] == [None, None, s["10"][2]]


@pytest.mark.parametrize("spoil, expected", [("hole", "dialogue 10 has 2 of 3 turns"), ("sum", "different runs"),
                                             ("none", "holds no dialogues"),
                                             ("index", "scored on different dialogues: 3 and 2, index 11"),
                                             ("name", "two models are named 'base'")])
def test_results_that_cannot_be_compared_are_refused(tmp_path, spoil, expected):
    """Catches: a partial run averaged over whatever is complete, two files of different runs."""
    s = {i: [1, 0, 1] for i in DIALOGUES}
    write_results(tmp_path / "a" / "base_generation" / "multipass",
                  {i: s[i] for i in ([3, 10] if spoil == "index" else s)})
    spoilt = {"hole": s | {10: [1, 0]}, "none": {}}.get(spoil, s)
    folder = tmp_path / "b" / ("base_generation" if spoil == "name" else "tuned_generation")
    write_results(folder / "multipass", spoilt)
    if spoil == "sum":
        (folder / "multipass" / "task_rate.json").write_text(json.dumps({"overall": [1.] * 9}))
    with pytest.raises(ValueError, match=expected):
        evaluation.main(["report", "--edival", str(tmp_path / "a" / "base_generation"), "--edival", str(folder),
                         "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ our proxy

@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=2, image_size=16,
                             mlp_ratio=2)).save_pretrained(folder)
    return folder


def test_features_are_patch_similarities_without_the_edits_quarter(dino):
    """Catches: the class token among the patches, similarity of other places, an edit that costs consistency."""
    similarity = evaluation.load_features(dino)
    generator = torch.Generator().manual_seed(0)
    a, other = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    edited = a.clone()
    edited[:, :8, :8] = 255
    same, local, whole, swapped = similarity(torch.stack([torch.stack([a, b])
                                                          for b in (a, edited, other, a.flip(2))])).tolist()
    assert same == pytest.approx(1, abs=1e-5) and local > .98 > whole and local > swapped
    from transformers import AutoModel
    net, shift = AutoModel.from_pretrained(dino).eval(), torch.tensor([.485, .456, .406]).view(3, 1, 1)
    scale = torch.tensor([.229, .224, .225]).view(3, 1, 1)
    with torch.no_grad():
        # 256 patches of 2 x 2
        u, v = (net((x[None] / 255 - shift) / scale).last_hidden_state[0, 1:] for x in (a, other))
    by_hand = torch.cosine_similarity(u, v, dim=-1).sort().values[64:].mean().item()
    assert whole == pytest.approx(by_hand, abs=1e-4)


def test_edivals_data_by_our_judges_is_always_called_a_proxy(tmp_path, monkeypatch, dino):
    """Catches: a VLM's opinion published as EdiVal-IF; consistency after a background change, where EdiVal has none."""
    from test_eval import CopyEditor
    path = write_csv(tmp_path)
    monkeypatch.setattr(model, "load", lambda *_, **__: CopyEditor())
    monkeypatch.setattr(reward, "load", lambda *_, **__: Judge())
    evaluation.main(["--model", "x", "--data", str(path), "--images", str(tmp_path), "--resolution", "32",
                     "--denoise", "1", "--judge", "vlm",
                     "--features", str(dino),
                     "--out", str(tmp_path / "out")])
    out = tmp_path / "out"
    result = json.loads((out / "results.json").read_text())
    assert result["profile"] == "proxy" and result["arms"]["base"]["CC"] == pytest.approx([1] * 3, abs=1e-5)
    assert result["arms"]["base"]["n"]["CC"] == [[2], [2], [1]] and result["arms"]["base"]["n"]["EB"] == [3, 2, 2]
    assert all(f'"judge": "vlm + features {dino}"' in line for line in (out / "scores.jsonl").read_text().splitlines())
    for name in ("tables.md", "tables.tex", "report.html"):
        text = (out / name).read_text()
        assert "proxy IF 1" in text and "proxy O 3" in text and "roxy scores" in text
        assert text.count("EdiVal-IF") == text.count("not EdiVal-IF")
    assert {f.name for f in (out / "base_generation" / "multipass").iterdir()} == {
        f"{i}_input_raw{end}.png" for i in DIALOGUES for end in ("", "_turn_1", "_turn_2", "_turn_3")}
