"""Videos: what is read is what a player shows, whatever the file's header says; captions; folders;
threads that read ahead. The files are made here: frame k shows its number."""
import gc
import itertools
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import train

ROOT = Path(train.__file__).parent
CLIPS, CASES = ROOT.parent / "shared/clips", ROOT.parent / "shared/cases"

# ---- making videos -------------------------------------------------------------------------------


def counter(k, h=64, w=64):
    """A picture of the number k: eight bars, white for 1, the highest bit first."""
    bits = np.array([k >> i & 1 for i in range(7, -1, -1)], np.uint8)
    return np.broadcast_to(255 * np.repeat(bits, w // 8)[None, :, None], (h, w, 3)).copy()


def numbers(x):
    """Read the numbers of (T, 64, 64, 3) back."""
    bars = x[:, 16:-16].float().mean((1, 3)).view(len(x), 8, 8).mean(2) > 127
    return (bars.long() * 2 ** torch.arange(7, -1, -1)).sum(1).tolist()


def write(path, frames=60, codec="libx264", pix="yuv420p", picture=counter, rate=25, times=None,
          gop=12, bf=0, format=None, setup=lambda stream: None, **options):
    """Encode frames, picture(k) each; times: when each is shown, in milliseconds."""
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = picture(0).shape[:2]
        stream.pix_fmt = pix
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, bf
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        setup(stream)
        for k in range(frames if times is None else len(times)):
            image = picture(k)
            frame = av.VideoFrame.from_ndarray(image, "rgba" if image.shape[2] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def copied(source, path, change=lambda packet, number: packet):
    """Copy the packets of a video as `change` leaves them into another file."""
    with av.open(str(source)) as there, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(there.streams.video[0])
        for k, packet in enumerate(p for p in there.demux(video=0) if p.size):
            packet = change(packet, k)
            packet.stream = stream
            out.mux(packet)
    return path


def window(path, start=0, T=6, interval=1, size=64):
    return train.read_window(path, start, interval, T, size, train.probe(path)[1])


def shows(path, want, rate=25.0, starts=(0, 5, 11, 13, 23, 30, 47)):
    """Assert that a video has the frames with these numbers, and that windows reach them all."""
    frames, measured, _ = train.probe(path)
    assert frames == len(want) and measured == pytest.approx(rate, rel=0.03)
    for start, interval in [*((s, 1) for s in (*starts, len(want) - 6)), (11, 2)]:
        right = want[start : start + 6 * interval : interval]
        if len(right) == 6:
            assert numbers(window(path, start, interval=interval)) == right, (start, interval)


def make_folder(path, videos=3, frames=60):
    """Videos whose frame k has the grey level 4 k: told from any crop of it."""
    path.mkdir()
    for v in range(videos):
        clip = (4 * torch.arange(frames) / 127.5 - 1).view(1, frames, 1, 1).expand(3, -1, 48, 64)
        train.write_video(path / f"v{v}.{'gif' if v == 2 else 'mp4'}", clip, fps=10)
        (path / f"v{v}.txt").write_text(f"grey number {v}\n")
    return path


def levels(x):
    """Frame numbers of a clip (3, T, H, W) of such a video."""
    return (x.mean((0, 2, 3)) + 1) * 127.5 / 4


PARSED = cache(lambda *flags: train.parse(["--data", "x", *flags])[0])


def config(folder, *flags, **clips):
    cfg = replace(PARSED(*flags), data=str(folder))
    return replace(cfg, clips=replace(cfg.clips, **clips))


def folder_of(path, *flags, **clips):
    cfg = config(path, *flags, **clips)
    return train.VideoFolder(cfg, train.find_videos(cfg))


def read(clips, split, i):
    return clips.clip(split, i, clips.shape(i))


# ---- every frame of every container --------------------------------------------------------------


@pytest.mark.parametrize("name, codec, options", [
    ("v.mp4", "libx264", {}), ("v.mp4", "libx264", {"bf": 2}),
    ("v.m4v", "mpeg4", {"bf": 2}), ("v.mkv", "libx264", {"bf": 2}), ("v.flv", "libx264", {"bf": 2}),
    ("v.ts", "libx264", {"bf": 2}), ("v.ts", "mpeg2video", {"bf": 2}),
    ("v.mpg", "mpeg2video", {"bf": 2}), ("v.mpg", "mpeg1video", {}), ("v.wmv", "wmv2", {}),
    ("v.avi", "libx264", {"bf": 2}), ("v.avi", "mpeg4", {"bf": 2}),
    ("v.avi", "mjpeg", {"pix": "yuvj420p"}), ("v.h264", "libx264", {"bf": 2, "format": "h264"}),
    ("v.webm", "libvpx", {}), ("v.webm", "libvpx-vp9", {"lag-in-frames": 16}),
    ("v.mov", "png", {"pix": "rgb24"}), ("v.gif", "gif", {"pix": "rgb8"}),
], ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())) or "plain")
def test_windows_hold_the_frames_that_were_asked_for(tmp_path, name, codec, options):
    """Whatever a seek finds: it goes by the order of decoding, and in some files lands anywhere."""
    shows(write(tmp_path / name, codec=codec, **options), list(range(60)))


def test_a_window_that_ends_late_repeats_the_last_frame(tmp_path):
    path = write(tmp_path / "v.mp4", bf=2)
    assert numbers(window(path, 56)) == [56, 57, 58, 59, 59, 59]
    assert numbers(window(path, 62)) == [59] * 6
    with pytest.raises(ValueError, match="nothing can be decoded from frame 99 on"):
        window(path, 99)


def edited(path, start, end):
    """Rewrite the edit list of an .mp4: what is shown of it, in seconds."""
    data = bytearray(path.read_bytes())
    number = lambda at: struct.unpack_from(">I", data, at)[0]
    movie, media = (number(data.find(box) + 16) for box in (b"mvhd", b"mdhd"))
    at = data.find(b"elst")
    assert number(at + 8) == 1                                              # entries
    struct.pack_into(">II", data, at + 12, round((end - start) * movie),
                     round(start * media) + number(at + 16))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("bf", [0, 2])
def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, bf):
    source = write(tmp_path / "v.mp4", bf=bf)

    def earlier(packet, k):                 # cut without re-encoding: begins before time 0
        lead = round(20 / 25 / packet.time_base)
        packet.pts, packet.dts = packet.pts - lead, packet.dts - lead
        return packet

    def later(packet, k):
        packet.pts, packet.dts = packet.pts + 90_000, packet.dts + 90_000
        return packet

    shows(copied(source, tmp_path / "cut.mov", earlier), list(range(20, 60)))
    shows(copied(source, tmp_path / "late.mp4", later), list(range(60)))
    for a, b in ((0, 40), (20, 60), (13, 43)):
        path = Path(shutil.copy(source, tmp_path / "part.mp4"))
        shows(edited(path, a / 25, b / 25), list(range(a, b)))


