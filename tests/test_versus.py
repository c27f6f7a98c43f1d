"""studies/versus.py: its statistics against closed forms and brute force, its page without and
within a real browser, what it says of votes whose answers are known, and of mistakes."""
import base64
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import versus  # noqa: E402

import train  # noqa: E402

KEY = "00112233445566778899aabbccddeeff"
PROMPTS = [f"a thing of kind {i}" for i in range(12)]


def clips_with_signs(n=12, T=4, size=8):
    """Clips whose every frame tells run, prompt and frame by its colour: red, green, blue."""
    clips = torch.empty(2, n, 3, T, size, size)
    for run, i, t in itertools.product(range(2), range(n), range(T)):
        clips[run, i, :, t] = torch.tensor([40 + 100 * run, 10 + 20 * i, 20 + 50 * t]
                                           ).view(3, 1, 1) / 127.5 - 1
    return dict(zip("AB", clips))


@pytest.fixture
def page(tmp_path):
    versus.write_page(tmp_path / "out", ["runs/secret-one", "runs/secret-two"], PROMPTS,
                      clips_with_signs(), 8, KEY)
    return tmp_path / "out"


def read(folder):
    """The key, and what the page holds."""
    text = (folder / "versus.html").read_text(encoding="utf-8")
    return (json.loads((folder / "key.json").read_text(encoding="utf-8")),
            json.loads(re.search(r"^const page = (.*);$", text, re.M)[1]))


def cast(folder, name, choose, axes=tuple(versus.AXES)):
    """Save votes as the page does; choose(axis, pair of the key) -> left, tie or right."""
    key, _ = read(folder)
    votes = [{"axis": axis, "pair": pair["id"], "vote": choose(axis, pair)}
             for axis in axes for pair in key["pairs"]]
    path = folder / f"votes-{name}.json"
    path.write_text(json.dumps({"page": key["page"], "rater": name, "votes": votes}), "utf-8")
    return path


def command(*words):
    """The command line in this process -> (exit status, what it printed, what it complained)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["versus.py", *map(str, words)])
        try:
            versus.main()
            code = 0
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def table(printed):
    """The lines of both tables, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in printed.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


# ---- statistics ----

def test_net_win_rate_and_its_half_width():
    assert versus.net_win_rate([1, 1, 1, 0, -1]) == 40
    assert versus.net_win_rate([-1]) == -100
    # one vote has variance E v^2 - (E v)^2; and figures read off for 20 % ties
    votes = [1] * 45 + [-1] * 37 + [0] * 18
    assert versus.half_width(45, 37, 100) == pytest.approx(
        196 * np.std(votes) / math.sqrt(len(votes)))
    assert versus.half_width(0.45 * 1003, 0.37 * 1003, 1003) == pytest.approx(5.6, abs=0.05)
    assert versus.half_width(0.45 * 381, 0.37 * 381, 381) == pytest.approx(9.1, abs=0.05)


def test_sign_test_against_every_throw_of_coins():
    for n in range(9):
        for wins in range(n + 1):
            throws = [abs(2 * sum(coins) - n) for coins in itertools.product((0, 1), repeat=n)]
            assert versus.sign_test(wins, n - wins) == pytest.approx(
                sum(t >= abs(2 * wins - n) for t in throws) / len(throws))


def test_sign_test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((30, 12), (5, 200), (77, 77)):
        assert versus.sign_test(wins, losses) == pytest.approx(
            stats.binomtest(wins, wins + losses).pvalue)


def test_bootstrap_of_one_vote_a_prompt_is_the_normal_interval():
    votes = [1] * 200 + [0] * 80 + [-1] * 120
    low, high = versus.bootstrap([[v] for v in votes])
    half = versus.half_width(200, 120, 400)
    assert low == pytest.approx(20 - half, abs=0.7)
    assert high == pytest.approx(20 + half, abs=0.7)


def test_bootstrap_draws_prompts_and_not_votes():
    """Raters who always agree add votes and no knowledge."""
    votes = [1] * 30 + [-1] * 20
    assert versus.bootstrap([[v] * 9 for v in votes]) == versus.bootstrap([[v] for v in votes])


