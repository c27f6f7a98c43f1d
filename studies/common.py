"""What the studies share: train variants of a toy run several times, and compare their figures.

A variant is a run of train.py in a process of its own, on one thread,

    python train.py --base RUN --workdir OUT/runs/NAME-SEED --seed SEED --coupling independent
        --sample.prompts 80 [the flags in which the variant differs]

so its command says what it is, and a study that was stopped continues, as train.py does.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NO_JUDGE = "a run on videos; a study needs the judge of the toy world"
FIGURES = ("loss", "color", "shape", "direction", "text", "heldout")       # of report.json


class Parser(argparse.ArgumentParser):
    """Describe a study by its docstring; a wrong argument is one line and exit status 2. out: the
    name of its folder, if it may lie elsewhere. of_run: it takes a run of the toy world. seeds: how
    often it repeats its variants, if it does."""

    def __init__(self, doc, out=None, of_run=False, seeds=0):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        if out:
            self.add_argument("--out", type=Path, default=Path("out/studies") / out,
                              help="folder of the results (default: %(default)s)")
        if of_run:
            self.add_argument("run", type=Path, help="a finished run of the toy world")
        if seeds:
            self.add_argument("--seeds", type=whole, default=seeds)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def loaded(self, path, device="cpu", of_videos=False):
        """Load a finished run; of the toy world, for its judge, unless of_videos."""
        from train import load_run
        try:
            run = load_run(path, device)
        except ValueError as error:
            self.error(str(error))
        if not of_videos:
            self.needs_judge(path, run.cfg)
        return run

    def needs_judge(self, path, cfg):
        """Refuse a run on videos."""
        if cfg.data:
            self.error(f"{path}: {NO_JUDGE}")


def positive(text):
    """The type of a flag that takes a number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: not a number above 0")
    return float(text)


def whole(text):
    """The type of a flag that takes a whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number, 1 or more")
    return int(text)


def pyplot():
    """matplotlib without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def mean_and_spread(rows, keys):
    """Rows of figures -> [(mean, standard deviation) of each key]; a single row has spread 0."""
    values = torch.tensor([[float(row[key]) for key in keys] for row in rows])      # (rows, keys)
    return list(zip(values.mean(0).tolist(), values.std(0, correction=len(rows) > 1).tolist()))


def peak_memory():
    """The largest resident set of this process, in MiB. getrusage's would begin with that of the
    process before exec."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


# ---- 1. Run train.py -----------------------------------------------------------------------------

def refuse(line):
    """End a study with one line and exit status 2."""
    print(line, file=sys.stderr)
    raise SystemExit(2)


def train(folder, flags, done="report.json", program=ROOT / "train.py", threads=1):
    """Run train.py with these flags until folder/done exists; what it says is kept in folder.txt.

    flags: {"dit.conditioning": "in_context"}; a tuple is several words; of a path the last name
    counts. They are kept in folder.flags, so that a run with others is not taken for this one. The
    study ends with train.py's own line where a run fails, and says so where a signal stopped one.
    """
    folder = Path(folder)
    words = [w for name, value in flags.items()
             for w in (f"--{name}", *(value if isinstance(value, tuple) else (value,)))]
    asked = " ".join(w.resolve().name if isinstance(w, Path) else str(w) for w in words)
    kept = folder.with_name(folder.name + ".flags")
    before = kept.read_text(encoding="utf-8") if folder.exists() and kept.exists() else asked
    if before != asked:
        refuse(f"{folder}: made with other flags, {before}; choose another --out")
    if (folder / done).exists():
        return
    command = [sys.executable, program, "--workdir", folder, *words]
    said = folder.with_name(folder.name + ".txt")
    said.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(asked, encoding="utf-8")
    with open(said, "w", encoding="utf-8") as log:
        code = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if code or not (folder / done).exists():
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SystemExit(f"{folder}: {lines[-1] if code and lines else 'stopped'}\n"
                         f"(all that it said is in {said}; the same command continues the study)")


def train_all(base, out, variants, seeds, workers, programs=None):
    """Train every variant with every seed, `workers` at a time -> [(variant, seed, folder)]."""
    from tqdm import tqdm
    config, wrong = base / "config.json", ""
    if not config.exists():
        wrong = f"no run there; first: python train.py --scale toy --workdir {base}"
    elif json.loads(config.read_text(encoding="utf-8"))["data"]:
        wrong = NO_JUDGE
    if wrong:
        refuse(f"{base}: {wrong}")
    runs = [(name, seed, out / "runs" / f"{name.replace(' ', '-')}-{seed}")
            for seed in range(seeds) for name in variants]

    def one(run):
        name, seed, folder = run
        flags = {"base": base, "seed": seed, "coupling": "independent", "sample.prompts": 80}
        train(folder, flags | variants[name],
              program=(programs or {}).get(name, ROOT / "train.py"))

    with ThreadPoolExecutor(workers) as pool:
        list(tqdm(pool.map(one, runs), desc="study", unit="run", total=len(runs)))
    return runs


# ---- 2. Clips of a trained run -------------------------------------------------------------------

def sampled(run, prompts, **settings):
    """Make a clip for each prompt, number i from seed i -> (n, 3, T, H, W) on the CPU. settings: of
    sampling, other ones than those of the run."""
    run.cfg.sample = replace(run.cfg.sample, **settings)
    n = run.cfg.sample.batch
    return torch.cat([run.generate(prompts[i:i + n], range(i, min(i + n, len(prompts)))).cpu()
                      for i in range(0, len(prompts), n)])


@torch.no_grad()
def reconstructed(run, clips):
    """What the autoencoder of a run makes of clips."""
    return torch.cat([run.decode(run.tae.normalize(run.tae.encode(x).mean))
                      for x in clips.split(32)])


# ---- 3. Compare ----------------------------------------------------------------------------------

def compare(base, out, variants, seeds=3, workers=2, shown=FIGURES, programs=None):
    """Train the variants of the run `base`; print a table of mean +- spread over the seeds; write
    out/study.json and out/study.png -> one row of figures for each run.

    variants: {name: flags of train.py}. programs: {name: script} in place of train.py."""
    rows = []
    for name, seed, folder in train_all(base, out, variants, seeds, workers, programs):
        report, config = (json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
                          for file in ("report", "config"))
        rows.append({"variant": name, "seed": seed, "folder": str(folder),
                     "steps": config["train_dit"]["steps"], "loss": report["dit_val_loss"],
                     "parameters": report["parameters"], **report["prompt_accuracy"]})
    (out / "study.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")

    plt = pyplot()
    figure, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 3.2), squeeze=False)
    print("| variant | steps | " + " | ".join(shown) + " |\n" + "|---" * (2 + len(shown)) + "|")
    for j, name in enumerate(variants):
        mine = [row for row in rows if row["variant"] == name]
        found = mean_and_spread(mine, shown)
        print(f"| {name} | {mine[0]['steps']} | "
              + " | ".join(f"{mean:.3f} +- {spread:.3f}" for mean, spread in found) + " |")
        for ax, (mean, spread) in zip(axes[0], found):
            ax.errorbar(j, mean, spread, fmt="o", color=f"C{j}", capsize=4)
    for ax, title in zip(axes[0], shown):
        ax.set(title="validation loss" if title == "loss" else title, xlim=(-0.5, j + 0.5))
        ax.set_xticks(range(len(variants)), variants, rotation=35, ha="right", fontsize=7)
        ax.grid(alpha=0.3)
    figure.tight_layout(); figure.savefig(out / "study.png", dpi=120); plt.close(figure)
    print(f"wrote {out / 'study.json'}, {out / 'study.png'}")
    return rows