def patched(path, find, offset, value):
    """Overwrite bytes of a file, `offset` after each place of `find`."""
    data = bytearray(path.read_bytes())
    for hit in list(re.finditer(re.escape(find), data)):
        data[hit.start() + offset : hit.start() + offset + len(value)] = value
    assert data != path.read_bytes()
    path.write_bytes(data)
    return path


def test_headers_that_announce_something_else(tmp_path):
    """Too many frames, a rate of 1000, no rate at all."""
    avi = write(tmp_path / "v.avi", codec="mpeg4")
    patched(avi, b"avih", 24, struct.pack("<I", 9999))                      # dwTotalFrames
    shows(patched(avi, b"strh", 40, struct.pack("<I", 9999)), list(range(60)), starts=(0, 30))
    times = [40 * k + k % 3 for k in range(60)]                 # a browser's, in milliseconds
    duration = b"\x23\xe3\x83\x84"                              # DefaultDuration, of four bytes
    for name, value in (("1000.webm", duration + struct.pack(">I", 1_000_000)),
                        ("none.webm", b"\xec\x86" + bytes(6))):             # a Void in its place
        path = write(tmp_path / name, codec="libvpx", times=times)
        shows(patched(path, duration, 0, value), list(range(60)), starts=(0, 23))


@pytest.mark.parametrize("name, codec, bf", [
    ("v.ts", "libx264", 0), ("v.mkv", "libx264", 0), ("v.flv", "libx264", 0),
    ("v.ts", "mpeg2video", 2), ("v.mpg", "mpeg2video", 0), ("v.webm", "libvpx", 0)])
def test_nothing_is_shown_before_the_first_key_frame(tmp_path, name, codec, bf):
    """A recording that begins, or was cut, between two of them."""
    source = write(tmp_path / f"whole.{'mkv' if codec == 'libvpx' else 'ts'}", 100, codec, gop=40,
                   bf=bf)
    path = tmp_path / name
    with av.open(str(source)) as there, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(there.streams.video[0])
        packets = list(enumerate(p for p in there.demux(video=0) if p.size))[20:]
        key = next(packet.pts for _, packet in packets if packet.is_keyframe)
        first = sum(packet.pts < key for _, packet in packets) + 20
        for _, packet in packets:
            packet.stream = stream
            out.mux(packet)
    assert first > 20
    shows(path, list(range(first, 100)))


@pytest.mark.parametrize("codec, bf", [("libx264", 0), ("libx264", 2), ("mpeg4", 2)])
def test_a_header_without_a_start_time(tmp_path, codec, bf):
    """ASF files have none; the pictures of these begin after four seconds."""
    def later(packet, k):
        four = round(4 / packet.time_base)
        packet.pts += four
        packet.dts = (packet.pts if packet.dts is None else packet.dts + four)
        return packet

    source = write(tmp_path / "v.wmv", codec=codec, bf=bf)
    for path in (source, copied(source, tmp_path / "late.wmv", later)):
        shows(path, list(range(60)), starts=(0, 5, 40))


@pytest.mark.parametrize("name, codec", [("v.webm", "libvpx"), ("v.ts", "libx264")])
def test_a_picture_whose_shape_changes_on_the_way(tmp_path, name, codec):
    """As in recordings of calls: the later frames take the shape of the window's first."""
    parts = [write(tmp_path / f"{h}{name}", 30, codec,
                   picture=lambda k, h=h: counter(k + 30 * (h == 96), h, 64)) for h in (64, 96)]
    path, clock = tmp_path / name, itertools.count()
    with av.open(str(parts[0])) as first, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(first.streams.video[0])
        for part in parts:
            with av.open(str(part)) as there:
                for packet in (p for p in there.demux(video=0) if p.size):
                    packet.pts = packet.dts = round(next(clock) / 25 / packet.time_base)
                    packet.stream = stream
                    out.mux(packet)
    x = window(path, 27)
    assert x.shape == (6, 64, 64, 3) and numbers(x) == list(range(27, 33))
    path.with_suffix(".txt").write_text("numbers")      # a window of the later shape is enlarged
    clips = folder_of(tmp_path, frames=4)
    video = [row for row in clips.videos if row[0] == name][0]
    for seed in range(4):
        x, *_ = clips.read(video, "heldout", random.Random(seed), (4, 64, 96), 0.0)
        assert x.shape[1] >= 64 and x.shape[2] >= 96


@pytest.mark.parametrize("name", ["v.mkv", "v.avi"])
def test_a_file_without_marks_of_key_frames(tmp_path, name):
    def unmarked(packet, k):
        packet.is_keyframe = False
        return packet

    source = write(tmp_path / f"marked.{name[2:]}", codec="mpeg4")
    path = copied(source, tmp_path / name, unmarked)
    assert train.probe(path)[0] == 60 and numbers(window(path, 0)) == list(range(6))


def test_a_video_that_begins_anew(tmp_path):
    """Two recordings, one behind the other: the times of the second are those of the first."""
    path = write(tmp_path / "v.ts")
    path.write_bytes(2 * path.read_bytes())
    assert train.probe(path)[:2] == (60, pytest.approx(25))
    assert numbers(window(path, 0, 60)) == list(range(60))


@pytest.mark.parametrize("name, times", [
    ("frames dropped", [round(1000 * k / 30) for k in range(120) if k % 4 != 3]),
    ("every second late", [40 * k + 22 * (k % 2) for k in range(90)]),
    ("film in a 60 Hz container", [round(1000 * round(2.5 * k + 0.01) / 60) for k in range(90)]),
    ("stands still", [40 * k + 5000 * (k >= 45) for k in range(90)]),
    ("slows down", [100 * k if k < 20 else 2000 + 1000 * (k - 20) for k in range(40)])])
