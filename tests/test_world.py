"""world.py: what is drawn and held out, captions and prompts, the judge against the truth."""
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

import world

# ---- the toy world -------------------------------------------------------------------------------


def test_motion_is_the_stated_velocity_and_area():
    for direction, (dx, dy) in world.DIRECTIONS.items():
        thing = world.Thing("white", "circle", direction, "fast", radius=0.17, x=0.5, y=0.5)
        x = (world.render([world.World((thing,))], T=5, H=64)[0, 0] + 1) / 2      # (T, H, W)
        cx = (x.sum(1) * torch.arange(64)).sum(1) / x.sum((1, 2))
        cy = (x.sum(2) * torch.arange(64)).sum(1) / x.sum((1, 2))
        step = world.SPEEDS["fast"] * 2 / math.hypot(dx, dy)                    # pixels at H = 64
        assert torch.allclose(cx.diff(), torch.full((4,), step * dx), atol=0.3)
        assert torch.allclose(cy.diff(), torch.full((4,), step * dy), atol=0.3)
    for shape in world.SHAPES:                                                  # equal areas
        thing = world.Thing("white", shape, "left", "slow", radius=0.17)
        area = ((world.render([world.World((thing,))], T=1, H=64) + 1) / 2)[0, 0].sum().item()
        assert area == pytest.approx(math.pi * (0.17 * 64) ** 2, rel=0.04)


def test_everything_stays_inside_and_apart():
    rng = random.Random(3)
    for _ in range(60):
        a, b = world.sample_world(rng, things=2, cap=world.cap_of(2)).things
        assert world.apart(a, b, 16) and a.color != b.color
        alone = [(world.render([world.World((t,))])[0].amax(0) + 1) / 2 for t in (a, b)]
        for x in alone:                       # what leaves the picture no longer counts
            area = x.sum((1, 2))
            assert (area / area.mean() - 1).abs().max() < 0.03
        assert torch.minimum(*alone).max() < 0.6      # at most two half-covered rims meet
    crowded = [world.sample_world(rng, things=4, overlap=True).things for _ in range(20)]
    assert not all(world.apart(t[0], t[1], 16) for t in crowded)
    many = world.sample_world(rng, things=100, overlap=True).things     # more than colours
    assert len(many) == 100 and {t.color for t in many} == set(world.COLORS)
    assert len({t.color for t in many[:len(world.COLORS)]}) == len(world.COLORS)


def test_what_moves_alone_passes_near_the_middle():
    rng = random.Random(4)
    seen = {"sign": [], "shape": []}
    for _ in range(400):
        (thing,) = world.sample_world(rng, signs=0.5).things
        vx, vy = world.velocity(thing)
        off = max(abs(thing.x + 7.5 * vx - 0.5), abs(thing.y + 7.5 * vy - 0.5))
        seen["sign" if thing.shape == "sign" else "shape"].append(off)
    for kind, off in seen.items():
        assert 0.9 * world.WANDER[kind] < max(off) <= world.WANDER[kind] + 1e-9
    assert any(abs(t.x - 0.5) > 0.25 for _ in range(20) for t in world.sample_world(rng, 2).things)


def test_what_shares_a_picture_passes_through_points_of_a_grid():
    rng, off = random.Random(4), set()
    for thing in (t for _ in range(200)
                  for t in world.sample_world(rng, 2, cap=world.cap_of(2)).things):
        off |= {(p + 7.5 * v - 0.5) / world.GRID
                for p, v in zip((thing.x, thing.y), world.velocity(thing))}
    assert all(abs(a - round(a)) < 1e-9 for a in off)
    assert {round(a) for a in off} >= set(range(-2, 3))
    crowd = world.sample_world(rng, 8, overlap=True).things
    assert any(t.x / world.GRID % 1 > 1e-3 for t in crowd)


