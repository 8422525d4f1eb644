"""README.md and docs/results.md: the means and the differences with intervals that they give are those of results/."""
import json
import re

import pytest

from bench import study_report
from fixtures import ROOT

NUMBER = r"([+-]?\d*\.\d{3})"
# A difference with its interval, in a table or a sentence: **+.114** [+.081, +.148]
DIFFERENCE = re.compile(rf"{NUMBER}\**\s\[{NUMBER}, {NUMBER}\]")
# The tables of arms: (file, how their first line begins, the columns).
COLUMNS = [("O", 1), ("O", 2), ("O", 3), ("IF", 3), ("CC", 3), ("room", 3), ("M_clean", 3)]
TABLES = [("README.md", "| | O after turn 1 |", COLUMNS),
          ("docs/results.md", "| | O_1 | O_2 | O_3 | IF_3 | CC_3 | possible, 3 turns |", [*COLUMNS, ("O", 5)])]
STUDIES = sorted(file.parent.name for file in (ROOT / "results").glob("*/study.json"))


def written(values):
    """Numbers as they are compared: three digits, no sign of a zero."""
    return tuple(f"{float(value):+.3f}".replace("-0.000", "+0.000") for value in values)


@pytest.fixture(scope="module")
def arms():
    """The metrics of every arm with their resamples: {study: {arm: {metric: (1 + samples, turns)}}}."""
    return {name: study_report.estimate(study_report.read(ROOT / "results" / name))[0] for name in STUDIES}


@pytest.fixture(scope="module")
def held(arms):
    """What each study's evidence says of every arm, and every two arms: {study: {(value, lower end, upper end)}}."""
    columns = [*study_report.COLUMNS, *((name, name, k) for name in study_report.BY_TURN for k in (1, 2, 3))]
    held = {name: set() for name in STUDIES}
    for name, of_study in arms.items():
        for a, metrics in of_study.items():
            for b in of_study:
                for _, metric, turn in [column for column in columns if column[1] in metrics]:
                    draws = study_report.at(metrics[metric], turn)
                    if a != b:
                        draws = draws - study_report.at(of_study[b][metric], turn)
                    bounds = study_report.interval(draws[1:])
                    if bounds:
                        held[name].add(written([draws[0], *bounds]))
    return held


def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


def stated(text):
    """The differences with intervals that a text gives."""
    return {written(numbers) for numbers in DIFFERENCE.findall(text)}


def test_the_readme_says_what_the_evidence_says(held):
    """Catches: a number of an earlier run that was left when the runs were made anew, a misprint."""
    said = stated(read("README.md"))
    assert len(said) >= 20 and not said - set().union(*held.values())


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_of_a_study_say_what_its_evidence_says(name, held):
    """Catches: as above, study by study."""
    section = re.search(rf"^### {name}: .*?(?=^##)", read("docs/results.md"), re.M | re.S)[0]
    said = stated(section if name == "algorithms" else "\n".join(re.findall(r"^\|.*", section, re.M)))
    assert len(said) >= 3 and not said - held[name]


@pytest.mark.parametrize("file, first, columns", TABLES)
def test_the_means_of_the_arms_are_those_of_the_evidence(file, first, columns, arms):
    """Catches: as above, in the tables that have no intervals."""
    means = set()
    for of_study in arms.values():
        for metrics in of_study.values():
            means.add(written(metrics[name][0, turn - 1] for name, turn in columns))
    lines = read(file).split(first)[1].split("\n\n")[0].splitlines()[2:]
    said = {written(re.findall(r"(?<=\| )\.\d{3}(?= \|)", line)) for line in lines}
    assert len(said) >= 5 and not said - means


@pytest.mark.parametrize("name", STUDIES)
def test_the_results_of_a_study_are_those_of_its_scores(name, held):
    """Catches: results.json of other runs than scores.json."""
    for metrics in json.loads(read(f"results/{name}/results.json"))["arms"].values():
        for found in metrics.values():
            if found["interval_95"]:
                assert written([found["value"], *found["interval_95"]]) in held[name]