def test_frames_of_a_varying_rate_stand_where_they_are_shown(tmp_path, name, times):
    """As long as it lasts; no number runs ahead of the time, so training reads no held-out frame;
    and every picture is seen."""
    path = write(tmp_path / "v.mkv", times=times, gop=250)
    frames, rate, _ = train.probe(path)
    assert (frames - 1) / rate == pytest.approx(times[-1] / 1000, rel=0.02)
    whole = numbers(window(path, 0, frames))
    shown = [max(k for k, ms in enumerate(times) if ms <= 1000 * (n + 0.5) / rate)
             for n in range(frames)]
    assert max(abs(a - b) for a, b in zip(whole, shown)) <= 2
    assert len(set(whole)) >= len(times) - 2
    for start in range(0, frames - 6, frames // 7):             # a seek finds the same
        assert max(abs(a - b) for a, b in zip(numbers(window(path, start)), whole[start:])) <= 1


def test_reference_frames_that_are_never_shown(tmp_path):
    """VP8 hides its golden frames in packets of their own; bit 4 of a packet says so."""
    source = write(tmp_path / "v.webm", codec="libvpx", frames=66)
    hidden = [k for k in range(66) if k % 11 == 5]
    clock = itertools.count()

    def hide(packet, k):
        data = bytearray(bytes(packet))
        data[0] &= ~16 if k in hidden else 255
        new = av.Packet(bytes(data))
        new.time_base, new.is_keyframe = Fraction(1, 1000), packet.is_keyframe
        new.pts = new.dts = 40 * next(clock) if k not in hidden else 40 * k - 40 * (k // 11) - 1
        return new

    path = copied(source, tmp_path / "hidden.webm", hide)
    shows(path, [k for k in range(66) if k not in hidden], starts=(0, 11, 30))


# ---- the picture: shape, orientation, ground -----------------------------------------------------

QUARTERS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)


def quarters(k, h=32, w=64):
    """Red, green / blue, white."""
    return QUARTERS.repeat(h // 2, 0).repeat(w // 2, 1)


@pytest.mark.parametrize("a, b, c, d", [
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
    (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)])
def test_the_eight_orientations(tmp_path, a, b, c, d):
    """A display matrix maps (x, y) to (a x + c y, b x + d y); y points downwards."""
    path = write(tmp_path / "v.mp4", 10, picture=quarters, crf=1)
    at = path.read_bytes().find(b"tkhd") + 44
    with path.open("r+b") as f:
        f.seek(at)
        one = 1 << 16
        f.write(struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30))
    x = window(path, 0, 2, size=32)[0]
    shape = (64, 32) if b else (32, 64)
    assert x.shape[:2] == shape and train.probe(path) == (10, 25.0, shape[0] / shape[1])
    for row, column in itertools.product((0, 1), (0, 1)):
        px, py = 2 * column - 1, 2 * row - 1                            # -1: left, above
        tx, ty = a * px + c * py, b * px + d * py
        seen = x[shape[0] * (2 + ty) // 4, shape[1] * (2 + tx) // 4].float()
        assert (seen - torch.from_numpy(QUARTERS[row, column]).float()).abs().max() < 40


def disc(k, h=90, w=55, ratio=2):
    """A disc that is round when a pixel is `ratio` times as wide as high, red on black."""
    y, x = np.mgrid[:h, :w] + 0.5
    image = np.zeros((h, w, 3), np.uint8)
    image[(y - h / 2) ** 2 + (ratio * (x - w / 2)) ** 2 < 40**2] = (255, 0, 0)
    return image


@pytest.mark.parametrize("name, codec, pix", [
    ("v.mp4", "libx264", "yuv444p"), ("v.mkv", "libx264", "yuv444p"), ("v.mov", "png", "rgb24"),
    ("v.avi", "mpeg4", "yuv420p"), ("v.ts", "libx264", "yuv444p")])
def test_pixels_that_are_not_square(tmp_path, name, codec, pix):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = write(tmp_path / name, 10, codec, pix, lambda k: disc(k, 90, 56), setup=setup)
    assert train.probe(path)[2] == pytest.approx(90 / 112)
    red = window(path, 0, 1, size=90)[0, :, :, 0] > 127
    assert red.shape == (90, 112)
    assert red.any(0).sum().item() == pytest.approx(red.any(1).sum().item(), abs=2)


def ghost(k):
    """A red disc that moves over a transparent ground, whose hidden colour is green."""
    y, x = np.mgrid[:64, :64]
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., 1] = 255
    image[(y - 32) ** 2 + (x - 20 - 2 * k) ** 2 < 12**2] = (255, 0, 0, 255)
    return image


def alpha_mode(stream):
    stream.metadata["alpha_mode"] = "1"


@pytest.mark.parametrize("name, codec, pix, setup, options", [
    ("v.webm", "libvpx-vp9", "yuva420p", lambda stream: None, {}),
    ("v.mkv", "libvpx-vp9", "yuva420p", alpha_mode, {}),            # which is then in capitals
    ("v.webm", "libvpx", "yuva420p", alpha_mode, {"auto-alt-ref": 0}),
    ("v.mov", "png", "rgba", lambda stream: None, {}),
    ("v.mkv", "ffv1", "yuva420p", lambda stream: None, {}), ("v.gif", "", "", None, {})],
    ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_transparent_shows_the_ground(tmp_path, name, codec, pix, setup, options):
    path = tmp_path / name
    if codec:
        write(path, 12, codec, pix, ghost, setup=setup, gop=5, **options)
    else:
        first, *rest = (Image.fromarray(ghost(k)) for k in range(12))
        first.save(path, save_all=True, append_images=rest, duration=40, disposal=2)
    for start in (0, 7):
        x = window(path, start, 3).float()
        assert x[:, 2, 2].max() < 8                             # black, not green
        for k in range(3):
            assert (x[k, 32, 20 + 2 * (start + k)] - torch.tensor([255, 0, 0])).abs().max() < 12


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_cover_picture_is_not_the_video(tmp_path, suffix, first, flagged):
    path = tmp_path / f"v.{suffix}"
    with av.open(str(path), "w") as out:
        def add(codec, pix, h, w):
            stream = out.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = h, w, pix
            return stream

        kinds = [("mjpeg", "yuvj420p", 96, 48), ("libx264", "yuv420p", 64, 64)]
        cover, video = sorted((add(*kind) for kind in kinds[:: 1 if first else -1]),
                              key=lambda stream: -stream.height)
        if flagged:
            cover.disposition = av.stream.Disposition.attached_pic
        for stream, frames in ((cover, [counter(0, 96, 48)]), (video, map(counter, range(60)))):
            for image in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            out.mux(stream.encode())
    shows(path, list(range(60)), starts=(0, 30))


def test_the_longer_of_two_streams_is_not_the_one_that_is_shown(tmp_path):
    """The first is the default; the second has twice as many frames."""
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=rate) for rate in (25, 50)]
        for stream, side, flags in zip(streams, (64, 32), (av.stream.Disposition.default, 0)):
            stream.height = stream.width = side
            stream.pix_fmt, stream.disposition = "yuv420p", flags
        for k in range(120):
            for stream, n, side in ((streams[0], k / 2, 64), (streams[1], k, 32)):
                if n == int(n):
                    image = counter(int(n), side, side)
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        for stream in streams:
            out.mux(stream.encode())
    shows(path, list(range(60)), starts=(0, 30))


