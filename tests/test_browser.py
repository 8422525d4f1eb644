"""report.html in a real browser: its controls do what they say, words stay words, nothing is asked of the network."""
import html
import json
import re
import shutil
import subprocess
import tempfile

import pytest

from bench import report
from fixtures import make_tasks
from test_report import K, NAN, make_arms, summarise

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed here")

# What would go to the network is forbidden, and noted; so is whatever goes wrong. Before anything else in the page.
WATCH = """<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline' data:">
<script>
  window.found = {blocked: [], errors: []};
  document.addEventListener('securitypolicyviolation', e => found.blocked.push(e.blockedURI));
  window.addEventListener('error', e => found.errors.push(e.message || e.target.outerHTML.slice(0, 80)), true);
</script>"""
# What a probe found is left in the page, where --dump-dom shows it.
TELL = """<script>
  window.addEventListener('load', () => {
    found.title = document.title;
    found.scripts = document.scripts.length;
    found.images = document.images.length;
    found.broken = [...document.images].filter(image => !image.naturalWidth).length;
    (() => { %s })();
    const place = document.createElement('pre');
    place.id = 'found';
    place.textContent = JSON.stringify(found);
    document.body.append(place);
  });
</script>"""

HELPERS = """
    const tasks = [...document.querySelectorAll('.task')];
    const shown = () => tasks.map((task, i) => task.offsetParent ? i : -1).filter(i => i >= 0);
    const look = task => ({
      now: [...task.querySelectorAll('li')].map(item => item.className),
      arms: [...task.querySelectorAll('.strip')].map(strip => {
        const large = strip.parentElement.querySelector('.large'), small = [...strip.children];
        return {which: small.findIndex(image => image.src == large.src), src: large.src, frame: large.className,
                now: small.map(image => image.classList.contains('now'))};
      })});
    const change = (control, value, event) => { control.value = value; control.dispatchEvent(new Event(event)); };
"""


