"""What holds between the files: each runs alone, imports no sibling, needs nothing unlisted.
What the READMEs name is there."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["tae", "text_cond", "dit", "flow", "sdot", "sample_parallel"]
ALONE = [*STAGES, "world"]
FILES = [*ALONE, "train"]
READMES = [ROOT / "README.md", ROOT / "studies/README.md"]


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("name", ALONE)
def test_a_file_imports_no_sibling(name):
    siblings = set(FILES) - {name}
    assert not siblings & set(imports(tree(name).body))
    inside = siblings & set(imports(ast.walk(tree(name))))
    assert inside <= ({"train"} if name == "sample_parallel" else set()), "but for its command line"


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_studies_or_tests(name):
    others = {p.stem for folder in ("studies", "tests") for p in (ROOT / folder).glob("*.py")}
    assert not {"studies", "tests", *others} & set(imports(ast.walk(tree(name))))


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_readme_names_is_there(path):
    """Links and their anchors, pictures, and the scripts of its commands."""
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(links) > 8
    for link in links:
        file, _, anchor = link.partition("#")
        there = path.parent / file if file else path
        if "://" in link:
            continue
        assert there.exists(), link
        headings = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M) if anchor else []
        assert not anchor or anchor in map(slug, headings), link
    for script in re.findall(r"(?:python|torchrun|pytest) [^`\n|]*?([\w/]+\.py)\b", text):
        assert (ROOT / script).exists() or (path.parent / script).exists(), script


def test_every_picture_is_shown():
    text = "".join(path.read_text(encoding="utf-8") for path in READMES)
    assert not [p.name for p in (ROOT / "assets").iterdir() if f"assets/{p.name}" not in text]


def test_the_repository_speaks_of_the_project_alone():
    """Of no place where it was written: what is built of two parts here must stand nowhere."""
    words = ["/wo" "rk/", "shared/re" "view", "sub" "agent", "Cla" "ude"]
    files = [p for kind in ("*.py", "*.md", "*.toml", "*.txt", "run") for folder in (
        "", "studies/", "tests/", ".ci/") for p in ROOT.glob(folder + kind)]
    assert len(files) > 30
    said = [(p.name, w) for p in files for w in words if w in p.read_text(encoding="utf-8")]
    assert not said


def test_everything_imported_is_required():
    required = {re.split(r"[=<>\s#]", line)[0].lower() for line in
                (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"}
    name_of = {"ot": "pot", "PIL": "pillow"}
    for name in FILES:
        used = set(imports(ast.walk(tree(name)))) - set(FILES) - sys.stdlib_module_names
        missing = {name_of.get(m, m).lower() for m in used} - required
        assert not missing, f"{name}.py"


def test_the_backbone_has_never_heard_of_ranks():
    assert "distributed" not in (ROOT / "dit.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_public_things_have_docstrings(name):
    bare = [n.name for n in tree(name).body if isinstance(n, ast.FunctionDef | ast.ClassDef)
            and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare


def test_repeated_primitives_are_equal():
    """A primitive that two files need is repeated letter for letter."""
    seen = {}
    for name in FILES:
        for node in tree(name).body:
            if isinstance(node, ast.FunctionDef) and node.name in ("rms_norm", "one_of", "fp32"):
                code = ast.unparse(node)
                assert seen.setdefault(node.name, code) == code, (name, node.name)


DEMOS = {"tae": (4, {"reconstruction.png"}), "text_cond": (3, {"spelling.png"}),
         "dit": (4, {"gates.png"}), "flow": (2, {"flow.png"}),
         "sdot": (6, {"sdot.png", "cells.gif"}), "sample_parallel": (6, {"timeline.png"}),
         "world": (16, {"world.png"})}                  # claims that PASS, figures


@pytest.fixture(scope="module")
def demos(request, tmp_path_factory):
    """The demos that are to be tested, each of a file copied into a folder of its own, two at a
    time -> {name: (folder, a future of its end)}."""
    def demo(name, here):
        shutil.copy(ROOT / f"{name}.py", here)
        return subprocess.run([sys.executable, f"{name}.py"], cwd=here, capture_output=True,
                              text=True, timeout=600, env={**os.environ, "PYTHONPATH": ""})
    asked = [item.callspec.params["name"] for item in request.session.items
             if "demos" in getattr(item, "fixturenames", ())]
    pool, folders = ThreadPoolExecutor(2), {name: tmp_path_factory.mktemp(name) for name in asked}
    yield {name: (here, pool.submit(demo, name, here)) for name, here in folders.items()}
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_a_copied_file_runs_its_demo(demos, name):
    (claims, figures), (here, end) = DEMOS[name], demos[name]
    done = end.result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"^PASS .+: .+ vs .+$", done.stdout, re.M), done.stdout
    assert done.stdout.count("PASS") == claims and "FAIL" not in done.stdout, done.stdout
    made = list((here / "out" / name).iterdir())
    assert {path.name for path in made} == figures
    assert all(path.stat().st_size > 10_000 for path in made)


ASK = """
import contextlib, io, json, os, runpy, sys, traceback
told = {}
for name in sys.argv[1:]:
    os.chdir(name)
    for flag in ("--help", "--no-such-flag"):
        sys.argv, out, err = [f"{name}.py", flag], io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                status = traceback.format_exc()
        told[name + flag] = status, out.getvalue(), err.getvalue()
    os.chdir("..")
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each file copied into a folder of its own, and {name and flag: (status, stdout, stderr)}. All
    are asked in one process: the seconds go to importing torch."""
    here = tmp_path_factory.mktemp("alone")
    for name in ALONE:
        (here / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", here / name)
    done = subprocess.run([sys.executable, "-c", ASK, *ALONE], cwd=here, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return here, json.loads(done.stdout)


@pytest.mark.parametrize("name", ALONE)
def test_a_copied_file_has_help_and_refuses_an_unknown_flag(alone, name):
    here, told = alone
    status, out, _ = told[f"{name}--help"]
    assert status == 0 and "usage:" in out
    status, _, err = told[f"{name}--no-such-flag"]
    assert status == 2 and "--no-such-flag" in err and "Traceback" not in err
    assert [p.name for p in (here / name).iterdir() if p.name != "__pycache__"] == [f"{name}.py"]
