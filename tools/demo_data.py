"""Demo data: procedural pedestrians in the folder layouts of SYSU-MM01, RegDB, LLCM, HITSZ-VCM and BUPTCampus.

The real data sets require a signed form; with this stand-in anyone can run everything, from folders of images to a
tested network. A person is a list of solids of revolution (limbs, garments, hair, bag) on a walking skeleton, painted
with patterns. Visible, infrared and thermal images show the SAME solids and patterns in tones drawn independently for
each spectrum: shape, cut and texture carry over between modalities, colour does not.

    python -m tools.demo_data --out ../data/demo --layout sysu --ids 100 --seed 0 --sheet people.png
    python -m tools.demo_data --out ../data/rehearsal --like .../rand_perm_cam.mat     (image counts of SYSU-MM01)

Lengths are in body heights, angles in radians, tones and noise in 0..1.
"""

import colorsys
import contextlib
import io
import json
import math
import operator
import os
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.io import savemat

import utils
from core.files import atomic, check_output, temporary_name, writing
from data_manager import BUPT_CAMERAS, DEMO_FILE, VCM_FEWEST, load_permutations, read_mat

SPECTRA = {  # layout -> camera -> spectrum
    "sysu": {1: "visible", 2: "visible", 3: "infrared", 4: "visible", 5: "visible", 6: "infrared"},
    "regdb": {1: "visible", 2: "thermal"},
    # LLCM's nine cameras take both, as do those of the walks: camera c at night is called 10 + c here
    "llcm": {camera: "visible" if camera < 10 else "infrared" for camera in (*range(1, 10), *range(11, 20))},
}
WALKS = ("vcm", "buptcampus")  # layouts of tracks
SPECTRA |= dict.fromkeys(WALKS, {camera: name for camera, name in SPECTRA["llcm"].items() if 1 <= camera % 10 <= 6})
SYSU_NAMES = "cam{}/{:04d}/{{:04d}}.jpg"  # of a camera and id; leaves a format string of the number
FEWEST_IDS = {"sysu": 6, "regdb": 4, "llcm": 6, "vcm": 6, "buptcampus": 6}
IMAGES = {"sysu": 8, "regdb": 10, "llcm": 5, "vcm": VCM_FEWEST, "buptcampus": 8}  # per person, camera and spectrum
HELD_OUT = {"val": 0.1, "test": 0.3}  # SYSU-MM01 holds out 0.2 and 0.2; few people need a larger share to learn from
TRIALS = 10  # of RegDB, and of SYSU-MM01's official protocol

TRAITS = {  # recognisable in every spectrum; values listed twice are drawn twice as often
    "build": (0.72, 0.95, 1.2, 1.5),
    "hair": ("bald", "short", "short", "bob", "long", "bun", "afro"),
    "hat": ("none", "none", "none", "cap", "beanie", "brim"),
    "scarf": (False, False, True),
    "top": ("plain", "raglan", "yoke", "hoops", "bars", "checks", "dots", "band", "block", "slant", "halves", "disc"),
    "hem": (0.26, 0.33, 0.33, 0.44, 0.58),  # below the shoulder
    "flare": (0.0, 0.0, 0.35),
    "sleeve": (0.0, 0.4, 0.7, 1.0, 1.0),  # share of the arm
    "bottom": ("plain", "hoops", "bars", "checks", "dots", "slant", "block", "side stripe"),
    "cut": ("slim", "straight", "wide", "shorts", "skirt", "long skirt"),
    "pitch": (0.07, 0.13),  # period of the patterns
    "shoes": ("shoes", "boots"),
    "bag": ("none", "backpack", "handbag", "tote", "satchel"),
}


class Person(NamedTuple):
    """An identity. `tones[spectrum][material]` is [2, channels]: the tone of the material and that of its pattern."""

    traits: dict
    hip: float  # height above the ground
    head: float  # height of the head
    tones: dict


class Shot(NamedTuple):
    """One moment of a person before a camera."""

    yaw: float  # 0 faces the camera, positive turns to the right of the image
    tilt: float  # of the camera, downwards
    phase: float  # of the stride
    stride: float  # swing of the legs
    elbows: tuple  # bend of each arm
    x: float  # pixel column of the body's axis
    y: float  # pixel row of the ground
    scale: float  # pixels per body height
    light: float  # direction: 0 from the camera, positive from the right


class Part(NamedTuple):
    """A solid of revolution about the segment `start` - `end` (x to the left of the person, y up, z forward)."""

    start: np.ndarray
    end: np.ndarray
    profile: np.ndarray  # [stations, 4]: fraction of the segment, offset along it, half width (x), half depth (z)
    material: str
    pattern: str = "plain"
    along: float = 0.0  # length of the garment above `start`: patterns continue from part to part
    lift: float = 0.0  # moves the part towards the camera in the order of painting


class Camera(NamedTuple):
    """What all images of one camera share."""

    spectrum: str
    scene: Image.Image  # a panorama; every image shows a window of it
    cast: np.ndarray  # gain of each channel
    noise: float  # standard deviation
    blur: float  # radius, in thousandths of the image's height


# ---------------------------------------------------------------------------------------------------------- identities


def level_apart(rng: np.random.Generator, other: float, gap: float) -> float:
    """A random brightness that differs from `other` by at least `gap`."""
    while True:
        level = rng.uniform(0.06, 0.94)
        if abs(level - other) >= gap:
            return level


def colour(rng: np.random.Generator, luminance: float) -> np.ndarray:
    """A random hue of the given luminance, [3]."""
    rgb = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.75), 1.0))
    rgb *= luminance / (rgb @ (0.299, 0.587, 0.114))
    fade = min(1.0, (1 - luminance) / max(rgb.max() - luminance, 1e-6))  # towards gray if the hue would overflow
    return luminance + (rgb - luminance) * fade


