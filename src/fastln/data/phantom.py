"""Phantom: radiology-like images drawn by this program, and questions about what was drawn.

The data is synthetic, for trials and tests: a model that answers these questions has learned nothing about medicine.
CT-like axial slices of head, chest and abdomen, and X-ray-like projections of chest and knees, each with none to three
lesions, all on one side. As in radiology the patient faces the reader: the patient's left is on the right of the image.

Everything is a function of the seed and the number of the image; nothing is stored. All arithmetic on pixels uses
integers, so the images are the same on every machine that runs the same Pillow and NumPy.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fastln.data.dataset import Sample, Source
from fastln.data.images import ImageStat
from fastln.errors import FastLNError

NAME = "phantom"
IMAGES = {"train": 160, "test": 40}
IMAGE_SIZE = 128
"""Height and width of an image in pixels."""

# Drawn at twice the size, then reduced, which smooths the edges. All coordinates below are on this canvas.
_CANVAS = 256
_CENTRE = _CANVAS // 2
_SEED = 20240416


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of one image.

    Attributes:
        seed: Seed for texture and noise, which do not affect any answer.
        modality: `ct` or `x-ray`.
        organ: `head`, `chest`, `abdomen` or `knee`.
        side: The patient's side of all lesions, `left` or `right`; `none` without lesions.
        lesions: Centre and radius (x, y, r) of each.
        zoom: Size of the anatomy, in 64ths.
        shift: Its offset (x, y) from the centre.
    """

    seed: int
    modality: str
    organ: str
    side: str
    lesions: tuple[tuple[int, int, int], ...]
    zoom: int
    shift: tuple[int, int]


def source() -> Source:
    """Return the phantom data: 160 images to train on, 40 to test on, six questions about each."""
    scenes = {
        f"phantom-{split}-{number:03d}": _scene(random.Random(f"{_SEED}/{split}/{number}"))
        for split, count in IMAGES.items()
        for number in range(count)
    }
    splits = {
        split: [
            s for key, scene in scenes.items() if key.startswith(f"phantom-{split}-") for s in _questions(key, scene)
        ]
        for split in IMAGES
    }
    return Source(
        name=f"{NAME} (synthetic)",
        synthetic=True,
        splits=splits,
        image=functools.partial(_image, scenes),
        stats=dict.fromkeys(scenes, ImageStat(IMAGE_SIZE, IMAGE_SIZE, 0)),
    )