def test_frames_with_exif_data(tmp_path):
    """As cameras write them; PyAV may not know such side data, which is no reason to refuse."""
    from io import BytesIO

    exif = Image.Exif()
    exif[0x010F] = "a camera"
    with av.open(str(tmp_path / "v.mov"), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj420p"
        out.start_encoding()
        for k in range(60):
            Image.fromarray(counter(k)).save(data := BytesIO(), "JPEG", exif=exif)
            packet = av.Packet(data.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), True
            packet.pts = packet.dts = k
            out.mux(packet)
    shows(tmp_path / "v.mov", list(range(60)), starts=(0, 30))


def test_metadata_that_is_not_utf8(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "XXXXcafeXXXX"
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(60):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(counter(k))))
        out.mux(stream.encode())
    patched(path, b"XXXXcafeXXXX", 7, b"\xe9")
    with pytest.raises(UnicodeDecodeError):                     # what PyAV does by itself
        av.open(str(path)).metadata  # noqa: B018
    shows(path, list(range(60)), starts=(0, 30))


# ---- writing -------------------------------------------------------------------------------------


def delays(path):
    """Hundredths of a second of each frame of a GIF, from its graphic control extensions."""
    found = re.findall(rb"\x21\xf9\x04.(..)..?[\x2c\x21]", path.read_bytes(), re.S)
    return [struct.unpack("<H", d)[0] for d in found]


def moving(frames):
    """A clip whose frames all differ."""
    return torch.stack([torch.from_numpy(counter(k + 1)).permute(2, 0, 1).float() / 127.5 - 1
                        for k in range(frames)], 1)


@pytest.mark.parametrize("fps", [8, 10, 12.5, 16, 24, 25, 30, 50, 60, 100])
def test_a_gif_has_the_rate_that_was_asked_for(tmp_path, fps):
    """On average, and no delay of less than 20 ms, which browsers show as 100."""
    train.write_video(tmp_path / "v.gif", moving(48), fps)
    told = delays(tmp_path / "v.gif")
    assert len(told) == (48 if fps <= 50 else round(48 * 50 / fps))
    assert sum(told) == pytest.approx(100 * 48 / fps, abs=1.01)
    assert min(told) >= 2 and max(told) - min(told) <= 1
    assert train.probe(tmp_path / "v.gif")[1] == pytest.approx(min(fps, 50), rel=0.02)
    if fps in (16, 60):
        train.contact_sheet(tmp_path / "sheet.gif", [moving(48)], ["a prompt"], fps)
        assert sum(delays(tmp_path / "sheet.gif")) == pytest.approx(100 * 48 / fps, abs=1.01)
        assert min(delays(tmp_path / "sheet.gif")) >= 2


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    train.write_video(path, moving(48), 16, zoom=2)
    assert train.probe(path) == (48, pytest.approx(16, rel=0.01), 1.0)
    assert numbers(window(path, 20)) == list(range(21, 27))
    with av.open(str(path)) as file:
        assert file.streams.video[0].width == 128
    for fps in (0.4, 7.5, 30000 / 1001):
        train.write_video(path, moving(9), fps)
        assert train.probe(path)[1] == pytest.approx(fps, rel=0.02 if suffix == "gif" else 1e-4)
    for fps in (0, -1, 1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"fps {fps}: must be finite, 0.002 or more"):
            train.write_video(path, moving(2), fps)
    with pytest.raises(ValueError, match="v.png: not .mp4 or .gif"):
        train.write_video(tmp_path / "v.png", moving(2), 8)
    with pytest.raises(ValueError, match="thin.mp4: a picture of .mp4 needs 2 x 2 pixels or more"):
        train.write_video(tmp_path / "thin.mp4", moving(2)[:, :, :1], 8)


# ---- windows of a folder -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Read only: three grey videos of 60 frames."""
    return make_folder(tmp_path_factory.mktemp("videos") / "v")