def draw_tones(rng: np.random.Generator, spectrum: str) -> dict:
    """Tones of all materials in one spectrum. Adjacent garments differ, and so do the two tones of a pattern."""
    top = rng.uniform(0.06, 0.94)
    bottom = level_apart(rng, top, 0.3)
    own = {"top": top, "bottom": bottom, "shoes": level_apart(rng, bottom, 0.2), "bag": level_apart(rng, top, 0.3)}
    own["hat"] = level_apart(rng, top, 0.15)
    levels = {name: np.array([[level], [level_apart(rng, level, 0.42)]]) for name, level in own.items()}
    skin, hair = rng.uniform(0.3, 0.8), rng.uniform(0.05, 0.6)
    if spectrum == "visible":
        tones = {name: np.array([colour(rng, float(level)) for level in pair[:, 0]]) for name, pair in levels.items()}
        skin, hair = skin * np.array((1.2, 0.95, 0.8)), hair * np.array((1.2, 0.95, 0.75))
    elif spectrum == "infrared":
        tones = levels
        skin = 0.55 + 0.25 * skin
    else:  # thermal: cloth insulates by its thickness, prints show weakly, bags are as cold as the street
        tones = {name: 0.3 + 0.45 * np.array([a, a + 0.55 * (b - a)]) for name, (a, b) in levels.items()}
        tones["bag"] = np.array([[0.2], [0.3]])
        skin, hair = 0.97, 0.6
    tones["hair"] = np.array([hair, hair]).reshape(2, -1)
    tones["skin"] = np.array([skin, hair]).reshape(2, -1)  # the pattern of a head is its hair, eyes and mouth
    return {name: pair.astype(np.float32) for name, pair in tones.items()}


def draw_people(identities: list, seed: int) -> dict:
    """identity -> Person. Each is the candidate that is least similar to all people before it."""
    people, earlier = {}, []
    for identity in identities:
        rng = np.random.default_rng((seed, 1, identity))
        candidates = [tuple(values[rng.integers(len(values))] for values in TRAITS.values()) for _ in range(24)]

        def likeness(candidate: tuple) -> int:
            return max((sum(map(operator.eq, candidate, other)) for other in earlier), default=0)

        earlier.append(min(candidates, key=likeness))
        people[identity] = Person(
            traits=dict(zip(TRAITS, earlier[-1], strict=True)),
            hip=rng.uniform(0.47, 0.54),
            head=rng.uniform(0.125, 0.15),
            tones={spectrum: draw_tones(rng, spectrum) for spectrum in ("visible", "infrared", "thermal")},
        )
    return people


# -------------------------------------------------------------------------------------------------------------- bodies


def ball(centre: tuple, width: float, height: float, depth: float, material: str, **more) -> Part:
    """An ellipsoid of the given half axes."""
    turn = np.linspace(0, np.pi, 9)
    profile = np.stack([0 * turn, -height * np.cos(turn), width * np.sin(turn), depth * np.sin(turn)], axis=1)
    return Part(np.array(centre), np.array(centre), profile, material, **more)


def limb(start: tuple, end: tuple, first: float, last: float, material: str, hemmed: bool = False, **more) -> Part:
    """A tapered capsule with radii `first` and `last`; `hemmed` cuts its end off flat."""
    turn = np.linspace(0, np.pi / 2, 4)
    tail = turn[: 1 if hemmed else 4]
    radius = np.append(first * np.sin(turn), last * np.cos(tail))
    offset = np.append(-first * np.cos(turn), last * np.sin(tail))
    profile = np.stack([np.append(0 * turn, 0 * tail + 1), offset, radius, radius], axis=1)
    return Part(np.array(start), np.array(end), profile, material, **more)


def tube(start: tuple, end: tuple, stations: list, material: str, size: float = 1.0, **more) -> Part:
    """A solid with flat ends; stations are (fraction, half width, half depth), the half axes in units of `size`."""
    fraction, width, depth = np.array(stations).T
    profile = np.stack([fraction, 0 * fraction, size * width, size * depth], axis=1)
    return Part(np.array(start), np.array(end), profile, material, **more)


def swing(joint: np.ndarray, length: float, angle: float, out: float = 0.0) -> np.ndarray:
    """The far end of a bone that hangs from `joint`, turned forwards by `angle` and sideways by `out`."""
    down, forward = math.cos(angle) * math.cos(out), math.sin(angle) * math.cos(out)
    return joint + length * np.array([math.sin(out), -down, forward])


def lower_body(person: Person, shot: Shot) -> Iterator[Part]:
    """Legs, bare or in trousers, shoes, and the hips or skirt."""
    traits, girth = person.traits, person.traits["build"] ** 0.5
    cut = traits["cut"]
    thigh, shin, thin = 0.05 * girth, 0.036 * girth, 0.024 * girth
    bone = (person.hip - 0.035) / 2
    under = -0.25  # legs are painted before clothes that cover them
    cloth = partial(limb, material="bottom", pattern=traits["bottom"])
    for side in (-1, 1):
        angle = side * shot.stride * math.sin(shot.phase)
        bend = 0.05 + 1.4 * shot.stride * max(0.0, math.sin(side * shot.phase + 2.2))
        hip = np.array([side * 0.045 * girth, person.hip, 0.0])
        knee = swing(hip, bone, angle)
        ankle = swing(knee, bone, angle - bend)
        if cut in ("slim", "straight", "wide"):
            knee_ease, hem_ease = {"slim": (1.1, 1.2), "straight": (1.35, 1.8), "wide": (1.6, 2.9)}[cut]
            yield cloth(hip, knee, thigh * 1.05, shin * knee_ease, along=0.05, lift=under)
            yield cloth(knee, ankle, shin * knee_ease, thin * hem_ease, hemmed=True, along=0.05 + bone, lift=under)
        else:
            yield limb(hip, knee, thigh, shin, "skin", lift=under)
            yield limb(knee, ankle, shin, thin, "skin", lift=under)
        if cut == "shorts":
            end = hip + 0.85 * (knee - hip)
            yield cloth(hip, end, thigh * 1.1, thigh * 1.35, hemmed=True, along=0.05, lift=under + 0.01)
        if traits["shoes"] == "boots":
            yield limb(knee + 0.4 * (ankle - knee), ankle, shin * 1.2, thin * 1.5, "shoes", lift=under + 0.02)
        toe = ankle + 0.075 * np.array([0.15 * side, -0.15 - 0.4 * math.sin(max(0.0, bend - angle)), 1.0])
        yield limb(ankle - (0, 0.008, 0.01), toe, 0.027, 0.02, "shoes", lift=under + 0.02)

    length, flare = {"skirt": (0.26, 0.125), "long skirt": (0.46, 0.135)}.get(cut, (0.14, 0.09))
    stations = [(0, 0.08, 0.06), (0.4, 0.097, 0.072), (1, flare, 0.85 * flare)]
    waist = person.hip + 0.11
    yield tube((0, waist, 0), (0, waist - length, 0), stations, "bottom", size=girth, pattern=traits["bottom"])


