"""Characters rendered from matplotlib's fonts, which need no download: many classes with few images each."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from .dataset import Dataset, cached

SIZE = 28  # pixels
MIN_FONTS = 4  # a character needs one row in each part of the split, and a second one for training


def load(cache: Path) -> Dataset:
    """The data set from `cache`, which is rendered on first use."""
    return cached(cache / "glyphs.npz", lambda: render(matplotlib_fonts()))


def matplotlib_fonts() -> list[Path]:
    """matplotlib's Unicode fonts.

    The Computer Modern fonts are left out, since their code points are TeX's, not Unicode's, and so is the fallback
    font, which draws a code point's block instead of its character.
    """
    fonts = sorted(Path(get_data_path(), "fonts", "ttf").glob("*.ttf"))
    return [f for f in fonts if not f.name.startswith(("cm", "LastResort"))]


def render(fonts: Sequence[Path], min_fonts: int = MIN_FONTS) -> Dataset:
    """One image per font and character, for the characters that at least `min_fonts` fonts draw."""
    rows = []
    for path in tqdm(fonts, "rendering fonts", unit="font", disable=None):
        pen = ImageFont.truetype(path, size=20)
        for code in TTFont(path, lazy=True).getBestCmap():
            image = _draw(pen, chr(code)) if unicodedata.category(chr(code))[0] in "LNPS" else b""
            if any(image):
                rows.append((code, image))
    count = Counter(code for code, _ in rows)
    rows = [row for row in rows if count[row[0]] >= min_fonts]
    codes, target = np.unique([code for code, _ in rows], return_inverse=True)
    images, group = np.unique(np.array([image for _, image in rows]), return_inverse=True)
    inputs = np.frombuffer(b"".join(i.ljust(SIZE * SIZE, b"\0") for i in images.tolist()), np.uint8)
    names = [unicodedata.name(chr(code), f"U+{code:04X}") for code in codes]
    return Dataset(np.array(names), inputs.reshape(-1, SIZE * SIZE), group, target)


def _draw(pen: ImageFont.FreeTypeFont, character: str) -> bytes:
    """The character on a common baseline, since case and accents differ in size and height."""
    image = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(image).text((SIZE / 2, 21), character, fill=255, font=pen, anchor="ms")
    return image.tobytes()