@pytest.fixture
def asked(monkeypatch):
    """(start, interval, T) of each window; none is decoded."""
    seen = []

    def blank(path, start, interval, T, size, rate):
        seen.append((start, interval, T))
        return torch.zeros(T, size, size * 4 // 3, 3, dtype=torch.uint8)

    monkeypatch.setattr(train, "read_window", blank)
    return seen


def test_windows_are_frames_at_an_interval(grey):
    clips, seen = folder_of(grey), set()
    assert [row[:3] for row in clips.videos] == [
        [name, f"grey number {v}", 60] for v, name in enumerate(("v0.mp4", "v1.mp4", "v2.gif"))]
    rows = range(0, 24 * train.CROPS, train.CROPS)
    for i, split in itertools.product(rows, ("train", "heldout")):
        x, text = read(clips, split, i)
        assert x.shape == (3, 16, 32, 32) and text == f"grey number {i // train.CROPS % 3}"
        step = levels(x).diff()
        assert step.std() < 0.4 and 0.7 < step.mean() < 2.3
        if split == "heldout":                              # the last 16 frames of 60
            assert levels(x)[0] > 43.4
        else:
            assert levels(x)[-1] < 43.6
            seen.add(round(step.mean().item()))
        assert torch.equal(x, read(folder_of(grey) if i == 0 else clips, split, i)[0])
    assert seen == {1, 2}


def test_the_curriculum_of_the_autoencoder_reaches_its_last_interval(grey, asked):
    """--train_tae.motion 2: every frame at first, at the end also every second one."""
    clips = folder_of(grey, "--train_tae.motion", "2")
    for done, intervals in ((0.0, {1}), (1.0, {1, 2})):
        asked.clear()
        for i in range(0, 16 * train.CROPS, train.CROPS):
            clips.clip("tae", i, (8, 32, 32), done)
        assert {interval for _, interval, _ in asked} == intervals


@pytest.mark.parametrize("frames, cut", [(1000, 800), (80, 64), (79, 63), (60, 44), (32, 16),
                                         (31, 0), (16, 0), (5, 0)])
def test_what_is_held_out(frames, cut):
    """Of clips of 16 frames: the last fifth, or the last clip; nothing where two do not fit."""
    assert train.held_out(16, frames) == cut


def test_no_shape_trains_on_what_is_held_out(grey, asked):
    """Images and short clips do not see what the longest may not see."""
    clips = folder_of(grey, "--coupling", "independent", others=("4x32x32", "20x32x32"), images=0.5)
    for i in range(0, 40 * train.CROPS, train.CROPS):
        assert read(clips, "train", i)[0].shape[1:] == clips.shape(i)
        clips.clip("tae", i, (8, 32, 32), 0.5)
    assert {T for *_, T in asked} == {1, 4, 8, 16, 20}
    assert max(s + i * (T - 1) for s, i, T in asked) < train.held_out(20, 60) == 40


def test_images_of_the_dit_are_held_out_as_windows_of_the_autoencoder_are(grey, asked):
    clips = folder_of(grey, "--clips.frames", "1", "--train_tae.window", "16")
    for i in range(0, 60 * train.CROPS, train.CROPS):
        clips.clip("train", i, (1, 32, 32))
    assert max(start for start, *_ in asked) < train.held_out(16, 60) < train.held_out(1, 60)


def test_crops_of_a_window_decode_it_once(grey, monkeypatch):
    clips, calls = folder_of(grey), []
    real = train.read_window
    monkeypatch.setattr(train, "read_window", lambda *a: calls.append(a) or real(*a))
    crops = [read(clips, "train", i)[0] for i in range(2 * train.CROPS)]
    assert len(calls) == 2
    assert torch.equal(read(clips, "train", 0)[0], crops[0]) and len(calls) == 3
    edges = write(grey.parent / "edges.mp4", picture=lambda k: disc(k, 64, 96, 1))
    video = [edges.name, "a disc", 60, 25.0, 64 / 96]
    clips = train.VideoFolder(config(edges.parent), [video])
    crops = {read(clips, "train", i)[0].sum().item() for i in range(train.CROPS)}
    assert len(crops) == train.CROPS                                # at different places


@pytest.mark.parametrize("h, w, shape", [(48, 80, (16, 24, 40)), (80, 48, (16, 40, 24)),
                                         (48, 56, (16, 32, 32))])
def test_videos_go_to_the_shape_nearest_to_theirs(tmp_path, h, w, shape):
    write(tmp_path / "v.mp4", picture=lambda k: counter(k, h, w))
    (tmp_path / "v.txt").write_text("a video")
    clips = folder_of(tmp_path, "--coupling", "independent", others=("16x24x40", "16x40x24"))
    assert {clips.shape(i) for i in range(20)} == {shape}
    assert read(clips, "train", 0)[0].shape == (3, *shape)


def test_a_caption_tells_the_rate_of_its_clip(grey):
    clips = folder_of(grey, tell_fps=True)
    told = {read(clips, "train", i)[1] for i in range(0, 60, train.CROPS)}
    assert {t.split(" ", 1)[0] for t in told} == {"FPS-10", "FPS-5"}
    assert all(t.split(" ", 1)[1].startswith("grey number") for t in told)


@pytest.mark.parametrize("scale, count", [("toy", 1024), ("small", 1024), ("1b", 1_000_000)])
def test_only_the_small_scales_take_fewer_clips_of_videos(scale, count):
    assert PARSED("--scale", scale).clips.count == count
    assert PARSED("--scale", scale, "--clips.count", "77").clips.count == 77


def test_autoencoders_of_videos_have_a_shortcut_in_the_small_scales(tmp_path):
    scales = "toy", "small", "1b", "5b", "30b"
    assert [PARSED("--scale", s).tae.shortcut for s in scales] == [True, True, False, False, False]
    assert not PARSED("--scale", "small", "--tae.shortcut", "false").tae.shortcut
    drawn = train.parse(["--scale", "small"])[0]
    assert not drawn.tae.shortcut
    assert train.parse(["--scale", "small", "--tae.shortcut", "true"])[0].tae.shortcut
    train.open_run(drawn, tmp_path / "drawn").lock.close()
    (tmp_path / "drawn/tae").mkdir()
    train.save_tensors(tmp_path / "drawn/tae/tae.safetensors", {"a": torch.zeros(1)})
    assert not PARSED("--base", str(tmp_path / "drawn")).tae.shortcut       # it is taken over


# ---- folders -------------------------------------------------------------------------------------


def test_what_is_passed_over_is_said(tmp_path, capfd):
    folder = make_folder(tmp_path / "v", videos=2)
    (folder / "broken.mp4").write_bytes(b"not a video" * 50)
    write(folder / "silent.m4v")
    write(folder / "short.mkv", 5)
    (folder / "short.txt").write_text("short")
    for name in (".hidden.mp4", ".folder/v.mp4", "sub/.deep/v.mp4"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(folder / "v0.mp4", folder / name)
        (folder / name).with_suffix(".txt").write_text("hidden")
    picture = Image.fromarray(counter(9))
    for name, kind in (("v0.png", "PNG"), ("v0.jpg", "JPEG"), ("v1.webp", "WEBP"), ("v1", "BMP"),
                       ("v0.gif", "GIF"), ("v0.ico", "ICO")):
        picture.save(folder / name, kind)
    for name, text in (("v0.srt", "subtitles"), ("v0.nfo", "about it"), ("README.md", "read me"),
                       ("v0.svg", '<svg xmlns="http://www.w3.org/2000/svg" width="9"/>')):
        (folder / name).write_text(text)
    (folder / "long.nfo").write_text("a terminal would show it\n" * 900)       # as FFmpeg would
    (folder / "long.txt").write_text("a caption")
    (folder / "metadata.csv").write_text("file_name,text\ngone.mp4,gone\n")
    make_folder(tmp_path / "elsewhere", videos=1)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "v2.mp4").symlink_to(tmp_path / "nowhere.mp4")
    clips = folder_of(folder)
    err = capfd.readouterr().err
    assert [row[0] for row in clips.videos] == ["short.mkv", "v0.mp4", "v1.mp4"]
    assert "metadata.csv names gone.mp4: no such file" in err and "hidden" not in err
    assert "passed over broken.mp4: not a video that can be read" in err
    assert "passed over silent.m4v: no caption" in err
    assert "shorter than 16 frames, the last one is repeated: short.mkv" in err
    assert "passed over linked: a folder that is a link" in err
    for name in ("v0.nfo", "long.nfo"):
        assert f"passed over {name}: not a video that can be read (a text)" in err, name
    assert "passed over v2.mp4: not a video that can be read (" in err
    for name in ("v0.png", "v0.jpg", "v1.webp", "v1", "v0.gif", "v0.ico"):
        assert f"passed over {name}: not a video that can be read (a still picture)" in err, name
    assert "passed over v0.svg: not a video that can be read (" in err and "NoneType" not in err
    x, _ = read(clips, "train", 0)
    assert x.shape == (3, 16, 32, 32) and (x[:, 5:] - x[:, 4:5]).abs().max() < 0.05


def test_many_files_that_are_passed_over_are_counted(tmp_path, capfd):
    folder = make_folder(tmp_path / "v", videos=1)
    for i in range(30):
        (folder / f"x{i:02d}.mp4").write_bytes(b"no video")
    folder_of(folder)
    lines = capfd.readouterr().err.splitlines()
    assert sum("passed over x" in line for line in lines) == 20
    assert "--data: passed over 10 more files" in lines


def test_videos_that_no_clip_is_of_are_said(grey, capfd):
    said = "sees 2 of the 3 videos, 4 crops of each; 12 to see all"
    for count, videos in ((8, 2), (9, 3), (12, 3)):
        clips = folder_of(grey, count=count)
        assert (said in capfd.readouterr().err) == (videos == 2)
        assert len({clips.videos[i // train.CROPS][0] for i in range(count)}) == videos


@pytest.mark.parametrize("case, line", [
    ("empty", "no video in it that can be read and has a caption"),
    ("no captions", "no video in it"),
    ("unreadable", "no video in it"), ("blank", "v0.mp4: its caption is empty"),
    ("a NUL", "v0.mp4: its caption is no text"), ("latin-1", "v0.txt: not a text in UTF-8"),
    ("utf-16", "v0.txt: not a text in UTF-8"), ("a folder", "v0.txt"),
    ("two captions", "one caption in v0.txt, another in metadata.csv")])
def test_bad_folders_are_one_line(tmp_path, capfd, case, line):
    folder = make_folder(tmp_path / "v", videos=0 if case == "empty" else 1, frames=20)
    text = folder / "v0.txt"
    if case in ("no captions", "a folder"):
        text.unlink()
    if case == "a folder":
        text.mkdir()
    if case == "unreadable":
        (folder / "v0.mp4").write_bytes(bytes(1000))
    if case == "two captions":
        (folder / "metadata.csv").write_text("file_name,text\nv0.mp4,another\n")
    content = {"blank": b"  \n", "a NUL": b"a\0b", "latin-1": "café".encode("latin-1"),
               "utf-16": "a dog".encode("utf-16")}
    if case in content:
        text.write_bytes(content[case])
    assert train.main(["--data", str(folder), "--workdir", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert line in err[-1] and not any("Traceback" in row for row in err)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_to_its_videos(tmp_path, monkeypatch, capfd):
    """Through videos.json: what is added, or told otherwise, or moved, changes no clip; what is
    gone is named, and another stands in."""
    folder, seen = make_folder(tmp_path / "v"), []
    monkeypatch.setattr(train, "train_tae", lambda run, clips: seen.append(clips))
    start = lambda data: train.main(["--data", str(data), "--workdir", str(tmp_path / "run"),
                                     "--stage", "tae", "--device", "cpu"])
    assert start(folder) == 0
    rows = [i * train.CROPS for i in range(3)]
    want = [read(seen[0], "train", i) for i in rows]
    shutil.copy(folder / "v1.mp4", folder / "a.mp4")
    for name in ("a.txt", "v1.txt"):
        (folder / name).write_text("new")
    folder.rename(tmp_path / "moved")
    (tmp_path / "moved/v0.mp4").unlink()
    monkeypatch.setattr(train, "probe", None)                       # no file is looked at again
    assert start(f"{tmp_path}/moved/") == 0
    again = [read(seen[1], "train", i) for i in rows]
    assert [text for _, text in again] == ["grey number 1", "grey number 1", "grey number 2"]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(want[1:], again[1:]))
    assert "v0.mp4: cannot be read any more" in capfd.readouterr().err
    (tmp_path / "run/videos.json").write_text("[")
    assert start(tmp_path / "moved") == 2
    assert "run/videos.json: damaged" in capfd.readouterr().err


def test_a_video_that_vanishes_in_mid_run(tmp_path, capfd):
    folder = make_folder(tmp_path / "v")
    clips = folder_of(folder)
    want = read(clips, "train", 2 * train.CROPS)[0]
    (folder / "v0.mp4").unlink()
    (folder / "v1.mp4").write_bytes((folder / "v1.mp4").read_bytes()[:200])
    rows = [0, train.CROPS, 2 * train.CROPS, 3 * train.CROPS]
    again = folder_of(folder)                                       # for a cache that is empty
    again.videos = clips.videos
    seen = list(train.read_ahead(lambda i: read(again, "train", i), rows, 2))
    assert [text for _, text in seen] == ["grey number 2"] * 4 and torch.equal(seen[2][0], want)
    err = capfd.readouterr().err.splitlines()
    for name in ("v0.mp4", "v1.mp4"):
        assert 1 <= sum(f"{name}: cannot be read any more (" in line for line in err) <= 2
    (folder / "v2.gif").unlink()
    with pytest.raises(train.UserError, match="none of its videos can be read any more") as error:
        list(train.read_ahead(lambda i: read(again, "heldout", i), rows, 2))
    assert "\n" not in str(error.value)


def test_a_video_that_was_longer_is_not_read_as_a_still(tmp_path):
    path = write(tmp_path / "v.mkv", 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert numbers(train.read_window(path, 0, 1, 6, 64, 25.0)) == list(range(6))
    with pytest.raises(ValueError, match="nothing can be decoded from frame 70 on"):
        train.read_window(path, 70, 1, 16, 64, 25.0)


# ---- captions ------------------------------------------------------------------------------------


def captions(folder, *tables, encoding="utf-8"):
    """What tables in a folder say: (name of the table, its rows without the header)."""
    paths = []
    for name, rows in tables:
        paths.append(folder / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(f"file_name,text\n{rows}\n".encode(encoding))
    return train.read_captions(folder, paths)


def test_names_in_another_spelling(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD"))
    assert nfc != nfd
    for i, (there, told) in enumerate([
            ("a.mp4", "./a.mp4"), ("sub/a.mp4", "sub//a.mp4"), ("sub/a.mp4", "sub\\a.mp4"),
            ("sub/a.mp4", "./sub/../sub/a.mp4"), ("a.mp4", " a.mp4 "), (nfc, nfd), (nfd, nfc),
            ("a.mp4", "{folder}/a.mp4"), ("A b.mp4", "A b.mp4"), ("no suffix", "no suffix")]):
        folder = tmp_path / str(i)
        (folder / there).parent.mkdir(parents=True)
        write(folder / there, 20, format="mp4")
        (folder / "metadata.csv").write_text(
            f"file_name,text\n{told.replace('{folder}', str(folder))},a film\n")
        assert [row[:2] for row in folder_of(folder).videos] == [[there, "a film"]], told
    for there, told in (("a.mp4", "a.TXT"), (nfc, nfd.replace("mp4", "txt")),
                        ("b.c.mp4", "b.c.txt")):
        folder = tmp_path / told
        folder.mkdir()
        write(folder / there, 20, format="mp4")
        (folder / told).write_text("a film")
        assert [row[:2] for row in folder_of(folder).videos] == [[there, "a film"]], told


def test_a_table_in_a_subfolder(tmp_path, capfd):
    folder = make_folder(tmp_path / "über all", videos=2, frames=20)
    (folder / "sub dir/deep").mkdir(parents=True)
    (folder / "v1.mp4").rename(folder / "sub dir/deep/v1.mp4")
    (folder / "v1.txt").unlink()
    for table, name in (("metadata.csv", "sub dir/deep/v1.mp4"), ("sub dir/metadata.csv",
                        "deep/v1.mp4"), ("sub dir/deep/metadata.csv", "../deep/v1.mp4")):
        (folder / table).write_text(f"file_name,text\n{name},deeper\n")
        assert [row[:2] for row in folder_of(folder).videos] == [
            ["sub dir/deep/v1.mp4", "deeper"], ["v0.mp4", "grey number 0"]]
        (folder / table).unlink()
    # By its full name, in a folder that is reached by a link; and a video that is a link itself.
    (tmp_path / "link").symlink_to(folder)
    (folder / "v2.mp4").symlink_to(folder / "v0.mp4")
    (folder / "Metadata.CSV").write_text(
        f"file_name,text\n{folder / 'sub dir/deep/v1.mp4'},deeper\nv2.mp4,a link\n")
    for root in (folder, tmp_path / "link"):
        assert dict(row[:2] for row in folder_of(root).videos) == {
            "sub dir/deep/v1.mp4": "deeper", "v0.mp4": "grey number 0", "v2.mp4": "a link"}
    assert "no such file" not in capfd.readouterr().err


def test_a_second_caption_is_an_error(tmp_path):
    same = {"a.mp4": "x"}
    assert captions(tmp_path, ("metadata.csv", "a.mp4,x\n./a.mp4,x")) == same
    with pytest.raises(train.UserError, match="line 3: a second caption of a.mp4"):
        captions(tmp_path, ("metadata.csv", "a.mp4,x\n./a.mp4,y"))
    with pytest.raises(train.UserError, match="sub/metadata.csv: line 2: a second caption of a.mp"):
        captions(tmp_path, ("metadata.csv", "a.mp4,x"), ("sub/metadata.csv", "../a.mp4,y"))


def test_tables_as_people_write_them(tmp_path):
    read_rows = lambda rows, **how: captions(tmp_path, ("metadata.csv", rows), **how)
    assert read_rows("a.mp4,café", encoding="utf-8-sig") == {"a.mp4": "café"}
    assert read_rows('a.mp4,"a dog, a cat"\r\n\r\nb.mp4,"say ""hi"""\r') == {
        "a.mp4": "a dog, a cat", "b.mp4": 'say "hi"'}
    separators = "one\u2028two\x0bthree\x85four"                     # which end no line
    assert read_rows(f"a.mp4,{separators}") == {"a.mp4": separators}
    assert read_rows('a.mp4,"a dog\nruns"\nb.mp4,b') == {"a.mp4": "a dog\nruns", "b.mp4": "b"}
    for rows, line in (("a.mp4,a dog, a cat", "line 2: more columns than the first line"),
                       ('a.mp4,"a dog\nb.mp4,b', "is a quotation mark not closed"),
                       ('a.mp4,"' + 200_000 * "x", "is a quotation mark not closed"),
                       (",x", "line 2: no file_name")):
        with pytest.raises(train.UserError, match=line):
            read_rows(rows)
    for encoding in ("latin-1", "utf-16"):
        with pytest.raises(train.UserError, match="metadata.csv: not a text in UTF-8"):
            read_rows("a.mp4,café", encoding=encoding)
    for header in ("", "name,caption\na.mp4,x", "file_name;text\na.mp4;x"):
        (tmp_path / "metadata.csv").write_text(header)
        with pytest.raises(train.UserError, match="its first line must be file_name,text"):
            train.read_captions(tmp_path, [tmp_path / "metadata.csv"])
    (tmp_path / "metadata.csv").write_text("text,by,file_name\nx,me,a.mp4\nonly text\n")
    with pytest.raises(train.UserError, match="line 3: no file_name"):
        train.read_captions(tmp_path, [tmp_path / "metadata.csv"])


def test_a_caption_beside_its_video(tmp_path):
    make_folder(tmp_path / "v", videos=1, frames=20)
    for content, want in (("from the left".encode("utf-8-sig"), "from the left"),
                          (b"  one line \r\n", "one line"),
                          ("café\u2028x".encode(), "café\u2028x")):
        (tmp_path / "v/v0.txt").write_bytes(content)
        assert folder_of(tmp_path / "v").videos[0][1] == want
    (tmp_path / "v/metadata.csv").write_text("file_name,text\nv0.mp4,café\u2028x\n", "utf-8")
    assert folder_of(tmp_path / "v").videos[0][1] == "café\u2028x"         # the same in both


# ---- threads -------------------------------------------------------------------------------------


def test_reading_ahead_keeps_the_order():
    def slow(i):
        time.sleep(0.02 * (i % 3 == 0))
        return i * i

    for workers in (0, 1, 3, 20):
        assert list(train.read_ahead(slow, range(12), workers)) == [i * i for i in range(12)]
    begun = []
    ahead = train.read_ahead(begun.append, iter(range(1000)), 3)
    next(ahead)
    time.sleep(0.1)
    assert len(begun) <= 5                                          # not all thousand at once
    ahead.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_reader_raises_is_raised_where_it_is_read(workers):
    def fragile(i):
        if i == 3:
            raise train.UserError("number 3")
        return i

    seen = []
    with pytest.raises(train.UserError, match="number 3"):
        for i in train.read_ahead(fragile, range(9), workers):
            seen.append(i)
    assert seen == [0, 1, 2]


def test_no_reader_is_waited_for_that_nobody_needs():
    hang = threading.Event()
    ahead = train.read_ahead(lambda i: i and hang.wait(60), range(9), 2)
    assert next(ahead) == 0
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 5
    hang.set()


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_reader_that_hangs_does_not_keep_a_signal_away(training):
    """Elsewhere the first signal ends the process, while a model trains a second one does."""
    code = f"""if True:
        import signal, sys, time
        signal.pthread_sigmask(signal.SIG_BLOCK, {{2, 10, 15}})     # as at the top of train.py
        import train
        train.listen()
        if {training}:
            train.TRAINING.set()
        print("ready", flush=True)
        list(train.read_ahead(lambda i: time.sleep(600), range(4), 2))"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        if training:
            time.sleep(4)
            assert child.poll() is None
            child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=20)
    finally:
        child.kill()
    assert "ended by SIGTERM; start again to continue" in err and "Traceback" not in err


# ---- other people's files, and memory ------------------------------------------------------------


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no {CLIPS}: real clips are not in here")
def test_real_clips():
    clips = folder_of(CLIPS)
    assert len(clips.videos) == 8
    for i in range(0, 8 * train.CROPS, train.CROPS):
        x, text = read(clips, "train", i)
        assert x.shape == (3, 16, 32, 32) and x.std() > 0.05 and len(text) > 20
        assert not torch.equal(x, read(clips, "train", i + 1)[0])       # another crop


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no {CASES}: files of other programs")
def test_files_that_once_failed():
    for name, frames in (("trimmed.mp4", 50), ("b_frames.avi", 100),
                         ("browser_recording.webm", 100)):
        assert train.probe(CASES / name)[:2] == (frames, pytest.approx(25, rel=0.03))
        for start in (0, 10, frames - 16):                  # each frame is lighter than the last
            assert (window(CASES / name, start, 16).float().mean((1, 2, 3)).diff() > 0).all()
    path = CASES / "non_square_pixels.mp4"
    assert train.probe(path)[2] == pytest.approx(0.818, abs=0.001)
    x = window(path, 0, 1, size=288)[0].float()
    round_ = (x - x[0, 0]).abs().sum(2) > 60
    assert round_.any(0).sum().item() == pytest.approx(round_.any(1).sum().item(), rel=0.03)
    x = window(CASES / "alpha.webm", 0, 1)[0].float()
    assert x[..., 0].max() > 200 and x[2, 2].max() < 8


def test_frames_are_gone_when_a_window_is_read(tmp_path):
    """PyAV's frame.side_data ties a frame to itself: gigabytes wait for the garbage collector."""
    path = write(tmp_path / "v.mp4", 40)
    frames = lambda: sum(type(o).__name__ == "VideoFrame" for o in gc.get_objects())
    gc.collect()
    gc.disable()
    try:
        before = frames()
        train.probe(path)
        assert len(train.read_window(path, 3, 2, 16, 32, 25.0)) == 16
        assert frames() == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_videos_are_not_kept_in_memory(tmp_path):
    """200 videos of 1080p take no more memory than 8, with two threads that read ahead."""
    source = write(tmp_path / "v.mp4", 100, picture=lambda k: counter(k, 1080, 1920), gop=25,
                   preset="ultrafast")
    for n in (8, 200):
        (tmp_path / str(n)).mkdir()
        for v in range(n):
            os.link(source, tmp_path / f"{n}/v{v}.mp4")
            (tmp_path / f"{n}/v{v}.txt").write_text("numbers")
    code = ("import re, sys, train\n"
            "cfg = train.parse(['--data', sys.argv[1]])[0]\n"
            "clips = train.VideoFolder(cfg, train.find_videos(cfg))\n"
            "for _ in train.read_ahead(lambda i: clips.clip('train', i, (16, 256, 256)),\n"
            "                          range(0, 160, 4), 2): pass\n"
            # the largest memory so far; getrusage's would begin with that of this process
            "print(re.search('VmHWM:(.*) kB', open('/proc/self/status').read())[1])")
    few, many = (int(subprocess.run([sys.executable, "-c", code, str(tmp_path / n)], cwd=ROOT,
                                    check=True, capture_output=True, text=True).stdout)
                 for n in ("8", "200"))
    assert many < 1.1 * few, (few, many)