def upper_body(person: Person, shot: Shot) -> Iterator[Part]:
    """Neck and scarf, the top garment, arms with their sleeves, and the bag."""
    traits, build, pattern = person.traits, person.traits["build"], person.traits["top"]
    shoulder, reach, belly = 0.975 - person.head, 0.105 * build**0.4, build**0.8
    yield limb((0, shoulder + 0.04, 0), (0, shoulder - 0.01, 0), 0.026, 0.032, "skin", lift=0.05)
    if traits["scarf"]:
        yield ball((0, shoulder + 0.008, 0), 0.056, 0.03, 0.056, "hat", lift=0.17)
        ends = (0.025, shoulder, 0.07 * belly), (0.035, shoulder - 0.19, 0.075 * belly)
        yield limb(*ends, 0.02, 0.028, "hat", hemmed=True, pattern="hoops", lift=0.15)

    hem, wide = traits["hem"], 1 + traits["flare"] * (traits["hem"] - 0.2)
    drop = np.array([-0.012, 0.0, 0.028, 0.13, 0.25, 0.36, 0.6])  # neck, collar, shoulder, chest, waist, hip, knee
    half_width = (0.03, 0.045, reach, reach * 0.93, 0.078 * belly, 0.1 * belly * wide, 0.106 * belly * wide**2)
    half_depth = belly * np.array((0.03, 0.04, 0.05, 0.062, 0.062, 0.074 * wide, 0.082 * wide**2))
    at = np.append(drop[drop < hem], hem)
    stations = np.stack([at / hem, np.interp(at, drop, half_width), np.interp(at, drop, half_depth)], axis=1)
    yield tube((0, shoulder, 0), (0, shoulder - hem, 0), stations, "top", pattern=pattern, lift=0.12)

    sleeve = {"raglan": "solid", "disc": "plain", "halves": "plain"}.get(pattern, pattern)
    cloth = partial(limb, material="top", pattern=sleeve, lift=0.14)
    upper, lower = min(1.0, 2 * traits["sleeve"]), max(0.0, 2 * traits["sleeve"] - 1)
    thick = 0.03 * build**0.5
    for side, bend in zip((-1, 1), shot.elbows, strict=True):
        joint = np.array([side * (reach - 0.012), shoulder - 0.035, 0.0])
        angle = -side * 0.9 * shot.stride * math.sin(shot.phase)
        elbow = swing(joint, 0.165, angle, side * (0.12 + 0.1 * build))
        wrist = swing(elbow, 0.15, angle + bend, side * 0.05)
        yield limb(joint, elbow, thick, thick * 0.85, "skin", lift=0.13)
        yield limb(elbow, wrist, thick * 0.85, thick * 0.6, "skin", lift=0.13)
        yield ball(swing(wrist, 0.02, angle + bend), 0.02, 0.027, 0.02, "skin", lift=0.13)
        if upper:
            yield cloth(joint, joint + upper * (elbow - joint), thick * 1.25, thick * 1.2, hemmed=not lower)
        if lower:
            end = elbow + lower * (wrist - elbow)
            yield cloth(elbow, end, thick * 1.2, thick * 1.05, hemmed=True, along=0.165)
    yield from bag(traits["bag"], shoulder, reach, belly, wrist)


def bag(kind: str, shoulder: float, reach: float, belly: float, hand: np.ndarray) -> Iterator[Part]:
    """A bag on the back, in the left hand, or on a strap over the near or the far shoulder."""
    if kind == "tote":
        stations = [(0, 0.005, 0.03), (0.35, 0.012, 0.05), (0.36, 0.02, 0.085), (1, 0.025, 0.095)]
        yield tube(hand, hand - (0, 0.19, 0), stations, "bag", lift=0.15)
    elif kind == "backpack":
        back = -0.062 * belly - 0.045
        stations = [(0, 0.03, 0.02), (0.1, 0.08, 0.05), (0.6, 0.088, 0.062), (0.97, 0.085, 0.06), (1, 0.06, 0.04)]
        yield tube((0, shoulder, back), (0, shoulder - 0.27, back), stations, "bag", pattern="pocket", lift=0.13)
        for side in (-0.6 * reach, 0.6 * reach):
            ends = (side, shoulder - 0.01, 0.02), (1.1 * side, shoulder - 0.17, 0.062 * belly + 0.01)
            yield limb(*ends, 0.013, 0.013, "bag", lift=0.14)
    elif kind in ("handbag", "satchel"):
        side, strap = (reach + 0.035) * max(1.0, belly**0.5), {"handbag": 0.8, "satchel": -0.5}[kind] * reach
        for face in (-0.035, 0.035):
            yield limb((strap, shoulder, face), (side, shoulder - 0.29, face), 0.009, 0.009, "bag", lift=0.14)
        stations = [(0, 0.025, 0.06), (0.5, 0.03, 0.08), (1, 0.028, 0.075)]
        yield tube((side, shoulder - 0.28, 0), (side, shoulder - 0.4, 0), stations, "bag", pattern="pocket", lift=0.16)


