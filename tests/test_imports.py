"""Who imports whom: files that promise to stand alone do, and heavy packages are loaded only where they are used."""
import ast
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {file.stem: file for file in ROOT.glob("*.py")}
NAMED = {"torch", "diffusers", "transformers", "safetensors", "pillow", "tqdm"}
BROUGHT = {"PIL", "numpy", "tokenizers", "huggingface_hub", "jinja2"}       # what these bring along


def imports(file, top_only=False):
    """Names of the modules that a file imports, up to the first dot; `top_only`: without those inside functions."""
    found, todo = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name} imports relatively: it could not be copied"
            found.add(node.module.split(".")[0])
        elif not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            todo += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("name", ["advantage", "grpo", "nft"])
def test_the_algorithm_files_stand_alone(name):
    """A file that is copied into another project and then asks for the rest of this one."""
    assert imports(FILES[name]) <= {"torch"} | sys.stdlib_module_names


def test_no_file_imports_itself_in_a_circle():
    """An import that works or fails depending on which file is loaded first."""
    left = {name: imports(file) & FILES.keys() for name, file in FILES.items()}
    assert {"model", "rollout", "reward", "data"} <= left["train"] and "grpo" in left["rollout"]
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("name", ["model", "reward"])
def test_diffusers_and_transformers_are_loaded_only_when_used(name):
    """Seconds of waiting before --help, or before a wrong flag is refused."""
    assert not imports(FILES[name], top_only=True) & {"diffusers", "transformers"}
    assert imports(FILES[name]) & {"diffusers", "transformers"}


def test_nothing_is_needed_that_requirements_do_not_name():
    """A package that happens to be on the author's machine, torchvision say: the first command fails on a fresh one."""
    ours = FILES.keys() | {"shapes", "bench"}
    for file in [*FILES.values(), *(ROOT / "shapes").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        optional = {"matplotlib"} if file.parent.name == "bench" else set()       # figures; without it one line says so
        assert imports(file) <= NAMED | BROUGHT | optional | ours | sys.stdlib_module_names, file.name
        assert not imports(file, top_only=True) & {"matplotlib"}, file.name
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {line.split(">")[0].strip() for line in lines if line and line[0] != "#"} == NAMED


def test_nobody_imports_bench_at_import_time():
    """Reports, plots and EdiVal on the way of somebody who only wants to train, or to read how."""
    seen, todo = set(), ["train"]
    while todo:
        name = todo.pop()
        if name in FILES and name not in seen:
            seen.add(name)
            todo += imports(FILES[name], top_only=True)
            assert "bench" not in imports(FILES[name], top_only=True), name
    assert seen == {"train", "model", "rollout", "reward", "advantage", "grpo", "nft", "data", "eval"}
    assert not {"bench", "jinja2", "matplotlib"} & set().union(*(imports(FILES[name]) for name in seen - {"eval"}))


def test_the_house_keeps_its_measures():
    """Lines that do not fit beside another window, functions that do not fit a screen."""
    for file in [*FILES.values(), *(ROOT / "bench").glob("*.py"), *(ROOT / "shapes").glob("*.py")]:
        text = file.read_text(encoding="utf-8")
        wide = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120]
        assert not wide, f"{file.name}: lines {wide} have more than 120 columns"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file.name}: {node.name} has more than 60 lines"


def test_every_option_of_train_has_a_help_sentence():
    """A flag that --help lists without a word."""
    import train
    for f in fields(train.Config):
        assert len(f.metadata.get("help", "")) > 7, f"--{f.name} has no help sentence"
    assert 20 < len(fields(train.Config)) <= 47          # --shard: a base that one GPU does not hold