def test_with_several_objects_words_of_every_length_are_as_often_and_of_one_height():
    rng = random.Random(5)
    signs = [t for _ in range(400) for t in world.sample_world(rng, 2, cap=world.cap_of(2)).things
             if t.word]
    assert 290 < len(signs) < 370                                       # 2 in 5 of 800
    for length in (1, 2, 3):
        assert 0.2 < sum(len(t.word) == length for t in signs) / len(signs) < 0.5
    heights = {world.bitmap(*world.bitmap_of(t, 64)).shape[1] for t in signs}
    assert heights == {(12 + 2 * 3) * world.SUPERSAMPLE}        # capitals of 12 pixels, two margins
    prompts = world.test_prompts(0, 40, things=2)
    words = [[len(p["text"]) for p in world.parse(text)] for kind, text in prompts
             if kind.startswith("words")]
    assert len(words) == 16 and all(len(w) == 2 and max(w) > 1 for w in words)


def test_heldout_is_never_drawn_and_leaves_no_word_or_colour_out():
    rng = random.Random(0)
    drawn = [world.sample_world(rng).things[0] for _ in range(3000)]
    assert not any(world.is_heldout(t) for t in drawn)
    for key, values in (("color", world.COLORS), ("direction", world.DIRECTIONS)):
        assert {getattr(t, key) for t in drawn} == set(values)
    held = [world.sample_world(rng, heldout=True).things[0] for _ in range(300)]
    assert all(world.is_heldout(t) for t in held)
    assert {t.shape for t in held} == {*world.SHAPES, "sign"}
    assert not set(world.WORDS) & set(world.HELDOUT_WORDS)


def test_chinese_signs_or_one_clear_line():
    letters, words, never = world.SCRIPTS["chinese"]
    assert len(letters) == 10 and not set(words) & set(never)
    assert set("".join(never)) <= set("".join(words)) <= set(letters)     # new words, known letters
    try:
        ink = {w: world.glyphs(w, 60) for w in letters}
    except ValueError as error:
        assert "fonts-wqy-microhei" in str(error) and "\n" not in str(error)
        pytest.skip("fonts-wqy-microhei is not installed")
    for w, g in ink.items():
        assert 0.1 < g.float().mean() < 0.6, w
        assert not g[:, 0].any() and not g[:, -1].any()                   # nothing is cut off
    assert not ink["口"][25:35, 25:35].any() and ink["田"][25:35, 25:35].any()
    rng = random.Random(0)
    drawn = [world.sample_world(rng, signs=1.0, script="chinese").things[0] for _ in range(300)]
    assert {t.word for t in drawn} <= {*letters, *words} and not any(map(world.is_heldout, drawn))


def test_fifteen_of_144_triples_are_held_out():
    held = [t for t in itertools.product(world.COLORS, world.SHAPES, world.DIRECTIONS)
            if world.is_heldout(world.Thing(*t, "slow"))]
    assert len(held) == 15
    for i, values in enumerate((world.COLORS, world.SHAPES, world.DIRECTIONS)):     # each: in both
        assert {t[i] for t in held} == set(values)


def test_a_window_is_drawn_without_the_rest():
    rng = random.Random(0)
    worlds = [world.sample_world(rng) for _ in range(4)]
    for interval in (1.0, 3.5):
        whole = world.render(worlds, 16, interval=interval)
        assert torch.equal(world.render(worlds, 6, interval=interval, start=10), whole[:, :, 10:])


def test_letters_have_holes():
    for letter, holes in (("O", 1), ("B", 2), ("I", 0)):
        ink = F.pad(world.glyphs(letter, 40), [2] * 4)
        outside, reached = ~ink, torch.zeros_like(ink)
        reached[0, 0] = True
        for _ in range(400):                                                  # flood fill
            reached = (F.max_pool2d(reached[None].float(), 3, 1, 1)[0] > 0) & outside
        inner, count = outside & ~reached, 0
        while inner.any():
            seed = torch.zeros_like(inner)
            seed.view(-1)[inner.flatten().nonzero()[0]] = True
            for _ in range(100):
                seed = (F.max_pool2d(seed[None].float(), 3, 1, 1)[0] > 0) & inner
            inner, count = inner & ~seed, count + 1
        assert count == holes, letter