def head(person: Person) -> Iterator[Part]:
    """Head, hair and hat."""
    hair, hat, half = person.traits["hair"], person.traits["hat"], person.head / 2
    eyes = 1 - half
    face = "face" if hair == "bald" else "face and hair"
    yield ball((0, eyes, 0.005), half * 0.74, half, half * 0.8, "skin", pattern=face, lift=0.16)
    if hair in ("bob", "long"):
        end = (0, eyes - half * {"bob": 0.9, "long": 2.3}[hair], -half * 0.55)
        stations = [(0, 0.3, 0.3), (0.12, 0.75, 0.5), (0.4, 0.98, 0.62), (1, 0.9, 0.5)]
        yield tube((0, 1, -half * 0.3), end, stations, "hair", size=half, lift=0.145)
    elif hair == "bun" and hat == "none":
        bun = half * 0.45
        yield ball((0, eyes + half * 0.95, -half * 0.55), bun, bun, bun, "hair", lift=0.16)
    elif hair == "afro":
        yield ball((0, eyes + half * 0.35, -half * 0.25), half * 1.3, half * 1.2, half * 1.25, "hair", lift=0.13)

    puff = 1.4 if hair == "afro" else 1.0  # a hat covers the hair
    brow, crown = eyes + half * 0.3, eyes + half * 1.15 * puff
    if hat != "none":
        dome = [(0, 0.1, 0.1), (0.12, 0.5, 0.55), (0.4, 0.78, 0.84), (1, 0.84, 0.9)]
        yield tube((0, crown, 0), (0, brow, 0), dome, "hat", size=half * puff, lift=0.18)
    if hat == "cap":
        yield ball((0, brow, half * puff), half * 0.75, half * 0.13, half * 0.7, "hat", lift=0.19)
    elif hat == "brim":
        yield ball((0, brow, 0), half * 1.6 * puff, half * 0.18, half * 1.6 * puff, "hat", lift=0.19)
    elif hat == "beanie":
        pompom = half * 0.35
        yield ball((0, crown + half * 0.15, 0), pompom, pompom, pompom, "hat", pattern="solid", lift=0.19)


# -------------------------------------------------------------------------------------------------------------- images