def test_bootstrap_against_all_draws_of_three_prompts():
    prompts = [[1, 1, 0], [-1], [0, 1]]
    rates = [100 * sum(map(sum, drawn)) / sum(map(len, drawn))
             for drawn in itertools.product(prompts, repeat=3)]
    # each end is one draw of 27, which is more than 2.5 %
    assert versus.bootstrap(prompts) == pytest.approx((min(rates), max(rates)))
    prompts = [[1, -1], [1, 1], [0], [-1], [1]]             # and of five: 3125 draws
    rates = [100 * sum(map(sum, drawn)) / sum(map(len, drawn))
             for drawn in itertools.product(prompts, repeat=5)]
    assert versus.bootstrap(prompts) == pytest.approx(np.quantile(rates, (0.025, 0.975)), abs=4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    g, held = random.Random(0), 0
    for _ in range(300):
        votes = g.choices((1, 0, -1), (0.5, 0.2, 0.3), k=60)
        low, high = versus.bootstrap([[v] for v in votes], draws=400)
        held += low <= 20 <= high
    assert 0.91 < held / 300 < 0.98


def test_majority():
    for votes, most in (([1, 1, -1], 1), ([1, 0, -1], 0), ([1, -1], 0), ([-1], -1), ([0, 0, 1], 0),
                        ([1, 1, 0, -1], 0), ([-1, -1, -1, 1], -1)):
        assert versus.majority(votes) == most


def test_agreement():
    assert versus.agreement([[1], [0]]) is None
    assert versus.agreement([[1, 1, 1], [0, 0], [-1]]) == (1, pytest.approx((9 + 4) / 25))
    assert versus.agreement([[1, 0, 0]])[0] == pytest.approx(1 / 3)
    g = random.Random(0)                                # raters who throw dice agree by chance
    alike, chance = versus.agreement([g.choices((1, 0, -1), (5, 2, 3), k=3) for _ in range(3000)])
    assert chance == pytest.approx(0.38, abs=0.01) and alike == pytest.approx(chance, abs=0.02)


# ---- the page ----

def test_pairs_are_balanced_and_follow_from_the_key():
    for n in (1, 10, 57, 60):
        pairs = versus.make_pairs(n, KEY)
        assert pairs == versus.make_pairs(n, KEY)
        assert len({pair["id"] for pair in pairs}) == len(pairs) == n + 3 * math.ceil(n / 10)
        for kind in ("rated", "swapped", "identical", "planted"):
            lefts = [pair["left"] for pair in pairs if pair["kind"] == kind]
            assert abs(sum(lefts)) <= 1, "A stands on the left as often as B"
        of = lambda kind: {p["prompt"]: (i, p) for i, p in enumerate(pairs) if p["kind"] == kind}  # noqa: B023
        rated = of("rated")
        assert sorted(rated) == list(range(n))
        for i, (later, pair) in of("swapped").items():
            first, other = rated[i]
            assert first < later and pair["left"] == -other["left"]
    other = versus.make_pairs(60, KEY[::-1])
    assert [p["left"] for p in other] != [p["left"] for p in pairs]
    assert not {p["id"] for p in other} & {p["id"] for p in pairs}


def test_the_side_of_a_pair_is_no_function_of_its_place():
    """Over many keys: pair after pair, A is left in about half of the pages."""
    share = torch.tensor([[pair["left"] == 1 for pair in versus.make_pairs(10, f"{k:032x}")]
                          for k in range(400)]).float().mean(0)
    assert (share - 0.5).abs().max() < 0.1


def test_the_page_holds_the_clips_that_the_key_names_and_no_name_of_a_run(page):
    from PIL import Image
    text = (page / "versus.html").read_text(encoding="utf-8")
    assert "secret" not in text and KEY not in text and not re.search("rated|planted|swap", text)
    assert not re.search(r"https?:|src=|@import|url\(", text), "it needs nothing from elsewhere"
    key, shown = read(page)
    truth = {(run, i): clip for run, clips in clips_with_signs().items()
             for i, clip in enumerate(clips)}
    for pair, known in zip(shown["pairs"], key["pairs"], strict=True):
        assert pair["id"] == known["id"] and pair["prompt"] == PROMPTS[known["prompt"]]
        clips = []
        for number in pair["clips"]:
            png = base64.b64decode(shown["clips"][number].partition(",")[2])
            image = np.array(Image.open(io.BytesIO(png)))
            clips.append(torch.tensor(image).view(8, 4, 8, 3).permute(3, 1, 0, 2) / 127.5 - 1)
        clips = clips[::known["left"]]                  # A, or the good one, first
        i = known["prompt"]
        same = lambda clip, run: torch.allclose(clip, truth[run, i], atol=0.01)     # noqa: B023
        if known["kind"] in ("rated", "swapped"):
            assert same(clips[0], "A") and same(clips[1], "B")
        elif known["kind"] == "identical":
            assert pair["clips"][0] == pair["clips"][1] and (same(clips[0], "A")
                                                             or same(clips[0], "B"))
        else:
            assert same(clips[0], "AB"[i % 2]) and (clips[0] - clips[1]).abs().mean() > 0.2


def test_prompts_cannot_end_the_script(tmp_path):
    evil = ["</script><b>PAGE", "<!--<script>", *PROMPTS[2:]]
    versus.write_page(tmp_path, ["a", "b"], evil, clips_with_signs(), 8, KEY)
    text = (tmp_path / "versus.html").read_text(encoding="utf-8")
    assert text.count("</script>") == text.count("<script>") == 1
    assert {pair["prompt"] for pair in read(tmp_path)[1]["pairs"]} == set(evil)


# ---- the count ----

BETTER = {1: "left", 0: "tie", -1: "right"}


def wants(pair, what):
    """The side on which a vote counts `what`: 1 for A, -1 for B."""
    return BETTER[what * pair["left"]]


def fair(what):
    """A careful rater, who votes `what` on what is rated."""
    return lambda axis, pair: wants(
        pair, {"identical": 0, "planted": 1}.get(pair["kind"], what(axis, pair["prompt"])))


def test_votes_for_a_run_are_counted_for_it(page):
    a, b = (cast(page, name, fair(lambda axis, i: {"overall": 1, "text": -1, "motion": i % 3 - 1
                                                   }[axis])) for name in ("anna", "ben"))
    code, printed, _ = command("--count", a, b, "--out", page)
    assert code == 0 and "A: runs/secret-one\nB: runs/secret-two\n12 prompts; raters: 2" in printed
    rows = table(printed)
    assert rows["overall"] == ["24 / 0 / 0", "+100.0", "+100.0 to +100.0", "12 / 0 / 0",
                               "+100.0 +- 0.0, p = 0.00049", "1.00 (1.00)", "0.0", "A"]
    assert rows["text"][0] == "0 / 0 / 24" and rows["text"][-1] == "B"
    assert rows["motion"][0] == "8 / 8 / 8" and rows["motion"][1] == "+0.0"
    assert rows["motion"][-1] == "not decided" and rows["motion"][5] == "1.00 (0.33)"
    for name in ("anna", "ben"):
        assert rows[name][0] == "54" and rows[name][2:] == ["6 of 6", "6 of 6", "0 of 6", "6 of 6"]
    assert rows["all"][0] == "108" and rows["all"][-1] == "12 of 12"


def test_a_rater_who_presses_one_key_is_seen_and_moves_nothing(page):
    path = cast(page, "lefty", lambda axis, pair: "left")
    rows = table(command("--count", path, "--out", page)[1])
    for axis in versus.AXES:
        assert rows[axis][0] == "6 / 0 / 6" and rows[axis][1] == "+0.0"
        assert rows[axis][5] == "one rater" and rows[axis][-1] == "not decided"
    votes, left, identical, same, opposite, planted = rows["lefty"]
    assert left.startswith("1.00, p = ") and float(left.split()[-1]) < 1e-6
    assert (identical, same, opposite, planted) == ("0 of 6", "0 of 6", "6 of 6", "3 of 6")
    # a and -a: variance 2 of one vote, standard deviation of the mean of 12 votes
    assert float(rows["overall"][6]) == pytest.approx(100 * math.sqrt(2 / 12), abs=0.05)


def test_majority_agreement_and_an_unfinished_pass(page):
    likes = [cast(page, f"r{k}", fair(lambda axis, i, k=k: 1 if i < 4 or k == 0 else -1), axes)
             for k, axes in enumerate((("overall", "text"), ("overall",), ("overall",)))]
    rows = table(command("--count", *likes, "--out", page)[1])
    assert rows["overall"][0] == "20 / 0 / 16" and rows["overall"][3] == "4 / 0 / 8"
    assert rows["overall"][1] == "+11.1" and rows["overall"][4].startswith("-33.3 +- ")
    # four prompts alike, in eight one pair of three; by chance 20/36 and 16/36
    assert rows["overall"][5] == f"{(4 + 8 / 3) / 12:.2f} ({(20**2 + 16**2) / 36**2:.2f})"
    assert rows["text"][0] == "12 / 0 / 0" and rows["motion"][-1] == "no votes"


def test_five_prompts_decide_nothing(tmp_path):
    clips = {run: clips[:5] for run, clips in clips_with_signs().items()}
    versus.write_page(tmp_path, ["a", "b"], PROMPTS[:5], clips, 8, KEY)
    path = cast(tmp_path, "eve", fair(lambda axis, i: 1))
    rows = table(command("--count", path, "--out", tmp_path)[1])
    assert rows["overall"][2] == "+100.0 to +100.0" and rows["overall"][-1] == "not decided"


@pytest.mark.parametrize("content, said", [
    ("{", "damaged (JSONDecodeError"), ("[]", "damaged (TypeError"), ("\xff", "damaged ("),
    ({"rater": None}, "no votes"), ({"votes": []}, "no votes"), ({"votes": 3}, "damaged ("),
    ({"page": "0123"}, "votes of another page"), ({"votes": [{"axis": "overall"}]}, "damaged ("),
    ({"votes": [{"axis": "taste", "pair": "PAIR", "vote": "left"}]}, "damaged (ValueError: no que"),
    ({"votes": [{"axis": "text", "pair": "none", "vote": "left"}]}, "damaged (KeyError"),
    ({"votes": [{"axis": "text", "pair": "PAIR", "vote": "up"}]}, "damaged (KeyError")])
def test_votes_that_cannot_be_counted(page, content, said):
    key, path = read(page)[0], page / "votes.json"
    if isinstance(content, dict):
        content = json.dumps({"page": key["page"], "rater": "eve", "votes": []} | content)
    path.write_bytes(content.replace("PAIR", key["pairs"][0]["id"]).encode("latin1"))
    code, printed, line = command("--count", path, "--out", page)
    assert code == 2 and not printed
    assert line.count("\n") == 1 and line.startswith(f"versus.py: {path}: {said}"), line


def test_other_mistakes_with_votes(page):
    path = cast(page, "eve", lambda axis, pair: "tie")
    for words, said in (
            (["--count", path, path, "--out", page], f"{path}: the same rater as in {path}"),
            (["--count", page / "none.json", "--out", page], "No such file"),
            (["--count", path, "--out", page / "none"], f"{page / 'none' / 'key.json'}: not there"),
            (["--count", path, "--out", page, "runs/a"], "RUN_A RUN_B: "),
            (["runs/a"], "RUN_A RUN_B: "), ([], "RUN_A RUN_B: "),
            (["a", "b", "--prompts", "0"], "0: not a whole number, 1 or more"),
            (["a", "b", "--prompts", "3", "--prompt-file", "f"], "not allowed with"),
            (["a", "b", "--out", page], f"--out {page}: holds a page")):
        code, printed, line = command(*words)
        assert code == 2 and not printed and line.count("\n") == 1 and said in line, line
    (page / "key.json").write_text('{"page": "12', encoding="utf-8")
    code, _, line = command("--count", path, "--out", page)
    assert code == 2 and line.startswith(f"versus.py: {page / 'key.json'}: damaged ("), line


# ---- two runs ----

def stand_in(frames=4, size=8, data="", fps=8):
    """What load_run gives, of a run whose clips tell their seed."""
    clips = train.ClipConfig(frames=frames, size=size, fps=fps)
    made = lambda prompts, seeds: torch.stack([torch.full((3, frames, size, size), seed / 100)
                                               for _, seed in zip(prompts, seeds, strict=True)])
    return SimpleNamespace(cfg=train.Config(data=data, clips=clips, sample=train.SampleConfig(
        batch=5)), fps=fps, generate=made)


@pytest.fixture
def two_runs(monkeypatch):
    """RUNs one and two are stand-ins; the dict can be changed."""
    runs = {"one": stand_in(), "two": stand_in()}
    monkeypatch.setattr(train, "load_run", lambda path: runs[str(path)])
    return runs


def test_the_toys_prompts(two_runs, tmp_path):
    code, printed, _ = command("one", "two", "--prompts", 12, "--out", tmp_path / "a")
    assert code == 0 and "18 pairs, 3 questions, about 5 minutes" in printed
    key, _ = read(tmp_path / "a")
    assert len(key["prompts"]) == 12 and key["A"] == "one" and key["B"] == "two"
    command("one", "two", "--prompts", 12, "--out", tmp_path / "b")
    again, _ = read(tmp_path / "b")
    assert again["prompts"] == key["prompts"] and again["key"] != key["key"]


def test_prompts_of_a_file_and_what_cannot_be_compared(two_runs, tmp_path):
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("\ufeffa hand\n\n  un café \r\n two\u2028one\n", encoding="utf-8")
    assert command("one", "two", "--prompt-file", file, "--out", out)[0] == 0
    assert read(out)[0]["prompts"] == ["a hand", "un café", "two\u2028one"]

    def complaint(*words):
        code, printed, line = command("one", "two", "--out", tmp_path / "other", *words)
        assert code == 2 and not printed and line.count("\n") == 1, line
        assert not (tmp_path / "other").exists()
        return line
    file.write_text("\n \n", encoding="utf-8")
    assert f"--prompt-file {file}: holds no prompts" in complaint("--prompt-file", file)
    file.write_bytes(b"\xff")
    assert "not a text in UTF-8" in complaint("--prompt-file", file)
    assert "No such file" in complaint("--prompt-file", tmp_path / "none.txt")
    two_runs["one"] = stand_in(data="videos")
    assert "--prompt-file: needed" in complaint()
    two_runs["one"] = stand_in(frames=9)
    assert "clips differ: 9x8x8 at 8 fps in one, 4x8x8 at 8 fps in two" in complaint()
    two_runs["one"] = stand_in(fps=12)
    assert "clips differ" in complaint()


def test_a_run_that_is_not_there_or_not_finished(tmp_path):
    train.write_json(tmp_path / "begun/config.json", {})
    for name, said in (("none", "no run there"), ("begun", "not finished")):
        code, _, line = command(tmp_path / name, tmp_path / name, "--out", tmp_path / "out")
        assert code == 2 and line.count("\n") == 1 and said in line, line


@pytest.mark.slow
def test_clips_of_a_real_run(tmp_path):
    """A tiny run against itself: each of its clips is on the page, and no other."""
    import test_train
    assert test_train.run(tmp_path / "run") == 0
    code, _, said = command(tmp_path / "run", tmp_path / "run", "--prompts", 5, "--out", tmp_path)
    assert code == 0, said
    key, page = read(tmp_path)
    clips = train.load_run(tmp_path / "run").generate(key["prompts"])
    rated = {number for shown, pair in zip(page["pairs"], key["pairs"])
             if pair["kind"] == "rated" for number in shown["clips"]}
    assert len(rated) == 10
    assert {page["clips"][i] for i in rated} == {versus.sheet(clip) for clip in clips}


# ---- a real browser ----

def wait(condition, seconds=120):
    """Ask until the answer is yes, and give it."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.02)
    return answer


class Browser:
    """Headless Chromium, driven over its pipe: JSON messages that end in a zero byte."""

    def __init__(self, program, profile):
        (theirs_in, out), (inn, theirs_out) = os.pipe(), os.pipe()
        fds = [os.dup(fd) for fd in (theirs_in, theirs_out)]        # none is 3 or 4 by chance
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{fds[0]} 4>&{fds[1]}', "bash", program, "--headless=new",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             f"--user-data-dir={profile}", "--remote-debugging-pipe", "--window-size=1100,800",
             "about:blank"], pass_fds=fds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (theirs_in, theirs_out, *fds):
            os.close(fd)
        self.out, self.inn = os.fdopen(out, "wb"), os.fdopen(inn, "rb")
        self.rest, self.number, self.session = b"", 0, {}

    def call(self, method, **params):
        """Send a command, wait for its own answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while True:
            text, found, self.rest = self.rest.partition(b"\0")
            if not found:
                ready = select.select([self.inn], [], [], 120)[0]
                more = ready and os.read(self.inn.fileno(), 1 << 20)
                assert more, f"{method}: " + ("Chromium ended" if ready else "no answer in 120 s")
                self.rest = text + more
                continue
            answer = json.loads(text)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise LookupError(method, answer["error"])
                return answer["result"]

    def open(self, address):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target,
                                               flatten=True)["sessionId"]}
        self.call("Page.enable")
        self.go(address)

    def go(self, address):
        """Load the page; where it has a #, it is about to load again, and may have no answer."""
        def ready():
            with contextlib.suppress(LookupError):
                return self.js("document.readyState === 'complete' && typeof todo === 'object'"
                               " && !location.hash")
        self.call("Page.navigate", url=address)
        wait(ready)

    def js(self, code):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in answer, (code, answer)
        return answer["result"].get("value")

    def until(self, code):
        wait(lambda: self.js(code))

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def close(self):
        with contextlib.suppress(OSError, AssertionError, LookupError):
            self.call("Browser.close")
        self.process.wait(60)
        self.out.close(); self.inn.close()


