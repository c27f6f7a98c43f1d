"""Question: does a model listen to the letters that its prompt asks for?

Run:    python studies/spelling.py MODEL [MODEL ...], for example the marks of healthy_run.py
Time:   30 seconds on 2 cores for each model of small
Answer: where two objects pass anywhere, small does not after 2000 steps; where they pass through
        points of a grid (`world.GRID`), it does.

Clips with one sign are mixed with noise at several times t. The figure is the loss with a prompt
that asks for another word of as many letters, less the loss with the right prompt, on the same
clips and noise: 0 for a model that does not read, or where the noisy clip shows the word already.
"""
import random
from dataclasses import replace

import common
import torch

import flow
import world

TIMES = (0.03, 0.06, 0.1, 0.15, 0.3, 0.45)


def signs(cfg, length, n):
    """Draw n worlds with one sign of so many letters -> worlds, captions, captions with another
    word of as many letters."""
    rng, c = random.Random(f"spelling/{length}"), cfg.clips
    letters, words, _ = world.SCRIPTS[c.script]
    pool = [w for w in letters + words if len(w) == length]
    right, wrong = [], []
    while len(right) < n:
        scene = world.sample_world(rng, c.things, 1 / c.things, frames=c.frames, script=c.script,
                                   cap=world.cap_of(c.things))
        shown = [t.word for t in scene.things if t.word]
        if [len(w) for w in shown] == [length]:
            other = rng.choice([w for w in pool if w != shown[0]])
            right.append(scene)
            wrong.append(world.World(tuple(replace(t, word=t.word and other)
                                           for t in scene.things)))
    return right, [world.caption(w) for w in right], [world.caption(w) for w in wrong]


@torch.no_grad()
def cost_of_a_wrong_word(run, length, n):
    """Measure the loss of the right prompt, and what another word adds to it -> two lists, of all
    TIMES."""
    scenes, right, wrong = signs(run.cfg, length, n)
    clips = world.render(scenes, *run.cfg.clips.shape[:2])
    z = run.tae.normalize(run.tae.encode(clips).mean)
    noise, losses = run.noise(range(n)), []
    for prompts in (right, wrong):
        P, mask, *_ = run.prompts(prompts)
        losses.append([flow.loss(lambda x, t, P=P, mask=mask: run.dit(x, t, P, mask), z, noise,
                                 torch.full((n,), t), cfg=run.cfg.flow).item() for t in TIMES])
    return losses[0], [b - a for a, b in zip(*losses)]


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("models", type=common.Path, nargs="+", metavar="MODEL", help="a run's "
                        "folder, or a copy of its model.safetensors")
    parser.add_argument("--clips", type=common.whole, default=16, help="of each length")
    args = parser.parse_args()
    print("| model | letters | " + " | ".join(f"t = {t}" for t in TIMES) + " |")
    print("|---" * (2 + len(TIMES)) + "|")
    for path in args.models:
        run = parser.loaded(path)
        for length in sorted({len(w) for w in sum(world.SCRIPTS[run.cfg.clips.script][:2], ())}):
            _, more = cost_of_a_wrong_word(run, length, args.clips)
            print(f"| {path} | {length} | " + " | ".join(f"{m:+.4f}" for m in more) + " |",
                  flush=True)


if __name__ == "__main__":
    main()