def test_motion_curriculum():
    rng = random.Random(0)
    assert all(world.motion_interval(rng, 0.0, 8) == 1 for _ in range(9))
    late = [world.motion_interval(rng, 0.9, 8) for _ in range(500)]
    assert 1 <= min(late) < 2 and 7 < max(late) <= 8
    middle = [world.motion_interval(rng, 0.375, 8) for _ in range(500)]
    assert max(middle) <= 4.5
    # bouncing: a slow clip is what it was, a fast one stays in the picture and moves further
    assert [world.bounce(p, 0, 10) for p in (3, 10, 11, 19, 21, -2)] == [3, 10, 9, 1, 1, 2]
    thing = world.Thing("white", "circle", "right", "fast", radius=0.17, x=0.3, y=0.5)
    slow, fast = (world.render([world.World((thing,))], interval=i)[0, 0] for i in (1.0, 6.0))
    area = (fast + 1).sum((1, 2))
    assert (area / area.mean() - 1).abs().max() < 0.03                  # nothing leaves
    assert torch.equal(fast[1], world.render([world.World((thing,))])[0, 0, 6])
    assert fast.diff(dim=0).abs().mean() > 2 * slow.diff(dim=0).abs().mean()



# ---- captions and prompts ------------------------------------------------------------------------


def test_captions_are_the_grammar():
    rng = random.Random(1)
    for things in (1, 2):
        for _ in range(100):
            w = world.sample_world(rng, things, heldout=None, cap=world.cap_of(things))
            assert [(p["color"], p["shape"], p["direction"], p["speed"], p["text"])
                    for p in world.parse(world.caption(w))] == [
                        (t.color, t.shape, t.direction, t.speed, t.word) for t in w.things]
    for other in ("a dog on a beach", "", "a red circle", "a red circle moving left and",
                  "a red circle moving left and a red square moving up"):   # told apart by colour
        assert world.parse(other) == [], other


def test_prompts_are_of_their_kind():
    prompts = world.test_prompts(0)
    kinds = [k for k, _ in prompts]
    assert [kinds.count(k) for k in ("trained", "heldout", "words", "words_heldout")] == [
        160, 48, 32, 32]
    for kind, prompt in prompts:
        (asked,) = world.parse(prompt)
        fields = {k: asked[k] for k in ("color", "shape", "direction", "speed")}
        assert world.is_heldout(world.Thing(word=asked["text"], **fields)) == kind.endswith(
            "heldout")
        assert kind.startswith("words") == (len(asked["text"]) > 1)
    assert prompts == world.test_prompts(0) != world.test_prompts(1)
    two = world.test_prompts(0, 30, things=2)
    assert [k for k, _ in two].count("words") == 6 and len(two) == 30 + 9 + 6 + 6
    assert all(len(world.parse(p)) == 2 for _, p in two)
    assert all("sign" in p for k, p in two if k.startswith("words"))


@pytest.mark.parametrize("script", world.SCRIPTS)
def test_no_caption_is_longer_than_the_longest(script):
    for things in (1, 2, 3):
        longest = world.longest_caption(things, script)
        assert len(world.parse(longest)) == things
        rng = random.Random(things)
        for _ in range(200):
            parts = [world.Thing(c, "sign", rng.choice(list(world.DIRECTIONS)), "slow",
                                 rng.choice(sum(world.SCRIPTS[script], ())))
                     for c in rng.sample(list(world.COLORS), things)]
            text = world.caption(world.World(tuple(parts)))
            assert len(text.split()) <= len(longest.split())
            assert len(set(text.split())) <= len(set(longest.split()))
            letters = lambda caption: sum(len(p["text"]) for p in world.parse(caption))
            assert letters(text) <= letters(longest)


def test_an_unknown_script_is_one_line():
    with pytest.raises(ValueError, match="^script klingon: not one of latin, chinese$"):
        world.check_script("klingon")
    world.check_script("latin")


# ---- the judge -----------------------------------------------------------------------------------


def test_judge_agrees_with_the_truth():
    agreement = world.check_judge(0, 500)
    assert min(agreement[k] for k in ("color", "shape", "direction", "speed")) >= 0.99
    assert agreement["text"] >= 0.97


def test_judge_agrees_with_two_objects():
    assert min(world.check_judge(0, 60, things=2, size=64).values()) >= 0.97


