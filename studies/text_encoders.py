"""Question: what is each of the three text encoders good for? The toy system is trained with each
of them taken away in turn. Then: are signs in Chinese characters, three bytes each, harder to learn
than signs in Latin letters, one byte each, through an autoencoder that saw only the second?

Run:    python studies/text_encoders.py runs/toy
Time:   58 minutes on 2 cores, after `python train.py --scale toy`; continues where it was stopped
Answer: without the byte encoder letters are at chance; word and concept encoders are
        interchangeable here; Chinese signs are learned, but later.
"""
import common

import world
from text_cond import ENCODERS


def main():
    parser = common.Parser(__doc__, "text_encoders", of_run=True, seeds=3)
    parser.add_argument("--steps", type=common.whole, default=400, help="training steps of each")
    args = parser.parse_args()
    steps = {"train_dit.steps": args.steps, "train_dit.batch": 64}
    variants = {"all three": {}} | {f"without {name}": {"text.without": name} for name in ENCODERS}
    common.compare(args.run, args.out, {k: v | steps for k, v in variants.items()}, args.seeds,
                   shown=("loss", "color", "shape", "direction", "text", "words", "heldout"))

    scripts = ["latin", "chinese"]
    try:
        world.check_script("chinese")
    except ValueError as error:                         # no font with these characters
        print(f"Chinese signs: skipped, {error}")
        scripts.remove("chinese")
    bases = {script: args.out / "scripts" / f"base-{script}" for script in scripts}
    for script, folder in bases.items():                # the same autoencoder, other clips
        common.train(folder, {"base": args.run, "clips.script": script, "clips.count": 6144,
                              "stage": "latents"}, done="latents/index.json")
    common.compare(args.run, args.out / "scripts",
                   {script: {"base": folder, **steps} for script, folder in bases.items()},
                   args.seeds, shown=("loss", "color", "shape", "text", "words", "words_heldout"))


if __name__ == "__main__":
    main()