@pytest.fixture
def browser():
    program = next(filter(None, map(shutil.which, (
        "chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no Chromium found")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        yield browser
        browser.close()


ARROWS = {"left": "ArrowLeft", "tie": "ArrowDown", "right": "ArrowRight"}
COLOURS = ("canvases.map(c => [...c.getContext('2d').getImageData(3, 3, 1, 1).data].slice(0, 3))")


@pytest.mark.slow
def test_votes_are_cast_saved_and_counted_in_a_browser(browser, page):
    key, _ = read(page)
    pairs = {pair["id"]: pair for pair in key["pairs"]}
    address = (page / "versus.html").as_uri()
    browser.open(address)
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(page))
    assert browser.js("document.querySelectorAll('canvas').length") == 2
    choose = fair(lambda axis, i: {"overall": 1, "text": 0, "motion": -1 if i < 8 else 1}[axis])

    browser.press("ArrowLeft")                                  # on a card no vote is taken
    assert browser.js("state.votes.length") == 0
    expected, done = [], 0
    for axis in versus.AXES:
        assert browser.js("document.body.className") == "card"
        browser.press("Enter")
        for _ in key["pairs"]:
            browser.until("shown !== null")
            pair = pairs[browser.js(f"todo[{done}].pair.id")]
            # the clips that the key names, on the sides that it names, and in step
            two = browser.js(f"draw(2.1 / page.fps), {COLOURS}")
            assert two[0][2] == two[1][2] == 120 or pair["kind"] == "planted"
            if pair["kind"] in ("rated", "swapped"):
                assert [c[0] for c in two[::pair["left"]]] == [40, 140]
                assert {c[1] for c in two} == {10 + 20 * pair["prompt"]}
            elif pair["kind"] == "identical":
                assert two[0] == two[1]
            assert browser.js("document.querySelector('#text').textContent"
                              ) == PROMPTS[pair["prompt"]]
            vote = choose(axis, pair)
            if done % 11 == 3:                                  # a slip, taken back
                browser.press(ARROWS["left" if vote != "left" else "right"])
                assert browser.js("state.votes.length") == done + 1
                browser.press("Backspace")
                assert browser.js("state.votes.length") == done
                browser.until("shown !== null")
            if done == 25:                                      # closed, and opened again
                browser.go(address)
                assert browser.js("state.votes.length") == done
                browser.press("Enter")
                browser.until("shown !== null")
            if done == 30:                                      # a button does what its key does
                browser.js(f"document.querySelector('[data-do={vote}]').click()")
            else:
                browser.press(ARROWS[vote])
            done += 1
            expected.append({"axis": axis, "pair": pair["id"], "vote": vote})
            assert browser.js("state.votes.length") == done
    browser.press("ArrowLeft")                                  # there is no pair left
    assert "Thank you" in browser.js("document.body.innerText")

    # the clock: some frames are drawn on both canvases by itself, and always the same on both
    browser.press("Backspace"); browser.until("shown !== null")
    assert pairs[expected[-1]["pair"]]["kind"] != "planted"
    seen = set()

    def all_frames():
        left, right = browser.js(COLOURS)
        assert left[2] == right[2]
        seen.add(left[2])
        return len(seen) == 4
    wait(all_frames)
    assert seen == {20, 70, 120, 170}
    browser.press(ARROWS[expected[-1]["vote"]])

    browser.press("s")
    files = wait(lambda: list(page.glob("votes-*.json")))
    saved = json.loads(files[0].read_text(encoding="utf-8"))
    assert saved["votes"] == expected and saved["page"] == key["page"]
    assert files[0].name == f"votes-{saved['rater']}.json"

    code, printed, _ = command("--count", files[0], "--out", page)
    rows = table(printed)
    assert code == 0 and rows["overall"][0] == "12 / 0 / 0" and rows["overall"][-1] == "A"
    assert rows["text"][0] == "0 / 12 / 0" and rows["text"][-1] == "not decided"
    assert rows["motion"][0] == "4 / 0 / 8" and rows["motion"][1] == "-33.3"
    assert rows[saved["rater"]][2:] == ["6 of 6", "6 of 6", "0 of 6", "6 of 6"]

    browser.js("confirm = () => true, act('restart')")          # the next rater begins anew
    assert browser.js("[state.votes.length, document.body.className]") == [0, "card"]
    assert browser.js("state.rater") != saved["rater"]