def test_judge_reads_prompts_typed_by_hand():
    """In another order than drawn, with "an" and spaces; each fact can be wrong."""
    a = world.Thing("red", "circle", "right", "fast", x=0.2, y=0.25)
    b = world.Thing("blue", "sign", "left", "slow", "HE", world.cap_of(2), x=0.6, y=0.75)
    (clip,) = world.render([world.World((a, b))], H=64)
    right = 'a blue sign saying "HE" moving left and  an red circle moving right fast '
    assert world.judge(clip, right) == dict.fromkeys(
        ("color", "shape", "direction", "speed", "text"), True)
    for fact, old, new in (("shape", "circle", "square"), ("direction", "moving left", "moving up"),
                           ("speed", " fast", ""), ("text", "HE", "HO")):
        verdict = world.judge(clip, right.replace(old, new))
        assert [k for k, held in verdict.items() if not held] == [fact]
    assert not world.judge(clip, right.replace("red", "green"))["color"]
    assert not world.judge(torch.zeros(3, 8, 32, 32), 'a red sign saying "É" moving left')["text"]
    with pytest.raises(ValueError, match="prompt 'a dog': not of the toy world's grammar"):
        world.judge(clip, "a dog")


def test_judge_reads_chinese():
    try:
        world.check_script("chinese")
    except ValueError:
        pytest.skip("fonts-wqy-microhei is not installed")
    assert min(world.check_judge(0, 300, script="chinese").values()) >= 0.99
    w = world.World((world.Thing("red", "sign", "left", "slow", "火山"),))
    assert world.parse(world.caption(w))[0]["text"] == "火山"


def test_an_image_is_judged_without_its_motion():
    w = world.World((world.Thing("red", "circle", "left", "slow"),))
    seen = world.judge(world.render([w], 1)[0], world.caption(w))
    assert seen["color"] and seen["shape"] and not seen["direction"]


@pytest.mark.parametrize("things", [1, 2])
def test_no_object_leaves_the_picture_or_bounces(things):
    rng = random.Random(0)
    for _ in range(600 // things**2):
        w = world.sample_world(rng, things, heldout=None, frames=world.LONGEST,
                               cap=world.cap_of(things))
        for thing in w.things:
            for p, v, size in zip((thing.x, thing.y), world.velocity(thing), world.extent(thing)):
                ends = p, p + v * (world.LONGEST - 1)
                assert size / 2 <= min(ends) + 1e-9 and max(ends) <= 1 - size / 2 + 1e-9, thing


def test_the_judge_agrees_with_clips_of_any_length():
    for frames in (2, 3, 8, world.LONGEST):
        right = world.check_judge(0, 60, frames=frames)
        assert right["speed"] > 0.95 and right["direction"] > 0.9, frames
    with pytest.raises(ValueError, match="frames 17: at most 16"):
        world.sample_world(random.Random(0), frames=17)
    assert world.sample_world(random.Random(0), frames=64, overlap=True).things
    with pytest.raises(ValueError, match="things 4: at most 3 have room"):
        world.sample_world(random.Random(0), things=4)
    with pytest.raises(ValueError, match="reads square ones"):
        world.perceive(torch.zeros(3, 16, 32, 48))


def test_what_is_not_seen_is_each_times_another_dict():
    a, b = (world.perceive(torch.full((3, 4, 32, 32), -1.0))[0] for _ in range(2))
    assert a == b == world.NOTHING and len({id(a), id(b), id(world.NOTHING)}) == 3


def test_judge_can_fail():
    rng = random.Random(0)
    worlds = [world.sample_world(rng) for _ in range(120)]
    wrong = world.accuracy([world.judge(c, world.caption(w))
                            for c, w in zip(world.render(worlds), worlds[1:] + worlds[:1])])
    assert wrong["color"] < 0.35 and wrong["direction"] < 0.3 and wrong["text"] < 0.15
    assert wrong["shape"] < 0.55                       # signs are 2 in 5
    black = world.judge(torch.full((3, 16, 32, 32), -1.0), world.caption(worlds[0]))
    noise = world.judge(torch.randn(3, 16, 32, 32), world.caption(worlds[0]))
    assert not any(black.values()) and not noise["direction"]