def open_page(page, probe="", patience=60):
    """What `probe`, JavaScript that fills `found`, sees in a page that a browser has opened without a network."""
    assert page.count("<meta charset") == 1
    page = page.replace("<meta charset", WATCH + "<meta charset", 1) + TELL % (HELPERS + probe)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/page.html"
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 f"--user-data-dir={folder}/user", "--host-resolver-rules=MAP * ~NOTFOUND",
                 "--virtual-time-budget=5000", "--dump-dom", f"file://{path}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience)
    if done.returncode or "<html" not in done.stdout:
        pytest.skip(f"{BROWSER} does not start here: {done.stderr[-200:]}")
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two arms on 6 dialogues, one turn not judged: (page, arms, tasks)."""
    out, tasks = tmp_path_factory.mktemp("browser"), make_tasks(6, K=K)
    arms = make_arms({"base": .5, "tuned": .8}, 6)
    arms["tuned"].success[0, 2, 1] = NAN
    for task, kinds in zip(tasks, (["add", "add object", "move"], ["add object", "move", "move"])):
        task.kinds = kinds                       # one kind is a part of another
    report.write_report(out, summarise(arms, tasks), arms, tasks)
    return (out / "report.html").read_text(encoding="utf-8"), arms, tasks


def test_the_slider_changes_the_pictures_that_are_shown(written):
    """Catches: a slider that moves and shows nothing new, the turn before or after, or another arm's frame; a click
    that moves all dialogues; a picture that does not load."""
    page, arms, tasks = written
    seen = open_page(page, """
    const slider = document.getElementById('turn');
    found.start = look(tasks[0]);
    found.turns = [1, 2, 3].map(k => { change(slider, k, 'input');
                                       return [document.getElementById('shown').textContent, tasks.map(look)]; });
    tasks[1].querySelectorAll('.strip')[1].children[0].click();
    found.clicked = tasks.map(look);""")
    assert (seen["errors"], seen["broken"], seen["blocked"]) == ([], 0, []) and seen["images"] > 6 * (1 + 2 * (1 + K))
    frames = {0: "large no now", 1: "large ok now"}

    def check(looks, k, first=0):
        for row, found in enumerate(looks, first):
            assert [name.split() for name in found["now"]] == [["now"] * (j == k) for j in range(K)]
            for arm, large in zip(arms.values(), found["arms"]):
                picture = report.Image.fromarray(arm.pictures(row)[k + 1].permute(1, 2, 0).numpy())
                assert large["src"] == report.inline(picture, 256) and large["which"] == k
                assert large["now"] == [j == k for j in range(K)]
                assert large["frame"] == frames.get(arm.success[0, row, k].item(), "large unknown now")
    check([seen["start"]], K - 1)
    assert len({large["src"] for _, looks in seen["turns"] for large in looks[1]["arms"]}) == K
    for k, (number, looks) in enumerate(seen["turns"]):
        assert number == str(k + 1)
        check(looks, k)
    check(seen["clicked"][1:2], 0, first=1)
    assert seen["clicked"][0] == seen["turns"][2][1][0] and seen["clicked"][2:] == seen["turns"][2][1][2:]


def test_the_filters_show_the_dialogues_that_they_name_and_no_others(written):
    """Catches: a filter that shows all or nothing, an outcome of the other arm, a count that is not what is shown,
    an edit type taken for another one whose name holds it, two filters of which one counts."""
    page, arms, tasks = written
    seen = open_page(page, """
    const selects = [...document.querySelectorAll('.bar select')];
    const count = () => document.getElementById('count').textContent;
    found.before = [shown(), count()];
    found.each = {};
    for (const select of selects)
      for (const option of [...select.options]) {
        change(select, option.value, 'change');
        found.each[select.name + ' ' + option.value] = [shown(), count()];
        change(select, '', 'change');
      }
    change(selects[1], 'fail1', 'change');
    change(selects[2], 'yes', 'change');
    found.both = shown();
    change(selects[1], '', 'change');
    change(selects[2], '', 'change');
    found.after = [shown(), count()];""")
    everything = [list(range(6)), "6 dialogues shown"]
    assert seen["before"] == seen["after"] == everything and seen["errors"] == []

    s = [arm.success[0].tolist() for arm in arms.values()]
    for choice, (rows, count) in seen["each"].items():
        name, _, value = choice.partition(" ")
        if not value:
            wanted = list(range(6))
        elif name == "kind":
            wanted = [row for row, task in enumerate(tasks) if value in task.kinds[:K]]
        else:
            of_arm = s[int(name.removeprefix("arm"))]
            holds = {"yes": lambda turns: turns == [1, 1, 1], "no": lambda turns: 0 in turns}
            holds |= {f"fail{k + 1}": lambda turns, k=k: turns[k] == 0 for k in range(K)}
            wanted = [row for row, turns in enumerate(of_arm) if holds[value](turns)]
        assert rows == wanted, choice
        assert count == f"{len(wanted)} dialogue{'s' * (len(wanted) != 1)} shown"
    kinds = {kind for task in tasks for kind in task.kinds[:K]}
    assert len(seen["each"]) == 1 + len(kinds) + 2 * (3 + K) and seen["each"]["kind add"][0] == [0]
    assert seen["both"] == [row for row in range(6) if s[0][row][0] == 0 and s[1][row] == [1, 1, 1]]


HACKS = ["</li></ol><script>document.title='hacked'</script>", "<img src=x onerror=\"document.title='hacked'\">",
         "</script><svg onload=document.title='hacked'>", "{{ 7 * 7 }} \" onmouseover=\"document.title='hacked'\" '",
         "<iframe src=\"http://example.com/\"></iframe><link rel=stylesheet href=//example.com/x.css>",
         r"$\frac{$ | of a dollar"]                                          # which figures would take for mathematics


def test_words_of_strangers_are_shown_and_not_run(tmp_path):
    """Catches: a template without escapes, in an instruction, a kind, an arm's or a dialogue's name, what the judge or
    the data are called: whoever opens the report runs what a task file says, or tells somebody that he opened it."""
    tasks = make_tasks(6, K=K)
    for row, (task, hack) in enumerate(zip(tasks, HACKS)):
        task.instructions[row % K], task.kinds[row % K], task.meta["index"] = f"say {hack}", f"kind {hack}", hack
    arms = make_arms({"base": .5, "<img src=x onerror=document.title='hacked'>": .8}, 6)
    result = summarise(arms, tasks, data=HACKS[0], judge=HACKS[1], model=HACKS[2], note=HACKS[4])
    report.write_report(tmp_path, result, arms, tasks)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    seen = open_page(page, """
    found.told = tasks.map(task => [...task.querySelectorAll('li')].map(item => item.firstChild.textContent.trim()));
    found.names = tasks.map(task => task.querySelector('.told .note').textContent);
    found.arms = [...tasks[0].querySelectorAll('.arm b')].map(place => place.textContent);
    found.kinds = [...document.querySelectorAll('[name=kind] option')].map(option => option.value);
    found.strange = document.querySelectorAll('iframe, link, svg, [onerror], [onload], [onmouseover]').length;
    const select = document.querySelector('[name=kind]');
    found.filtered = found.kinds.slice(1).map(kind => { change(select, kind, 'change'); return shown(); });""")
    assert seen["title"] == "Multi-turn evaluation" and seen["strange"] == 0
    assert (seen["errors"], seen["blocked"], seen["broken"]) == ([], [], 0)
    assert seen["scripts"] == 1 + 2, "another script than the report's own and the two of this test"
    assert seen["told"] == [task.instructions[:K] for task in tasks]
    assert seen["names"] == [f"dialogue {hack}" for hack in HACKS] and seen["arms"][1:] == list(arms)
    assert set(seen["kinds"]) == {kind for task in tasks for kind in task.kinds[:K]} | {""}
    for kind, rows in zip(seen["kinds"][1:], seen["filtered"]):
        assert rows == [row for row, task in enumerate(tasks) if kind in task.kinds[:K]]
    tables = (tmp_path / "tables.md").read_text()
    assert not re.search(r"(?<!\\)<[a-zA-Z/!?]", tables), "a viewer of Markdown would take it for HTML"


def test_nothing_is_asked_of_the_network(written):
    """Catches: a font, a script or a picture from somewhere: a report that looks different without a network, and tells
    others that it is read. What this test relies on is tried as well: such a page, and a script that runs, are seen."""
    page = written[0]
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", page.partition("<script>")[0])
    assert len(links) > 50 and all(link.startswith("data:image/") for link in links)
    assert not re.search(r"url\(|@import|https?:", page.partition("<script>")[0])
    assert not re.search("fetch|XMLHttp|import|WebSocket|sendBeacon|https?:", page.partition("<script>")[2])
    assert open_page(page)["blocked"] == []
    for foreign in ('<img src="http://example.com/x.png">', '<script src="https://example.com/x.js"></script>',
                    '<link rel="stylesheet" href="https://example.com/x.css">'):
        seen = open_page(page.replace("<h1>", foreign + "<h1>"))
        assert len(seen["blocked"]) == 1 and seen["blocked"][0].startswith("http")
    assert open_page(page.replace("<h1>", HACKS[0] + "<h1>"))["title"] == "hacked"
