"""Question: how fast is text to video on two CPU cores, and how much faster than another commit?

Run:    python studies/record.py --against edb935f
Time:   32 to 48 minutes on 2 cores, of which 12 to 19 are the other commit's
Answer: 7 minutes on AVX-512, 0.56 of the time of edb935f; 0.99 of the shapes and of the held-out
        combinations are right, and 0.07 of the words of two and three letters.

The speed-run. `torchrun --nproc_per_node 2 train.py --scale toy`, a rank on each of two cores, runs
whole in a fresh folder, once for each seed, one run after the other. The row gives the seconds of
the whole job (their median) and of each stage, and what share of the prompts the clips follow (mean
+- spread over the seeds). It is a record if the means reach LEAST and the judge can be trusted as
before. Data, grammar, judge and prompts are those of world.py: who changes them starts a new table.

Seconds hold for one machine only. So --against runs another commit of this repository, with the
first seed, before our own runs, and prints the ratio of the times: `python train.py --scale toy`,
one process with a thread on each core. Nothing else may run meanwhile. A study that was stopped
repeats its unfinished run, whose time would be wrong.
"""
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common

STAGES = ("tae", "latents", "coupling", "dit", "sample", "report")
LEAST = {"color": 0.99, "direction": 0.99, "speed": 0.99, "text": 0.99, "shape": 0.97,
         "heldout": 0.95}                               # text: signs of one letter
SHOWN = (*LEAST, "words")                               # words of two and three letters
TRUSTED = {"color": 0.99, "shape": 0.99, "direction": 0.99, "speed": 0.99, "text": 0.97}


def git(*words):
    """What a git command says; the study ends with git's own line where it fails."""
    run = subprocess.run(["git", "-C", common.ROOT, *words], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"git {' '.join(map(str, words))}: {run.stderr.strip()}")
    return run.stdout.strip()


def tree_of(commit, out):
    """A folder with the files of a commit, beside the results."""
    commit = git("rev-parse", "--short=7", "--verify", f"{commit}^{{commit}}")
    tree = out / f"tree-{commit}"
    if not tree.exists():
        part = tree.with_name(tree.name + ".part")             # a kill may leave a part of it
        part.mkdir(parents=True, exist_ok=True)
        archive = out / f"{commit}.tar"
        git("archive", "-o", archive.resolve(), commit)
        shutil.unpack_archive(archive, part)
        archive.unlink()
        part.rename(tree)
    return tree


def measured(tree, name, seed, out, ranks=1):
    """Run the main job of `tree` in a fresh folder -> {"seconds", "stages", "accuracy", ...}."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    folder = (out / f"{name}-{seed}").resolve()
    result = folder.with_name(folder.name + ".json")
    if not result.exists() or name.endswith("-dirty"):      # which may be another tree now
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"{folder.name}: running; what it says is in {folder}.txt", flush=True)
        began = time.monotonic()
        with open(f"{folder}.txt", "w", encoding="utf-8") as said:
            code = subprocess.run([sys.executable, *(launch if ranks > 1 else []), "train.py",
                                   "--scale", "toy", "--seed", str(seed), "--workdir", folder],
                                  cwd=tree, stdout=said, stderr=subprocess.STDOUT).returncode
        seconds = time.monotonic() - began
        if code or not (folder / "report.json").exists():
            raise SystemExit(f"{folder.name}: {'failed' if code else 'stopped'}; what it said is "
                             f"in {folder}.txt")
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        result.write_text(json.dumps({
            "seconds": seconds, "stages": report["seconds"], "psnr": report["tae_psnr_db"],
            "loss": report["dit_val_loss"], "judge": report["judge"],
            "accuracy": report["prompt_accuracy"]}, indent=1), encoding="utf-8")
    return json.loads(result.read_text(encoding="utf-8"))


def misses(rows):
    """What keeps these runs from being a record: one line each."""
    mean = lambda key: statistics.mean(row["accuracy"][key] for row in rows)
    judge = lambda key: min(row["judge"][key] for row in rows)
    return ([f"{key} {mean(key):.3f}, asked {least}" for key, least in LEAST.items()
             if mean(key) < least]
            + [f"the judge agrees with the truth on {key} in {judge(key):.3f}, asked {least}"
               for key, least in TRUSTED.items() if judge(key) < least])


def row_of(name, rows, ratio):
    """A line of the table of records."""
    stage = lambda s: f"{statistics.median(row['stages'].get(s, 0) for row in rows):.0f}"
    figures = common.mean_and_spread([row["accuracy"] | {"psnr": row["psnr"], "loss": row["loss"]}
                                      for row in rows], ("psnr", "loss", *SHOWN))
    cells = [name, ratio, f"{statistics.median(row['seconds'] for row in rows):.0f}",
             " / ".join(map(stage, STAGES)),
             *(f"{mean:.{2 if i else 1}f} +- {spread:.2f}"
               for i, (mean, spread) in enumerate(figures))]
    return f"| {' | '.join(cells)} |"


def cpu():
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main():
    parser = common.Parser(__doc__, "record")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=common.whole, default=2, help="one for each core")
    parser.add_argument("--against", metavar="COMMIT", help="another commit, run with one seed")
    args = parser.parse_args()
    name = git("describe", "--always", "--dirty", "--abbrev=7", "--exclude=*")
    other = tree_of(args.against, args.out) if args.against else None

    theirs = [measured(other, other.name.removeprefix("tree-"), args.seeds[0], args.out)
              ] if other else []
    ours = [measured(common.ROOT, name, seed, args.out, args.ranks) for seed in args.seeds]

    took = [statistics.median(row["seconds"] for row in rows) for rows in (ours, theirs) if rows]
    print("| commit | ratio | seconds | " + " / ".join(STAGES) + " | PSNR, dB | validation loss | "
          + " | ".join(SHOWN) + " |\n" + "|---" * (6 + len(SHOWN)) + "|")
    print(row_of(name, ours, f"{took[0] / took[1]:.2f}" if theirs else ""))
    if theirs:
        print(row_of(other.name.removeprefix("tree-"), theirs, "1"))
    print(f"seeds {', '.join(map(str, args.seeds))}; {cpu()}, torch {common.torch.__version__}")
    faults = misses(ours)
    print("no record: " + "; ".join(faults) if faults else "a record")


if __name__ == "__main__":
    main()
