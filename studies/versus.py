"""Question: which of two runs makes the better clips, by the votes of people who do not know which
run a clip is from?

Run:    python studies/versus.py RUN_A RUN_B; then, when votes were cast and saved in the browser,
        python studies/versus.py --count votes-*.json
Time:   20 seconds on 2 cores for two toys of 60 prompts, 20 minutes to vote, 5 seconds to count
Answer: a net win rate with its interval, or "not decided", for each of three questions.

The protocol is Movie Gen's: two clips of one prompt side by side, better, worse or equal, one
question at a time, and net win rate = (wins - losses) / all votes, in [-100, 100]. Ours are the
checks that are hidden among the pairs, one of each kind for every ten prompts:

    rated      run A against run B, with the same noise
    swapped    such a pair once more, sides exchanged: how noisy are raters?
    identical  a clip against itself: a tie is expected
    planted    a clip against the spoilt clip of another prompt: does anybody look?

The page versus.html holds all clips, needs no server, and does not say which run is which: that is
in key.json beside it, which the counter needs and raters should not have. Sides and order come from
a secret key, and in each kind A stands on the left as often as B. A difference between two runs
holds for these two: no rater can say how another seed would move it.
"""
import base64
import contextlib
import hashlib
import io
import json
import math
import random
import secrets
from collections import Counter, defaultdict
from functools import partial
from itertools import combinations
from operator import itemgetter
from pathlib import Path

import common
import torch
from einops import rearrange

import train
import world

AXES = {"overall": "Which clip is better, all in all?",
        "text": "Which clip follows the text better?",
        "motion": "In which clip is the motion better: smooth, complete, natural?"}
SECONDS = 5                                             # that a vote takes


# ---- 1. Pairs: what is shown, on which side, in which order --------------------------------------

def keyed(key, *words):
    """Hash words to eight bytes in hexadecimal, which nobody can guess without the key."""
    return hashlib.blake2b(repr(words).encode(), key=bytes.fromhex(key), digest_size=8).hexdigest()


def make_pairs(n, key):
    """List the pairs of n prompts in the order of the page -> [{"id", "kind", "prompt", "left"}].

    left: what a vote for the left side counts, 1 for run A (in a planted pair: for the clip that is
    not spoilt) or -1. Rated pairs that return swapped stand in the first half, and return in the
    second."""
    pairs, place = [], {}
    for kind in ("rated", "swapped", "identical", "planted"):
        of = "rated" if kind == "swapped" else kind
        prompts = sorted(range(n), key=partial(keyed, key, of))
        returning = prompts[:math.ceil(n / 10)]
        first = int(keyed(key, of, "first"), 16)
        for rank, i in enumerate(prompts if kind == "rated" else returning):
            pair = {"id": keyed(key, "id", kind, i), "kind": kind, "prompt": i,
                    "left": (-1) ** (first + rank + (kind == "swapped"))}
            where = int(keyed(key, "order", kind, i), 16) / 2**64           # in [0, 1)
            if of == "rated" and i in returning:
                where = (where + (kind == "swapped")) / 2
            place[pair["id"]] = where
            pairs.append(pair)
    return sorted(pairs, key=lambda pair: place[pair["id"]])