def draw(scene: Scene) -> Image.Image:
    """Draw a scene; equal scenes give equal pixels.

    Returns:
        An image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels in mode RGB, all three channels alike.
    """
    view = _VIEWS[scene.modality, scene.organ]
    pen = _Pen(scene)
    view.draw(pen)
    for x, y, r in scene.lesions:
        pen.ellipse(x, y, r, r, view.lesion)
    image = pen.image.reduce(_CANVAS // IMAGE_SIZE)
    if scene.modality == "x-ray":
        image = image.filter(ImageFilter.GaussianBlur(1))
    # The sum of four uniform numbers is close enough to a normal one, and needs no floating point.
    noise = np.random.default_rng(scene.seed).integers(-view.noise, view.noise + 1, (4, *image.size)).sum(axis=0)
    # Structured noise: the same at a quarter of the resolution, as reconstruction filters leave it.
    coarse = noise[: IMAGE_SIZE // 4, : IMAGE_SIZE // 4].repeat(4, axis=0).repeat(4, axis=1) // 2
    pixels = np.asarray(image).astype(np.int64) + noise + coarse
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.SMOOTH).convert("RGB")


class _Pen:
    """Draws on the canvas in the coordinates of the scene's anatomy."""

    def __init__(self, scene: Scene) -> None:
        self.image = Image.new("L", (_CANVAS, _CANVAS), 0)
        self.random = random.Random(f"{scene.seed}")
        self._draw = ImageDraw.Draw(self.image)
        self._zoom = scene.zoom
        self._shift = scene.shift

    def ellipse(self, x: int, y: int, rx: int, ry: int, grey: int) -> None:
        """Fill an ellipse with a grey."""
        self._draw.ellipse(self._box(x, y, rx, ry), fill=grey)

    def glow(self, x: int, y: int, rx: int, ry: int, grey: int) -> None:
        """Add a grey, which may be negative, on an ellipse: in a projection, what lies behind shows through."""
        box = self._box(x, y, rx, ry)
        self._add(box, lambda d, left, top: d.ellipse(_moved(box, left, top), fill=abs(grey)), grey)

    def bar(self, points: list[tuple[int, int]], width: int, grey: int) -> None:
        """Add a grey along a line."""
        placed = [number for x, y in points for number in (self._place(x, 0), self._place(y, 1))]
        xs, ys = placed[::2], placed[1::2]
        box = (min(xs) - width, min(ys) - width, max(xs) + width, max(ys) + width)
        self._add(
            box,
            lambda d, left, top: d.line(_moved(placed, left, top), fill=abs(grey), width=width, joint="curve"),
            grey,
        )

    def arc(self, x: int, y: int, rx: int, ry: int, angles: tuple[int, int], width: int, grey: int) -> None:
        """Add a grey along an arc of an ellipse; angles in degrees, clockwise from the right."""
        box = self._box(x, y, rx, ry)
        self._add(box, lambda d, left, top: d.arc(_moved(box, left, top), *angles, fill=abs(grey), width=width), grey)

    def specks(self, x: int, y: int, rx: int, ry: int, count: int, grey: int) -> None:
        """Add a grey on small dots strewn over a rectangle: vessels, folds."""
        # All dots of a call have one grey, so they may be summed first: cutting the sum at black and white, once, is
        # the same as cutting it after each dot. No dot may leave the canvas.
        sums = np.zeros((_CANVAS, _CANVAS), np.int32)
        for _ in range(count):
            dot = self.random.randint(1, 3)
            box = self._box(x + self.random.randint(-rx, rx), y + self.random.randint(-ry, ry), dot, dot)
            left, top, right, bottom = box
            sums[top : bottom + 1, left : right + 1] += _dot(right - left, bottom - top)
        self._blend(Image.fromarray((sums * abs(grey)).clip(0, 255).astype(np.uint8)), 0, 0, grey)

    def _add(
        self, box: tuple[int, int, int, int], shape: Callable[[ImageDraw.ImageDraw, int, int], None], grey: int
    ) -> None:
        """Add a shape's grey inside a box that holds it: most are small, and the rest of the canvas stays.

        Args:
            box: The first and last column and row, as (left, top, right, bottom); may leave the canvas.
            shape: Draws `abs(grey)` on a layer whose first pixel is the canvas's at the given column and row.
            grey: The grey; its sign says whether it is added or taken away.
        """
        left, top = max(box[0], 0), max(box[1], 0)
        width, height = min(box[2] + 1, _CANVAS) - left, min(box[3] + 1, _CANVAS) - top
        if width > 0 and height > 0:
            layer = Image.new("L", (width, height), 0)
            shape(ImageDraw.Draw(layer), left, top)
            self._blend(layer, left, top, grey)

    def _blend(self, layer: Image.Image, left: int, top: int, grey: int) -> None:
        below = self.image.crop((left, top, left + layer.width, top + layer.height))
        self.image.paste((ImageChops.add if grey > 0 else ImageChops.subtract)(below, layer), (left, top))

    def _place(self, position: int, axis: int) -> int:
        return _CENTRE + (position - _CENTRE) * self._zoom // 64 + self._shift[axis]

    def _box(self, x: int, y: int, rx: int, ry: int) -> tuple[int, int, int, int]:
        return (
            self._place(x - rx, 0),
            self._place(y - ry, 1),
            self._place(x + rx, 0),
            self._place(y + ry, 1),
        )


def _moved(points: Sequence[int], left: int, top: int) -> list[int]:
    """Return points x, y, x, y and so on as a layer that begins at (left, top) has them."""
    return [number - (top if index % 2 else left) for index, number in enumerate(points)]


@functools.cache
def _dot(width: int, height: int) -> np.ndarray:
    """Return an ellipse as ones among zeros, (height + 1, width + 1), as Pillow draws it in a box from 0 to these."""
    image = Image.new("L", (width + 1, height + 1), 0)
    ImageDraw.Draw(image).ellipse((0, 0, width, height), fill=1)
    return np.array(image)


def _mirrored(x: int) -> int:
    return 2 * _CENTRE - x


def _ct_head(pen: _Pen) -> None:
    pen.ellipse(128, 128, 90, 112, 80)  # scalp
    pen.ellipse(128, 128, 86, 108, 240)  # skull
    pen.ellipse(128, 128, 77, 99, 30)  # fluid
    pen.ellipse(128, 128, 75, 97, 112)  # brain
    pen.specks(128, 128, 60, 80, 60, -18)
    pen.bar([(128, 34), (128, 222)], 2, 40)  # falx
    for side in (-1, 1):  # ventricles
        pen.ellipse(128 + side * 11, 104, 8, 22, 45)
        pen.ellipse(128 + side * 16, 146, 7, 20, 45)
        pen.ellipse(128 + side * 30, 122, 9, 14, 126)  # basal ganglia


def _ct_chest(pen: _Pen) -> None:
    pen.ellipse(128, 132, 118, 88, 70)  # fat
    pen.ellipse(128, 132, 110, 80, 120)  # muscle
    for angle in range(12, 360, 30):  # ribs, cut across
        pen.arc(128, 132, 106, 76, (angle, angle + 14), 7, 110)
    for side in (-1, 1):
        pen.ellipse(128 + side * 54, 128, 40, 62, 16)  # lungs
        pen.specks(128 + side * 52, 128, 28, 44, 26, 70)
    pen.ellipse(144, 106, 32, 36, 138)  # heart, to the left
    pen.ellipse(112, 100, 12, 14, 146)
    pen.ellipse(148, 162, 11, 11, 150)  # descending aorta
    _vertebra(pen, 128, 182)


def _ct_abdomen(pen: _Pen) -> None:
    pen.ellipse(128, 130, 118, 92, 66)  # fat
    pen.ellipse(128, 130, 106, 80, 112)  # muscle
    pen.ellipse(128, 128, 98, 72, 62)
    pen.ellipse(82, 106, 50, 46, 140)  # liver, to the right
    pen.ellipse(112, 92, 34, 24, 140)
    pen.ellipse(168, 92, 30, 22, 108)  # stomach
    pen.ellipse(164, 82, 18, 9, 8)  # its air
    pen.ellipse(204, 120, 15, 34, 146)  # spleen
    for side in (-1, 1):
        pen.ellipse(128 + side * 52, 162, 20, 25, 168)  # kidneys
        pen.ellipse(128 + side * 46, 162, 8, 11, 78)
    pen.ellipse(140, 150, 10, 10, 160)  # aorta
    pen.specks(140, 128, 36, 14, 16, 45)  # bowel
    _vertebra(pen, 128, 178)


def _vertebra(pen: _Pen, x: int, y: int) -> None:
    pen.bar([(x - 30, y + 16), (x + 30, y + 16)], 9, 90)
    pen.bar([(x, y + 10), (x, y + 32)], 9, 90)
    pen.ellipse(x, y, 20, 17, 225)
    pen.ellipse(x, y, 15, 12, 185)
    pen.ellipse(x, y + 20, 8, 6, 100)


def _xray_chest(pen: _Pen) -> None:
    pen.glow(128, 190, 116, 170, 96)  # trunk
    pen.glow(128, 60, 40, 60, 40)  # neck
    for side in (-1, 1):
        pen.glow(128 + side * 50, 124, 40, 88, -66)  # lungs
        pen.specks(128 + side * 34, 130, 16, 40, 30, 16)
        for rib in range(8):
            pen.arc(128 + side * 44, 76 + rib * 20, 50, 22, (190, 350), 6, 17)
            pen.arc(128 + side * 44, 70 + rib * 20, 48, 16, (10, 170), 4, 9)
        pen.bar([(128 + side * 8, 52), (128 + side * 52, 38), (128 + side * 90, 46)], 8, 50)  # clavicles
        pen.glow(128 + side * 52, 226, 54, 40, 74)  # diaphragm
    pen.glow(128, 128, 19, 112, 58)  # spine
    for disc in range(30, 230, 18):
        pen.bar([(114, disc), (142, disc)], 3, -20)
    pen.glow(146, 160, 42, 40, 54)  # heart shadow, to the left
    pen.glow(142, 104, 14, 18, 36)  # aortic knob


def _xray_knee(pen: _Pen) -> None:
    for side in (-1, 1):
        x = 128 + side * 60
        pen.bar([(x, -20), (x, 280)], 92, 48)  # soft tissue
        pen.glow(x, 124, 50, 46, 10)
        for edge in (-15, 15):  # the cortex of femur and tibia
            pen.bar([(x + edge, -10), (x + edge, 84)], 5, 66)
            pen.bar([(x + edge, 168), (x + edge, 270)], 5, 66)
        pen.bar([(x, -10), (x, 96)], 34, 66)
        pen.bar([(x, 150), (x, 270)], 34, 66)
        pen.glow(x - 16, 100, 20, 19, 58)  # condyles
        pen.glow(x + 16, 100, 20, 19, 58)
        pen.glow(x, 134, 37, 11, 70)  # plateau
        pen.glow(x, 88, 14, 16, 26)  # patella
        pen.bar([(x + side * 32, 146), (x + side * 32, 270)], 12, 66)  # fibula


@dataclass(frozen=True, slots=True)
class View:
    """How one kind of image is drawn.

    Attributes:
        draw: Draws the anatomy.
        lesion: The grey of a lesion.
        radius: Smallest and largest radius of a lesion.
        noise: Half the range of each of the four numbers whose sum is the noise of a pixel.
        left: Where lesions on the patient's left may be, far enough apart not to touch.
        right: The same for the right.
    """

    draw: Callable[[_Pen], None]
    lesion: int
    radius: tuple[int, int]
    noise: int
    left: tuple[tuple[int, int], ...]
    right: tuple[tuple[int, int], ...]


def _both_sides(left: tuple[tuple[int, int], ...]) -> dict[str, tuple[tuple[int, int], ...]]:
    return {"left": left, "right": tuple((_mirrored(x), y) for x, y in left)}


_VIEWS = {
    ("ct", "head"): View(_ct_head, 205, (9, 12), 7, **_both_sides(((168, 72), (182, 112), (178, 156), (156, 194)))),
    ("ct", "chest"): View(_ct_chest, 160, (9, 12), 8, **_both_sides(((186, 84), (206, 116), (200, 150), (176, 176)))),
    ("ct", "abdomen"): View(
        _ct_abdomen,
        20,
        (9, 11),
        8,
        left=((204, 100), (205, 136), (180, 150), (180, 178)),
        right=((58, 92), (92, 82), (60, 124), (100, 120)),
    ),
    ("x-ray", "chest"): View(
        _xray_chest, 190, (10, 13), 4, **_both_sides(((178, 66), (198, 100), (200, 138), (196, 172)))
    ),
    ("x-ray", "knee"): View(_xray_knee, 60, (9, 11), 4, **_both_sides(((188, 30), (176, 96), (190, 172), (186, 214)))),
}

_SIDES = ("left", "right")


def _scene(rng: random.Random) -> Scene:
    modality, organ = rng.choice(list(_VIEWS))
    view = _VIEWS[modality, organ]
    side = rng.choice(_SIDES)
    count = rng.choice((0, 0, 1, 2, 3))
    places = rng.sample(view.left if side == "left" else view.right, count)
    lesions = tuple(
        (x + rng.randint(-2, 2), y + rng.randint(-2, 2), rng.randint(*view.radius)) for x, y in sorted(places)
    )
    return Scene(
        seed=rng.getrandbits(32),
        modality=modality,
        organ=organ,
        side=side if lesions else "none",
        lesions=lesions,
        zoom=rng.randint(58, 66),
        shift=(rng.randint(-4, 4), rng.randint(-4, 4)),
    )


_QUESTIONS = {
    "modality": (
        "What is the modality of this image?",
        "Which imaging modality is shown?",
        "How was this image taken?",
    ),
    "organ": (
        "Which part of the body is shown?",
        "What body region is this?",
        "Which region was imaged?",
    ),
    "count": (
        "How many lesions are there?",
        "What is the number of lesions?",
        "Count the lesions.",
    ),
    "present": (
        "Is there a lesion?",
        "Does this image show any lesion?",
        "Are there any lesions?",
    ),
    "on side": (
        "Is there a lesion on the patient's {}?",
        "Does the {} side of the patient show a lesion?",
        "Are there lesions on the {} side?",
    ),
    "side": (
        "Which side shows a lesion: left, right or none?",
        "Are the lesions on the left or the right, or on none of the two?",
        "Left, right or none: on which side is a lesion?",
    ),
}
"""The wordings of each question; those whose answer is yes, no or one of the words named are closed."""

_CLOSED = {"present", "on side", "side"}


def _questions(key: str, scene: Scene) -> list[Sample]:
    rng = random.Random(f"{scene.seed}/questions")
    asked_side = rng.choice(_SIDES)
    answers = {
        "modality": scene.modality,
        "organ": scene.organ,
        "count": str(len(scene.lesions)),
        "present": "yes" if scene.lesions else "no",
        "on side": "yes" if scene.side == asked_side else "no",
        "side": scene.side,
    }
    return [
        Sample(
            id=f"{key}-{kind.replace(' ', '-')}",
            image=key,
            question=rng.choice(_QUESTIONS[kind]).format(asked_side),
            answer=answer,
            closed=kind in _CLOSED,
        )
        for kind, answer in answers.items()
    ]


def _image(scenes: dict[str, Scene], key: str) -> Image.Image:
    if key not in scenes:
        raise FastLNError(f"the phantom data has no image {key!r}")
    return draw(scenes[key])