def face(along: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Eyes and a mouth in front, a function of PATTERNS."""
    eyes = 0.3 - np.hypot((np.abs(turn) - 0.42) / 0.4, (along + 0.005) / 0.018)
    mouth = 0.3 - np.hypot(turn / 0.8, (along - 0.033) / 0.013)
    return np.where(np.abs(turn) < 1.5, 2 * np.maximum(eyes, mouth), -1)


# pattern -> function of `along` (body heights from the garment's top), `turn` about the body (0 in front) and `wave`
# (radians of the pattern's period along the garment); positive where the second tone shows. Others, such as "plain" and
# "raglan" (whose sleeves are solid), have one tone
PATTERNS = {
    "solid": lambda along, turn, wave: 1 + 0 * turn,
    "yoke": lambda along, turn, wave: 12 * (0.09 - along),
    "hoops": lambda along, turn, wave: np.sin(wave),
    "bars": lambda along, turn, wave: np.sin(5 * turn),
    "checks": lambda along, turn, wave: 2 * np.sin(wave) * np.sin(4 * turn),
    "dots": lambda along, turn, wave: np.sin(wave) * np.sin(4 * turn) - 0.3,
    "band": lambda along, turn, wave: 12 * (0.045 - np.abs(along - 0.13)),
    "block": lambda along, turn, wave: 12 * (along - 0.17),
    "slant": lambda along, turn, wave: np.sin(wave / 1.5 + 2 * turn),
    "halves": lambda along, turn, wave: 3 * np.sin(turn),
    "disc": lambda along, turn, wave: 0.7 - np.hypot(np.sin(turn), (along - 0.14) / 0.08),  # on chest and back
    "side stripe": lambda along, turn, wave: np.abs(np.sin(turn)) - 0.85,
    "pocket": lambda along, turn, wave: 12 * (along - 0.13),
    "face": lambda along, turn, wave: face(along, turn),
    "face and hair": lambda along, turn, wave: np.maximum(
        face(along, turn), np.maximum(-10 * (along + 0.034), 0.35 - np.cos(turn))
    ),
}


def project(points: np.ndarray, shot: Shot) -> np.ndarray:
    """Body coordinates [N, 3] to pixels (column, row) and nearness (body heights): [N, 3]."""
    x, y, z = points.T
    right = x * math.cos(shot.yaw) + z * math.sin(shot.yaw)
    near = z * math.cos(shot.yaw) - x * math.sin(shot.yaw)
    up = y * math.cos(shot.tilt) - near * math.sin(shot.tilt)
    return np.stack([shot.x + shot.scale * right, shot.y - shot.scale * up, near], axis=1)


def paint(canvas: np.ndarray, part: Part, ends: np.ndarray, tones: np.ndarray, pitch: float, shot: Shot) -> None:
    """Draw one part, of two tones [2, C], onto the canvas [H, W, C]. ends: of its segment, in pixels, [2, 2]."""
    start, end = ends
    length = math.hypot(*(end - start))
    down = (end - start) / length if length > 0.5 else np.array([0.0, 1.0])  # seen from its end, or a ball
    fraction, offset, width, depth = part.profile.T
    stations = fraction * length + offset * shot.scale
    halves = shot.scale * np.hypot(width * math.cos(shot.yaw), depth * math.sin(shot.yaw))

    tips = start + stations[[0, -1], None] * down
    reach = halves.max() + 1
    left, top = np.maximum(tips.min(axis=0) - reach, 0).astype(int)
    right, bottom = np.maximum(tips.max(axis=0) + reach + 1, 0).astype(int)
    window = canvas[top:bottom, left:right]

    # each pixel of the window: pixels along and across the axis, -1..1 across the solid, angle about the axis
    rows, columns = (np.arange(size, dtype=np.float32) for size in window.shape[:2])
    x, y = columns[None] + np.float32(left - start[0]), rows[:, None] + np.float32(top - start[1])
    along = x * np.float32(down[0]) + y * np.float32(down[1])
    across = x * np.float32(down[1]) - y * np.float32(down[0])
    half = np.interp(along, stations, halves, left=0, right=0).astype(np.float32)
    cover = np.clip(half - np.abs(across) + 0.5, 0, 1) * (half > 0)
    bulge = np.clip(across / np.maximum(half, 0.5), -1, 1)
    tone = tones[0]
    if pattern := PATTERNS.get(part.pattern):
        turn = np.arcsin(bulge) - shot.yaw
        turn -= 2 * math.pi * np.round(turn / (2 * math.pi))
        along = along / shot.scale + part.along
        weight = np.clip(4 * pattern(along, turn, 2 * math.pi / pitch * along) + 0.5, 0, 1)
        tone = tone + weight[..., None] * (tones[1] - tone)
    lit = np.sqrt(1 - bulge * bulge) * math.cos(shot.light) + bulge * math.sin(shot.light)
    painted = tone * (0.62 + 0.38 * np.maximum(lit, 0))[..., None]
    window += cover[..., None] * (painted - window)


def draw_shot(rng: np.random.Generator, width: int, height: int) -> Shot:
    """A random moment: from all sides, mostly front and back; mostly walking; some hold a hand to the ear."""
    facing = rng.choice((0.0, math.pi, math.pi / 2, -math.pi / 2), p=(0.35, 0.3, 0.175, 0.175))
    scale = rng.uniform(0.72, 1.0)
    return Shot(
        yaw=float(facing) + rng.normal(0, 0.3),
        tilt=rng.uniform(0, 0.3),
        phase=rng.uniform(0, 2 * math.pi),
        stride=rng.uniform(0.3, 0.6) if rng.uniform() < 0.8 else 0.08,
        elbows=tuple(rng.uniform(0.1, 0.7) if rng.uniform() < 0.88 else 1.9 for _ in range(2)),
        x=width * rng.uniform(0.36, 0.64),
        y=height * (rng.uniform(0.92, 1.02) + 0.3 * (scale - 0.85)),
        scale=height * scale,
        light=rng.uniform(-0.9, 0.9),
    )


def draw_person(canvas: np.ndarray, person: Person, spectrum: str, shot: Shot) -> None:
    """Paint a person onto the canvas [H, W, C], far parts first."""
    parts = [*lower_body(person, shot), *upper_body(person, shot), *head(person)]
    nearness = project(np.array([(part.start + part.end) / 2 for part in parts]), shot)[:, 2]
    ends = project(np.array([point for part in parts for point in (part.start, part.end)]), shot)
    ends = ends[:, :2].reshape(-1, 2, 2)
    for index in np.argsort(nearness + [part.lift for part in parts], kind="stable"):
        part = parts[index]
        paint(canvas, part, ends[index], person.tones[spectrum][part.material], person.traits["pitch"], shot)


def draw_scene(rng: np.random.Generator, outdoor: bool) -> Image.Image:
    """A panorama of 720 x 240: a corridor with doors and pillars, or a street with houses and trees."""
    scene, floor = Image.new("RGB", (720, 240)), int(rng.integers(125, 165))
    pen = ImageDraw.Draw(scene)
    wall, ground = rng.uniform(0.3, 0.75, 2)

    def tone(level: float) -> tuple:
        return tuple(np.clip(255 * level * rng.uniform(0.85, 1.15, 3), 0, 255).astype(int).tolist())

    def box(x: float, y: float, width: float, height: float, level: float) -> None:
        pen.rectangle((x, y, x + width, y + height), fill=tone(level), outline=tone(level * 0.7))

    box(-1, -1, 722, 242, wall + 0.15 if outdoor else wall)
    for x in range(-40, 720, 120 if outdoor else 80):
        level = np.clip(wall + rng.normal(0, 0.2), 0.1, 0.9)
        if outdoor:  # a house, then a tree
            left, top = x + rng.uniform(0, 40), rng.uniform(-40, 60)
            box(left, top, rng.uniform(80, 140), 240, level)
            for window in range(12):
                box(left + 10 + window % 3 * 28, top + 12 + window // 3 * 34, 14, 20, level * 0.65)
            stem = x + rng.uniform(0, 120)
            box(stem, 60, 6, 180, wall * 0.6)
            for dx, dy in rng.normal(0, 18, (12, 2)):
                pen.ellipse((stem + dx - 16, 36 + dy, stem + dx + 16, 64 + dy), fill=tone(wall * rng.uniform(0.6, 0.9)))
        elif rng.uniform() < 0.5:  # a door
            box(x + 10, floor - 115, 48, 115, level)
            box(x + 18, floor - 105, 14, 40, level * 1.2)
        else:  # a pillar and a poster
            box(x + 50, -5, 26, 250, level)
            box(x + rng.uniform(0, 10), rng.uniform(10, 50), 34, 44, 1 - level)

    box(-1, floor, 722, 240, ground)
    joint = tone(ground * 0.85)
    for x in range(-1500, 2300, 90):  # paving, in perspective
        pen.line((360 + (x - 360) // 4, floor, x, 240), fill=joint)
    for depth in (0.06, 0.2, 0.45, 0.85):
        pen.line((0, floor + depth * (240 - floor), 720, floor + depth * (240 - floor)), fill=joint)
    return scene.filter(ImageFilter.GaussianBlur(1.5))


@cache
def make_camera(layout: str, camera: int, seed: int) -> Camera:
    """The camera's background, colour cast, noise and blur."""
    place, spectrum = camera % 10, SPECTRA[layout][camera]
    rng = np.random.default_rng((seed, 2, place))
    scene = draw_scene(rng, outdoor=place > 3)
    if spectrum == "thermal":  # walls are uniformly cold
        scene = scene.filter(ImageFilter.GaussianBlur(3)).point(lambda value: value * 0.35)
    if spectrum != "visible":
        scene = scene.convert("L")
    cast = rng.uniform(0.8, 1.05) * np.exp(rng.normal(0, 0.07, len(scene.getbands())))
    return Camera(spectrum, scene, cast.astype(np.float32), noise=rng.uniform(0.01, 0.025), blur=rng.uniform(1, 3))


def occlude(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a pole or a low wall in front of the person."""
    height, width, channels = canvas.shape
    tone = rng.uniform(0.1, 0.8) * rng.uniform(0.8, 1.2, channels)
    if rng.uniform() < 0.5:
        pole = canvas[:, int(rng.uniform(0, 0.9) * width) :][:, : int(rng.uniform(0.05, 0.12) * width)]
        pole[:] = tone * np.linspace(1.1, 0.6, pole.shape[1])[:, None]
    else:
        block = canvas[int(rng.uniform(0.7, 0.9) * height) :, int(rng.uniform(0, 0.4) * width) :]
        block[:] = tone * np.linspace(1.1, 0.8, len(block))[:, None, None]


def render(person: Person, camera: Camera, size: tuple, rng: np.random.Generator, step: int = 0) -> Image.Image:
    """One RGB image of `size` (width, height): scene, person, sometimes an obstacle, then light, blur and noise. With
    the same `rng`, those of different steps are frames of a walk."""
    width, height = size
    scene, span = camera.scene, rng.uniform(0.63, 0.99) * camera.scene.height
    left = rng.uniform(0, scene.width - span * width / height)
    box = (left, scene.height - span, left + span * width / height, scene.height)
    canvas = np.asarray(scene.resize(size, Image.Resampling.BILINEAR, box), np.float32).reshape(height, width, -1) / 255

    shot = draw_shot(rng, width, height)
    shot = shot._replace(phase=shot.phase + 0.5 * step)
    if camera.spectrum != "thermal":  # a shadow
        y, x = np.ogrid[:height, :width]
        away = ((x - shot.x) / (0.14 * shot.scale)) ** 2 + ((y - shot.y) / (0.03 * shot.scale)) ** 2
        canvas *= (1 - 0.5 * np.exp(-away)).astype(np.float32)[..., None]
    draw_person(canvas, person, camera.spectrum, shot)
    if rng.uniform() < 0.12:
        occlude(canvas, rng)

    ramp = 1 + np.linspace(-1, 1, width, dtype=np.float32)[:, None] * rng.uniform(-0.4, 0.4)
    canvas *= ramp * camera.cast * math.exp(rng.normal(0, 0.12))
    image = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8).squeeze())
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(height / 1000 * camera.blur * rng.uniform(0.3, 1.3))))
    if step:  # each frame of a walk has noise of its own
        rng.bit_generator.advance(step << 32)
    noise = 255 * camera.noise * rng.standard_normal(image.shape, np.float32)
    return Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)).convert("RGB")


# ------------------------------------------------------------------------------------------------------------- layouts


class Folder(NamedTuple):
    """The images of one person by one camera, numbered from 1."""

    names: str  # format string of the number, relative to the tree
    identity: int
    camera: int
    images: int


def plan_sysu(ids: int, images: int, rng: np.random.Generator, test_ids: int | None = None) -> tuple:
    """The folders, and file -> bytes of the lists. As in SYSU-MM01, ids have gaps and cameras miss people."""
    identities = 1 + rng.permutation(max(533, ids + ids // 12))[:ids]
    everywhere, indoors, outdoors = (1, 2, 3, 4, 5, 6), (1, 2, 3), (4, 5, 6)
    folders = []
    for index, identity in enumerate(identities.tolist()):
        all_but_one = np.delete(everywhere, rng.integers(6)).tolist()
        for camera in (everywhere, indoors, everywhere, outdoors, everywhere, all_but_one)[index % 6]:
            count = int(rng.integers(math.ceil(0.75 * images), math.floor(1.25 * images) + 1))
            folders.append(Folder(SYSU_NAMES.format(camera, identity), identity, camera, count))

    val, test = (max(2, round(share * ids)) for share in HELD_OUT.values())
    test = test_ids or test
    parts = np.split(identities, [ids - val - test, ids - test])
    files = sysu_id_files(dict(zip(("train", *HELD_OUT), parts, strict=True)))
    return folders, {**files, "exp/rand_perm_cam.mat": draw_permutations(folders, rng)}


def plan_like(path: Path) -> tuple:
    """The folders and lists of SYSU-MM01 itself, from its `rand_perm_cam.mat`: every person-camera count.

    `train_id.mat` and `test_id.mat` must be in the same folder, as published. Val ids are all others with images of
    both modalities. (The real file also counts 22 people with images of one modality: they are in no list.)
    """
    counts = {key: rows.shape[1] for key, rows in load_permutations(path).items()}
    parts, seen_as = {}, {"visible": set(), "infrared": set()}
    for camera, identity in counts:
        seen_as[SPECTRA["sysu"][camera]].add(identity)
    for part in ("train", "test"):
        file = path.with_name(f"{part}_id.mat")
        try:
            ids = read_mat(file, "id").ravel().tolist()
            if not all(0 < value < 10**9 and value == int(value) for value in ids):
                raise ValueError("not whole numbers")
            parts[part] = sorted(map(int, ids))
        except Exception as error:  # scipy's reader raises anything when a file is damaged
            raise utils.InputError(
                f"{file}: cannot be read as a list of ids; copy it from the publication of {path.name}"
            ) from error
    parts["val"] = sorted((seen_as["visible"] & seen_as["infrared"]).difference(*parts.values()))
    folders = [
        Folder(SYSU_NAMES.format(camera, identity), identity, camera, count)
        for (camera, identity), count in counts.items()
    ]
    return folders, {**sysu_id_files(parts), "exp/rand_perm_cam.mat": path.read_bytes()}


def sysu_id_files(parts: dict) -> dict:
    """{"train" | "val" | "test": ids} -> file -> bytes."""
    return {f"exp/{part}_id.txt": (",".join(map(str, ids)) + "\n").encode() for part, ids in parts.items()}


def draw_permutations(folders: list, rng: np.random.Generator) -> bytes:
    """The draws of the official protocol for these folders, in the format of SYSU-MM01's rand_perm_cam.mat."""
    people = max(folder.identity for folder in folders)
    cells = np.empty((len(SPECTRA["sysu"]), 1), object)
    for camera in range(len(cells)):
        cells[camera, 0] = np.empty((people, 1), object)
        cells[camera, 0][:, 0] = [np.empty((TRIALS, 0), np.uint8)] * people
    for folder in folders:
        order = rng.permuted(np.tile(np.arange(1, folder.images + 1), (TRIALS, 1)), axis=1)
        cells[folder.camera - 1, 0][folder.identity - 1, 0] = order.astype(np.min_scalar_type(folder.images))
    file = io.BytesIO()
    savemat(file, {"rand_perm_cam": cells})
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]  # without the date


def plan_regdb(ids: int, images: int, rng: np.random.Generator) -> tuple:
    """The folders, and file -> bytes of the lists: in each trial, a random half of the people is for training."""
    names = {"visible": "Visible/{}/v_{{:04d}}.bmp", "thermal": "Thermal/{}/t_{{:04d}}.bmp"}
    folders = [
        Folder(names[spectrum].format(identity), identity, camera, images)
        for camera, spectrum in SPECTRA["regdb"].items()
        for identity in range(1, ids + 1)
    ]
    lists = {}
    for trial in range(1, TRIALS + 1):
        halves = np.split(1 + rng.permutation(ids), [ids // 2])
        for part, half in zip(("train", "test"), halves, strict=True):
            for spectrum, name in names.items():
                lines = (
                    f"{name.format(identity).format(number)} {label}"
                    for label, identity in enumerate(np.sort(half))
                    for number in range(1, images + 1)
                )
                lists[f"idx/{part}_{spectrum}_{trial}.txt"] = ("\n".join(lines) + "\n").encode()
    return folders, lists


def plan_llcm(ids: int, images: int, rng: np.random.Generator) -> tuple:
    """The folders, and file -> bytes of the lists: a third of the people are test ids; a few cameras see each."""
    identities = 1 + rng.permutation(ids)
    test = np.sort(identities[: round(ids / 3)])
    train = np.sort(identities[round(ids / 3) :])
    folders, lines = [], {"vis": [], "nir": []}
    for part, people in (("train", train), ("test", test)):
        for label, identity in enumerate(people.tolist()):
            for place in np.sort(rng.choice(np.arange(1, 10), rng.integers(3, 6), replace=False)).tolist():
                for camera, kind in ((place, "vis"), (10 + place, "nir")):
                    names = f"{part}_{kind}/cam{place}/{identity:04d}/{{:04d}}.jpg"
                    count = int(rng.integers(math.ceil(0.6 * images), math.floor(1.4 * images) + 1))
                    folders.append(Folder(names, identity, camera, count))
                    if part == "train":
                        lines[kind] += [f"{names.format(number)} {label}\n" for number in range(1, count + 1)]
    lists = {f"idx/train_{kind}.txt": "".join(text).encode() for kind, text in lines.items()}
    return folders, {**lists, "idx/test_id.txt": (",".join(map(str, test)) + "\n").encode()}


def draw_walks(ids: int, rng: np.random.Generator) -> Iterator[tuple]:
    """(part, identity, place, camera) of tracks: a third of the people are for the test; three cameras see each."""
    for number, identity in enumerate((1 + rng.permutation(ids)).tolist()):
        for place in np.sort(rng.choice(np.arange(1, 7), 3, replace=False)).tolist():
            for camera in (place, 10 + place):
                yield "test" if number < round(ids / 3) else "train", identity, place, camera


def plan_vcm(ids: int, images: int, rng: np.random.Generator) -> tuple:
    """The folders, and file -> bytes of the lists."""
    folders, names, rows, queries = [], {"train": [], "test": []}, {"train": [], "test": []}, []
    for part, identity, place, camera in draw_walks(ids, rng):
        modality, kind = (2, "rgb") if camera < 10 else (1, "ir")
        folders.append(Folder(f"{part.capitalize()}/{identity:04d}/{kind}/D{place}/{{}}.jpg", identity, camera, images))
        first = len(names[part]) + 1
        names[part] += [f"{identity:04d}M{modality}D{place}T1F{number}.jpg" for number in range(1, images + 1)]
        rows[part].append(f"{modality} {first} {len(names[part])} {identity:04d} {place}")
        queries += [str(len(rows["test"]))] if part == "test" and modality == 1 else []
    lists = {f"{part}_name": lines for part, lines in names.items()}
    lists |= {f"track_{part}_info": lines for part, lines in rows.items()} | {"query_IDX": [" ".join(queries)]}
    return folders, {f"info/{name}.txt": ("\n".join(lines) + "\n").encode() for name, lines in lists.items()}


def plan_buptcampus(ids: int, images: int, rng: np.random.Generator) -> tuple:
    """The folders, and file -> bytes of the lists. A test person's first track, visible or infrared, is a query."""
    folders, paths, lines = [], {}, {"train": [], "query": [], "gallery": []}
    for part, identity, place, camera in draw_walks(ids, rng):
        kind, name = "RGB" if camera < 10 else "IR", BUPT_CAMERAS[place - 1]
        names = f"{identity}/{kind}/{name}/{identity}_{kind}_{name}_1_{{}}.jpg"
        folders.append(Folder(f"DATA/{names}", identity, camera, images))
        people = paths.setdefault(str(identity), {"RGB": {}, "IR": {}})
        people[kind][name] = {"1": [names.format(number) for number in range(1, images + 1)]}
        if part == "train":
            lines[part] += [f"{identity} RGB/IR {name} 1"] if kind == "RGB" else []
        else:
            query = len(people["RGB"]) == 1 and kind == ("RGB", "IR")[len(paths) % 2]
            lines["query" if query else "gallery"].append(f"{identity} {kind} {name} 1")
    lists = {f"{part}.txt": ("\n".join(rows) + "\n").encode() for part, rows in lines.items()}
    return folders, lists | {"data_paths.json": json.dumps(paths).encode()}


def render_folder(job: tuple) -> int:
    """Write the images of one folder. Each has its own generator: bytes do not depend on processes or their order."""
    tree, layout, seed, person, folder = job
    camera = make_camera(layout, folder.camera, seed)
    (tree / folder.names).parent.mkdir(parents=True)
    for number in range(1, folder.images + 1):
        step = number if layout in WALKS else 0
        rng = np.random.default_rng((seed, 3, folder.identity, folder.camera, number - step))
        width = int(rng.integers(80, 141))
        size = (width, int(rng.uniform(2.1, 2.6) * width)) if layout != "regdb" else (64, 128)
        render(person, camera, size, rng, step).save(tree / folder.names.format(number), quality=85)
    return folder.images


def draw_sheet(tree: Path, layout: str, folders: list) -> Image.Image:
    """A dozen people, two in a row, those with most cameras first; visible images of each before the others."""
    people = {}
    for folder in folders:
        people.setdefault(folder.identity, {})[folder.camera] = folder
    chosen = sorted(people, key=lambda identity: (-len(people[identity]), identity))[:12]
    fixed = {"sysu": (1, 2, 4, 5, 3, 6), "regdb": (1, 1, 1, 2, 2, 2)}

    wide, high, gap = 92, 194, 16
    sheet = Image.new("RGB", (12 * wide + 4 * gap, math.ceil(len(chosen) / 2) * (high + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, identity in enumerate(chosen):
        x, y = gap // 2 + index % 2 * (6 * wide + 2 * gap), index // 2 * (high + gap)
        places = sorted(camera for camera in people[identity] if camera < 10)[:3]
        columns = fixed.get(layout, (*places, *(10 + place for place in places)))
        for column, camera in enumerate(columns):
            if SPECTRA[layout][camera] != "visible" and SPECTRA[layout][columns[column - 1]] == "visible":
                x += gap // 2
            pen.text((x, y + 2), f"{identity:04d} cam{camera % 10}", "black")
            if folder := people[identity].get(camera):
                with Image.open(tree / folder.names.format(1 + column % folder.images)) as image:
                    calm = image.filter(ImageFilter.GaussianBlur(1))  # noise would double the size
                    sheet.paste(calm.resize((wide - 2, high - 2)), (x, y + gap - 1))
            x += wide
    palette = sheet.resize((sheet.width // 4, sheet.height // 4), Image.Resampling.NEAREST).quantize(128, kmeans=1)
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)  # a quarter of the size


# -------------------------------------------------------------------------------------------------------------- script


def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__)
    count = utils.bounded(int, 1)
    parser.add_argument("--out", type=Path, required=True, help="folder to create, new or empty")
    parser.add_argument("--layout", choices=SPECTRA, default="sysu", help="data set to imitate")
    parser.add_argument("--ids", type=count, help="number of people (default: 100)")
    text = ", ".join(f"{number} in {layout}" for layout, number in IMAGES.items())
    parser.add_argument("--images", type=count, help=f"images per person and camera (default: about {text})")
    text = "people to hold out for the test, in sysu (default: 30 %% of all)"
    parser.add_argument("--test_ids", type=utils.bounded(int, 2), help=text)
    text = "SYSU-MM01's rand_perm_cam.mat: use its ids and counts"
    parser.add_argument("--like", type=Path, metavar="FILE", help=text)
    parser.add_argument("--seed", type=utils.bounded(int, 0), default=0, help="the same seed gives the same bytes")
    parser.add_argument("--workers", type=utils.bounded(int, 0), default=utils.cores(), help="drawing processes")
    parser.add_argument("--sheet", type=Path, help="also draw a dozen people on this .png file")
    return parser


def main(argv=None) -> dict:
    """Returns {"out", "ids", "images": counts}."""
    args = get_args_parser().parse_args(argv)
    layout, out, ids = args.layout, Path(os.path.realpath(args.out)), args.ids or 100
    if args.like and (args.ids or args.images or args.test_ids or layout != "sysu"):
        raise utils.InputError(
            f"--like {args.like}: sets ids, images and layout; leave out --ids, --images, --test_ids and --layout"
        )
    if args.test_ids and layout != "sysu":
        raise utils.InputError(f"--test_ids {args.test_ids}: is for --layout sysu; leave it out for {layout}")
    if args.test_ids and args.test_ids > ids // 2:
        raise utils.InputError(f"--test_ids {args.test_ids}: more than half of {ids} people; reduce it, or raise --ids")
    if layout == "vcm" and args.images and args.images < VCM_FEWEST:
        raise utils.InputError(f"--images {args.images}: tracks of vcm have at least {VCM_FEWEST}; raise it")
    if ids < FEWEST_IDS[layout]:
        raise utils.InputError(f"--ids {ids}: too few to split; pass at least {FEWEST_IDS[layout]} for {layout}")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise utils.InputError(f"--out {args.out}: exists and is not an empty folder; choose a new one or remove it")
    if args.sheet and args.sheet.suffix != ".png":
        raise utils.InputError(f"--sheet {args.sheet}: is not a .png file; choose such a name")

    if args.like:
        folders, lists = plan_like(args.like)
    else:
        plans = {"sysu": partial(plan_sysu, test_ids=args.test_ids), "regdb": plan_regdb, "llcm": plan_llcm}
        plans |= {"vcm": plan_vcm, "buptcampus": plan_buptcampus}
        folders, lists = plans[layout](ids, args.images or IMAGES[layout], np.random.default_rng((args.seed, 0)))
    people = draw_people(sorted({folder.identity for folder in folders}), args.seed)

    if args.sheet:
        check_output(args.sheet)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = temporary_name(out)
        beside.mkdir()
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise utils.InputError(f"--out {args.out}: {reason}; choose a folder that can be created") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(args.out))
        stack.callback(shutil.rmtree, beside, ignore_errors=True)
        unfinished = beside / out.name  # takes its place when it is complete
        jobs = [(unfinished, layout, args.seed, people[folder.identity], folder) for folder in folders]
        with utils.map_processes(render_folder, jobs, args.workers) as done:
            images = sum(utils.progress(done, total=len(jobs), unit="folder"))
        lists[DEMO_FILE] = f"Drawn by demo_data.py, seed {args.seed}: no real people.\n".encode()
        for name, content in lists.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_bytes(content)
        unfinished.rename(out)
    if args.sheet:
        with atomic(args.sheet) as temporary:
            draw_sheet(out, layout, folders).save(temporary, "PNG", optimize=True)
    print(f"{out}: {images:,} images of {len(people)} people")
    return {"out": out, "ids": len(people), "images": images}


if __name__ == "__main__":
    utils.cli(main)