def clips_of(pair, n):
    """Name the clips on the left and on the right of a pair: ("A", 3) is run A's of prompt 3."""
    i, left = pair["prompt"], pair["left"]
    run = "AB"[i % 2]
    good, bad = {"identical": (("AB"[left > 0], i),) * 2,
                 "planted": ((run, i), ("spoilt " + run, (i + n // 2) % n))}.get(
                     pair["kind"], (("A", i), ("B", i)))
    return (good, bad) if left > 0 else (bad, good)


def spoilt(clip):
    """Shuffle the frames of a clip (3, T, H, W), and lay noise over them."""
    g = torch.Generator().manual_seed(0)
    mixed = clip[:, torch.randperm(clip.shape[1], generator=g)]
    return (mixed + 0.4 * torch.randn(clip.shape, generator=g)).clamp(-1, 1)


# ---- 2. The page ---------------------------------------------------------------------------------

def sheet(clip):
    """Lay the frames of a clip (3, T, H, W) in [-1, 1] side by side -> the PNG as a data URL."""
    from PIL import Image
    frames = train.in_bytes(clip)
    file = io.BytesIO()
    Image.fromarray(rearrange(frames, "C T H W -> H (T W) C").numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_page(out, runs, prompts, clips, fps, key):
    """Write out/versus.html, and out/key.json with all that the page must not tell.

    runs: the names of A and B; clips: {"A": (n, 3, T, H, W), "B": likewise}."""
    pairs = make_pairs(len(prompts), key)
    sides = [clips_of(pair, len(prompts)) for pair in pairs]
    names = sorted({name for side in sides for name in side}, key=lambda name: keyed(key, *name))
    number = {name: i for i, name in enumerate(names)}
    picture = lambda run, i: sheet(spoilt(clips[run[-1]][i]) if len(run) > 1 else clips[run][i])
    page = {"fps": fps, "shape": clips["A"].shape[2:], "axes": list(AXES.items()),
            "pairs": [{"id": pair["id"], "prompt": prompts[pair["prompt"]],
                       "clips": [number[left], number[right]]}
                      for pair, (left, right) in zip(pairs, sides)],
            "clips": [picture(*name) for name in names]}
    page["id"] = hashlib.blake2b(json.dumps(page).encode(), digest_size=8).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    (out / "key.json").write_text(json.dumps({
        "page": page["id"], "key": key, "A": str(runs[0]), "B": str(runs[1]), "prompts": prompts,
        "pairs": pairs}, indent=1), encoding="utf-8")
    (out / "versus.html").write_text(
        HTML.replace("PAGE", json.dumps(page).replace("<", "\\u003c"), 1), encoding="utf-8")
    n = len(prompts)
    print(f"wrote {out / 'versus.html'}: {len(pairs)} pairs, {len(AXES)} questions, "
          f"about {math.ceil(len(pairs) * len(AXES) * SECONDS / 60)} minutes\n"
          f"wrote {out / 'key.json'}: for --count, and not for raters\n"
          f"{n} prompts, 20 % ties: below {half_width(0.4 * n, 0.4 * n, n):.0f} points a net win "
          "rate is not decided")


# The page knows clips by number and pairs by id; PAGE is the JSON that `write_page` makes.
HTML = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Which clip is better?</title>
<style>
  body { margin: 0; min-height: 100vh; display: grid; place-content: center; gap: 1.3rem;
         justify-items: center; text-align: center; background: #202124; color: #e8e6e3;
         font: 17px/1.5 system-ui, sans-serif }
  h1, p { margin: 0; max-width: 44rem }
  h1 { font-size: 1.5rem; font-weight: 600 }
  #where { color: #9a9a9a; font-size: .85rem }
  #text { min-height: 3em; white-space: pre-line }
  #clips { display: flex; gap: 2rem }
  canvas { image-rendering: pixelated; background: #000; border-radius: 4px }
  nav { display: flex; gap: .6rem }
  button { font: inherit; color: inherit; background: #34363b; border: 0; border-radius: 6px;
           padding: .45rem 1.1rem; cursor: pointer }
  button:hover { background: #464950 }
  small button { font-size: .8rem; background: none; color: #9a9a9a; padding: .2rem .7rem }
  .card #clips, .card .vote, .pair #go { display: none }
  #bar { position: fixed; left: 0; bottom: 0; height: 4px; background: #8ab4f8 }
</style>
<body class="card">
<p id="where"></p>
<h1></h1>
<p id="text"></p>
<div id="clips"><canvas></canvas><canvas></canvas></div>
<nav>
  <button class="vote" data-do="left">&larr; left</button>
  <button class="vote" data-do="tie">&darr; no difference</button>
  <button class="vote" data-do="right">right &rarr;</button>
  <button id="go"></button>
</nav>
<small>
  <button data-do="undo">Backspace: undo</button>
  <button data-do="save">S: save votes</button>
  <button data-do="restart">another rater</button>
</small>
<div id="bar"></div>
<script>
"use strict";
const page = PAGE;
const [frames, height, width] = page.shape, store = "versus " + page.id;
const todo = page.axes.flatMap(([axis, question], pass) =>
  page.pairs.map(pair => ({axis, question, pass, pair})));
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", Enter: "begin",
              Backspace: "undo", s: "save", S: "save"};
const $ = selector => document.querySelector(selector);
const canvases = [...document.querySelectorAll("canvas")];
const newcomer = () => ({page: page.id, votes: [],
  rater: crypto.getRandomValues(new Uint32Array(1))[0].toString(16).padStart(8, "0")});

// Votes are a list in the order of todo, so its length is the place where the rater is.
let state = newcomer(), begun = -1, shown = null, start = 0;
const keep = () => { try { localStorage[store] = JSON.stringify(state) } catch { /* no place */ } };

// Of a file's pages, Chromium gives one in fifty an empty storage that it forgets. So a page that
// finds nothing leaves a list without votes, and loads again: what finds that list is kept.
const tries = Number(location.hash.slice(1));
try {
  state = JSON.parse(localStorage[store]);
  history.replaceState(null, "", "#");
} catch {
  keep();
  if (tries < 4) { location.hash = tries + 1; location.reload() }
}

function show() {
  const done = state.votes.length, now = todo[done], pairs = page.pairs.length;
  const card = !now || now.pass !== begun;
  document.body.className = card ? "card" : "pair";
  $("#where").textContent = now ? `question ${now.pass + 1} of ${page.axes.length}, ` +
    `pair ${done % pairs + 1} of ${pairs}` : "all pairs are done";
  $("h1").textContent = now ? now.question : "Thank you.";
  $("#text").textContent = !now ? "Save your votes, and send the file." : card ?
    "Two clips of one text play side by side. Answer this question alone.\n" +
    "Keys: \u2190 left, \u2192 right, \u2193 no difference." : now.pair.prompt;
  $("#go").textContent = now ? "Enter: begin" : "S: save votes";
  $("#go").dataset.do = now ? "begin" : "save";
  $("#bar").style.width = 100 * done / todo.length + "%";
  shown = null;
  if (!card) load(now.pair);
}

async function load(pair) {
  const sheets = pair.clips.map(i => Object.assign(new Image(), {src: page.clips[i]}));
  await Promise.all(sheets.map(image => image.decode()));
  if (todo[state.votes.length]?.pair !== pair) return;
  start = performance.now();
  shown = sheets;
}

function draw(seconds) {                                // one clock: both are at the same frame
  const t = Math.floor(Math.max(0, seconds) * page.fps) % frames;
  shown?.forEach((image, i) => canvases[i].getContext("2d").drawImage(
    image, t * width, 0, width, height, 0, 0, width, height));
}

function act(what) {
  const now = todo[state.votes.length];
  if (what === "save") return save();
  if (what === "begin") begun = now ? now.pass : -1;
  else if (what === "undo") {
    if (state.votes.pop()) begun = todo[state.votes.length].pass;
  } else if (what === "restart") {
    if (!confirm("Forget these votes, and begin with another rater?")) return;
    [state, begun] = [newcomer(), -1];
  } else if (shown) state.votes.push({axis: now.axis, pair: now.pair.id, vote: what});
  else return;                                          // no vote before both clips are there
  keep();
  show();
}

function save() {
  const file = new Blob([JSON.stringify(state, null, 1)], {type: "application/json"});
  const link = Object.assign(document.createElement("a"),
    {href: URL.createObjectURL(file), download: `votes-${state.rater}.json`});
  link.click();
}

for (const canvas of canvases) {
  const zoom = Math.max(1, Math.round(360 / height));
  Object.assign(canvas, {width, height});
  canvas.style.width = width * zoom + "px";
}
for (const button of document.querySelectorAll("button"))
  button.onclick = () => { button.blur(); act(button.dataset.do) };
addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  act(keys[event.key]);
});
requestAnimationFrame(function tick(now) { draw((now - start) / 1000);
                                           requestAnimationFrame(tick) });
show();
</script>
"""


# ---- 3. Statistics: a vote is 1 for A, 0 for a tie, -1 for B -------------------------------------

def net_win_rate(votes):
    """Compute 100 (wins - losses) / all votes: ties count in the denominator."""
    return 100 * sum(votes) / len(votes)


def half_width(wins, losses, n):
    """Compute the half of a 95 % interval of a net win rate of n votes, one a prompt:
    196 sqrt((w + l - (w - l)^2) / n) with w = wins / n, l = losses / n."""
    w, l = wins / n, losses / n
    return 196 * math.sqrt((w + l - (w - l) ** 2) / n)


def bootstrap(prompts, draws=4000, seed=0):
    """Draw prompts with replacement, each with all its votes ([[1, 0, 1], ...]) -> the bounds of
    the 95 % interval of their net win rate."""
    sums, counts = torch.tensor([[sum(votes), len(votes)] for votes in prompts]).double().T
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(prompts), (draws, len(prompts)), generator=g)
    rates = 100 * sums[drawn].sum(1) / counts[drawn].sum(1)                     # (draws,)
    return tuple(rates.quantile(torch.tensor([0.025, 0.975]).double()).tolist())


def sign_test(wins, losses):
    """Compute how probable it is that n = wins + losses fair coins fall at least as unequally
    (two-sided, exact)."""
    n = wins + losses
    return min(1, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def majority(votes):
    """Find the vote of more than half of the raters; a tie where there is none."""
    vote, count = Counter(votes).most_common(1)[0]
    return vote if 2 * count > len(votes) else 0


def agreement(prompts):
    """Compute the share of two raters of one prompt who vote alike, and what it would be if each
    vote were drawn from all of them; None where no prompt has two."""
    several = [votes for votes in prompts if len(votes) > 1]
    if not several:
        return None
    alike = [sum(a == b for a, b in combinations(votes, 2)) / math.comb(len(votes), 2)
             for votes in several]
    counts = Counter(sum(several, []))
    return sum(alike) / len(alike), sum((c / counts.total()) ** 2 for c in counts.values())


# ---- 4. The count --------------------------------------------------------------------------------

@contextlib.contextmanager
def reading(path):
    """Turn what a damaged file raises into one line that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def read_votes(paths, key_file):
    """Read the key and the votes -> the key, [{"rater", "axis", "pair", "side", "vote"}]; each file
    is one rater's. ValueError for what cannot be counted."""
    if not key_file.exists():
        raise ValueError(f"{key_file}: not there; --out names the folder of the page and its key")
    with reading(key_file):
        key = json.loads(key_file.read_text(encoding="utf-8-sig"))
        pairs, page = {pair["id"]: pair for pair in key["pairs"]}, key["page"]
    rows, files = [], {}
    for path in paths:
        with reading(path):
            found = json.loads(path.read_text(encoding="utf-8-sig"))
            rater, of = str(found["rater"]), found["page"]
        if of != page:
            raise ValueError(f"{path}: votes of another page than that of {key_file}")
        if rater in files:
            raise ValueError(f"{path}: the same rater as in {files[rater]}; give the later file")
        files[rater], before = path, len(rows)
        with reading(path):
            for axis, pair, side in map(itemgetter("axis", "pair", "vote"), found["votes"]):
                if axis not in AXES:
                    raise ValueError(f"no question {axis!r}")
                value = {"left": 1, "tie": 0, "right": -1}[side] * pairs[pair]["left"]
                rows.append({"rater": rater, "axis": axis, "pair": pairs[pair], "side": side,
                             "vote": value})
        if len(rows) == before:
            raise ValueError(f"{path}: no votes")
    return key, rows


def answers(rows):
    """Compare the votes on swapped pairs with the first ones -> [(first, second)]."""
    place = lambda row: (row["rater"], row["axis"], row["pair"]["prompt"])
    first = {place(row): row["vote"] for row in rows if row["pair"]["kind"] == "rated"}
    return [(first[place(row)], row["vote"]) for row in rows
            if row["pair"]["kind"] == "swapped" and place(row) in first]


def count_axis(axis, rows):
    """Make the line of one question: votes, net win rate, majorities, agreement, verdict."""
    prompts = defaultdict(list)
    for row in rows:
        if row["pair"]["kind"] == "rated":
            prompts[row["pair"]["prompt"]].append(row["vote"])
    if not prompts:
        return f"| {axis} |" + " |" * 7 + " no votes |"
    prompts = list(prompts.values())
    votes, most = sum(prompts, []), [majority(votes) for votes in prompts]
    shares = lambda votes: " / ".join(str(votes.count(v)) for v in (1, 0, -1))
    rate, (low, high) = net_win_rate(votes), bootstrap(prompts)
    wins, losses, n = most.count(1), most.count(-1), len(most)
    # Five prompts, all won, have an interval without width, and p = 0.06 in the sign test.
    undecided = low <= 0 <= high or n < 6
    alike, again = agreement(prompts), answers(rows)
    # Two votes of one rater on one pair differ by twice the variance of one.
    variance = sum((a - b) ** 2 for a, b in again) / 2 / max(1, len(again))
    return "| " + " | ".join((
        axis, shares(votes), f"{rate:+.1f}", f"{low:+.1f} to {high:+.1f}", shares(most),
        f"{net_win_rate(most):+.1f} +- {half_width(wins, losses, n):.1f}, "
        f"p = {sign_test(wins, losses):.2g}",
        f"{alike[0]:.2f} ({alike[1]:.2f})" if alike else "one rater",
        f"{100 * math.sqrt(variance / len(votes)):.1f}" if again else "",
        "not decided" if undecided else "AB"[rate < 0])) + " |"


def count_rater(name, rows):
    """Make the line of one rater: the share of left, and how the hidden pairs were answered."""
    of = lambda kind: [row for row in rows if row["pair"]["kind"] == kind]
    sides = Counter(row["side"] for row in rows if row["pair"]["kind"] != "planted")
    left, right = sides["left"], sides["right"]
    share = f"{left / (left + right):.2f}, p = {sign_test(left, right):.2g}" if left + right else ""
    part = lambda good, of: f"{sum(good)} of {len(of)}"
    again = answers(rows)
    return "| " + " | ".join((
        name, str(len(rows)), share,
        part([row["vote"] == 0 for row in of("identical")], of("identical")),
        part([a == b for a, b in again], again), part([a * b < 0 for a, b in again], again),
        part([row["vote"] == 1 for row in of("planted")], of("planted")))) + " |"


def count(paths, key_file):
    """Print what the votes say, and how far the raters can be trusted."""
    key, rows = read_votes(paths, key_file)
    raters = list(dict.fromkeys(row["rater"] for row in rows))
    print(f"A: {key['A']}\nB: {key['B']}\n{len(key['prompts'])} prompts; raters: {len(raters)}; "
          f"votes: {len(rows)} of {len(raters) * len(AXES) * len(key['pairs'])}\n")
    print("| question | votes A / tie / B | net win rate of A | 95 %, over prompts | "
          "majority A / tie / B | its net win rate, sign test | raters agree (chance) | "
          "rater noise, sigma | better |\n" + "|---" * 9 + "|")
    for axis in AXES:
        print(count_axis(axis, [row for row in rows if row["axis"] == axis]))
    print("\n| rater | votes | left, of left and right | identical: tie | swapped: same | "
          "swapped: opposite | planted: found |\n" + "|---" * 7 + "|")
    for rater in raters:
        print(count_rater(rater, [row for row in rows if row["rater"] == rater]))
    if len(raters) > 1:
        print(count_rater("all", rows))


# ---- 5. Command line -----------------------------------------------------------------------------

def prompts_for(args, cfg):
    """The lines of --prompt-file, or --prompts of the toy world's, trained and held out."""
    if args.prompt_file:
        lines = train.read_text(args.prompt_file).split("\n")
        if prompts := [line.strip() for line in lines if line.strip()]:
            return prompts
        raise ValueError(f"--prompt-file {args.prompt_file}: holds no prompts")
    if cfg.data:
        raise ValueError("--prompt-file: needed, since run A learned from videos")
    c = cfg.clips
    found = world.test_prompts(args.seed, args.prompts, c.things, c.frames, c.script)
    return random.Random(args.seed).sample([prompt for _, prompt in found], args.prompts)


def make(args):
    """Sample both runs, and write the page."""
    if (args.out / "key.json").exists():
        raise ValueError(f"--out {args.out}: holds a page, and its key is needed to count votes; "
                         "choose another --out")
    runs = dict(zip("AB", map(train.load_run, args.runs)))
    shapes = [(*run.cfg.clips.shape, run.fps) for run in runs.values()]
    if shapes[0] != shapes[1]:
        raise ValueError("clips differ: {}x{}x{} at {} fps in {}, {}x{}x{} at {} fps in {}".format(
            *shapes[0], args.runs[0], *shapes[1], args.runs[1]))
    prompts, clips = prompts_for(args, runs["A"].cfg), {}
    for name, run in runs.items():                      # the seed of a prompt is its number
        n = run.cfg.sample.batch
        clips[name] = torch.cat([run.generate(prompts[i:i + n], range(len(prompts))[i:i + n])
                                 for i in range(0, len(prompts), n)]).cpu()
    write_page(args.out, args.runs, prompts, clips, runs["A"].fps, secrets.token_hex(16))


def main():
    parser = common.Parser(__doc__, "versus")
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="two finished runs, A and B")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prompts", type=common.whole, default=60, help="(default: %(default)s)")
    which.add_argument("--prompt-file", type=Path, help="a text file with one prompt a line")
    add("--seed", type=int, default=0, help="of the toy world's prompts")
    add("--count", type=Path, nargs="+", metavar="VOTES", help="saved votes, a file for each rater")
    args = parser.parse_args()
    if args.count and args.runs or not args.count and len(args.runs) != 2:
        parser.error("RUN_A RUN_B: two finished runs are needed, or --count VOTES ...")
    try:
        count(args.count, args.out / "key.json") if args.count else make(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
