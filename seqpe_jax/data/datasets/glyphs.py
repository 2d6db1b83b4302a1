"""Letters and digits drawn from the outlines of the fonts that Matplotlib ships: images of any size, none of them resized."""

import dataclasses
import functools
import hashlib
import pathlib
import string
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import check_split
from seqpe_jax.data.datasets.image_base import ImageSource, fingerprint_of
from seqpe_jax.errors import InputError

CLASS_NAMES = string.digits + string.ascii_uppercase
# Faces by split. All faces of a family are in one split, and faces that share a design are one family.
FACES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        "DejaVu Sans Mono": (
            "DejaVuSansMono",
            "DejaVuSansMono-Bold",
            "DejaVuSansMono-Oblique",
            "DejaVuSansMono-BoldOblique",
        ),
        "STIX": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
        "Computer Modern Sans": ("cmss10",),
    },
    "validation": {"Computer Modern Typewriter": ("cmtt10",)},
    "test": {
        "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        "Computer Modern Roman": ("cmr10", "cmb10", "cmti10"),
    },
}
DRAWINGS = {"train": 60, "validation": 20, "test": 6}  # of each class in each face
# Random changes of a drawing, uniform between plus and minus: shares of the shorter side, of heights, and their logarithm.
SHIFT, SLANT, SCALE = 0.08, 0.25, 0.1
STROKE = 0.025  # added to the outline at most, as a share of the shorter side
CAPITAL_HEIGHT = 0.58  # of the shorter side
DPI = 72.0  # a point is a pixel
FONT_UNITS = 100.0  # points at which outlines are read
_FONTS = threading.Lock()  # FreeType's faces hold the character that was loaded last


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One image, before it has a size.

    Attributes:
      face: name of a font file.
      label: class, an index in `CLASS_NAMES`.
      shift: (right, up), as a share of the free width and height of a square of the shorter side.
      slant: shift to the right of a point above the baseline, as a share of its height.
      scale: factor of the height of capital letters.
      stroke: width of the outline that is added, as a share of the shorter side.
    """

    face: str
    label: int
    shift: tuple[float, float]
    slant: float
    scale: float
    stroke: float


class Glyphs:
    """Grey images of the digits and capital letters in the faces of a split; nothing is read but fonts, and nothing stored."""

    name = "glyphs"
    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def open_split(cls, split: str, *, size: Sequence[int], **unused: Any) -> ImageSource:
        """Opens a split at a size.

        Args:
          split: "train", "validation" or "test".
          size: (height, width) in pixels.
          **unused: folders of other data sets.

        Raises:
          InputError: a font is missing.
        """
        del unused
        check_split(split)
        dataset = registry.get(cls.name)
        return ImageSource(
            name=f"{cls.name}/{split}",
            class_names=tuple(CLASS_NAMES),
            channels=dataset.channels,
            mean=dataset.mean,
            std=dataset.std,
            fingerprint=fingerprint_of(cls.name, str(cls.VERSION), split, _fonts_digest(split)),
            records=GlyphRecords(split, (int(size[0]), int(size[1]))),
        )


@dataclasses.dataclass(frozen=True)
class GlyphRecords:
    """Drawings of a split at a size, each made when it is read: {"image": uint8[H, W, 1], "label": int}.

    Attributes:
      split: name of the split.
      size: (height, width).
    """

    split: str
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(_faces(self.split)) * len(CLASS_NAMES) * DRAWINGS[self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawing = make_drawing(self.split, int(index))
        return {"image": draw(drawing, self.size)[..., None], "label": drawing.label}


def make_drawing(split: str, index: int) -> Drawing:
    """Returns a drawing of a split, a function of its number: the same at every size."""
    faces = _faces(split)
    rng = np.random.default_rng((list(FACES).index(split), index))
    place = index % (len(CLASS_NAMES) * len(faces))
    across, up, slant, scale, stroke = rng.uniform(-1, 1, 5).tolist()
    return Drawing(
        face=faces[place // len(CLASS_NAMES)],
        label=place % len(CLASS_NAMES),
        shift=(SHIFT * across, SHIFT * up),
        slant=SLANT * slant,
        scale=float(np.exp(SCALE * scale)),
        stroke=STROKE * (1 + stroke) / 2,
    )


def draw(drawing: Drawing, size: tuple[int, int]) -> np.ndarray:
    """Returns the image of a drawing, uint8[H, W], white on black.

    The outline of the character is shifted and slanted in real coordinates, then filled once with antialiasing: images of
    several sizes are drawings of one shape, not copies of one image.

    Args:
      drawing: the drawing.
      size: (height, width) in pixels; the character has the size of the shorter side.
    """
    from matplotlib.backend_bases import GraphicsContextBase
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.transforms import Affine2D

    height, width = size
    side = min(size)
    path, (left, bottom, right, top), capital = _outline(drawing.face, CLASS_NAMES[drawing.label])
    zoom = CAPITAL_HEIGHT * drawing.scale * side / capital
    middle = (left + right) / 2 + drawing.slant * (bottom + top) / 2, (bottom + top) / 2
    placed = (
        Affine2D.from_values(1.0, 0.0, drawing.slant, 1.0, 0.0, 0.0)
        .translate(-middle[0], -middle[1])
        .scale(zoom)
        .translate(width / 2 + drawing.shift[0] * side, height / 2 + drawing.shift[1] * side)
    )
    renderer, context = RendererAgg(width, height, DPI), GraphicsContextBase()
    context.set_linewidth(drawing.stroke * side)
    context.set_joinstyle("round")
    context.set_foreground((0.0, 0.0, 0.0, 1.0), isRGBA=True)
    renderer.draw_path(context, path, placed, (0.0, 0.0, 0.0))
    return np.asarray(renderer.buffer_rgba())[..., 3].copy()


@functools.cache
def _outline(face: str, character: str) -> tuple[Any, tuple[float, float, float, float], float]:
    """Outline of a character as a path, its (left, bottom, right, top), and the height of the face's H, in points."""
    from matplotlib.path import Path

    font = _font(face)

    def outline(text: str) -> Path:
        with _FONTS:
            font.set_size(FONT_UNITS, DPI)
            font.load_char(ord(text), flags=_unhinted())
            vertices, codes = font.get_path()
        return Path(vertices, codes)

    path = outline(character)
    box = path.get_extents()
    return path, (box.x0, box.y0, box.x1, box.y1), outline("H").get_extents().height


def _unhinted() -> Any:
    """The flag of FreeType by which outlines are those of the font file, not moved to pixels."""
    from matplotlib import ft2font

    flags = getattr(ft2font, "LoadFlags", None)  # matplotlib 3.10 and later
    return flags.NO_HINTING if flags is not None else ft2font.LOAD_NO_HINTING


@functools.cache
def _font(face: str) -> Any:
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(_font_file(face)))


def _font_file(face: str) -> pathlib.Path:
    """Path of a font. Raises: InputError: Matplotlib lacks it."""
    import matplotlib

    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    if not path.is_file():
        raise InputError(
            f"data.name='glyphs' draws the fonts that Matplotlib ships, and this installation has no {path}: "
            "pip install --force-reinstall matplotlib"
        )
    return path


def _faces(split: str) -> tuple[str, ...]:
    return tuple(face for faces in FACES[split].values() for face in faces)


@functools.cache
def _fonts_digest(split: str) -> str:
    """Hash of the font files of a split. Raises: InputError: one is missing."""
    content = hashlib.sha256()
    for face in _faces(split):
        content.update(_font_file(face).read_bytes())
    return content.hexdigest()
