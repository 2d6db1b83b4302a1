"""CPU time that a host spends on an image, by use: decoding, a training example, an evaluation example at each size.

    python benchmarks/image_input.py                     prints the table of docs/data.md for configs/imagenet_vit.py
    python benchmarks/image_input.py --check             says which of the page's figures is far from this machine's

The images are JPEG files as large as ImageNet's (500 x 375 pixels, about 110 kB), made from noise of all scales, and read from
a prepared folder. CPU seconds of the process are counted, not time on the clock. --check fails if a figure of the page is less
than half or more than twice the measured one.
"""

import functools
import io
import pathlib
import re
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seqpe_jax import config  # noqa: E402
from seqpe_jax.config.schema import DataConfig  # noqa: E402
from seqpe_jax.data import images, prepare  # noqa: E402

PAGE, CONFIG = ROOT / "docs" / "data.md", str(ROOT / "configs" / "imagenet_vit.py")
HEIGHT, WIDTH = 375, 500
JPEG_QUALITY = 97
ROUGHNESS = 0.4  # growth of the amplitude with the scale
NUM_FILES = 24
TOLERANCE = 2.0
HEADER = "| use of an image | CPU ms per image | images per second and core |"


def jpeg(seed: int) -> bytes:
    """Returns a JPEG file of noise whose power falls with the frequency as that of photos does."""
    draw, pixels = np.random.default_rng(seed), np.zeros((HEIGHT, WIDTH, 3))
    for scale in (1, 2, 4, 8, 16, 32, 64, 128):
        grid = draw.normal(size=(HEIGHT // scale + 2, WIDTH // scale + 2, 3)) * scale**ROUGHNESS
        planes = [Image.fromarray(grid[..., channel].astype(np.float32)) for channel in range(3)]
        large = [plane.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for plane in planes]
        pixels += np.stack([np.asarray(plane) for plane in large], axis=-1)
    scaled = 128 + 40 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def source_of(folder: pathlib.Path) -> images.ImageSource:
    """Returns the prepared training split of the files."""
    for seed in range(2 * NUM_FILES):
        path = folder / "photos" / "train" / f"class{seed % 2}" / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))
    settings = DataConfig(name="image_folder", paths=(str(folder / "photos"),), cache_dir=str(folder / "cache"))
    prepare.prepare(settings, folder / "prepared", progress=False)
    return images.image_source(
        "image_folder", split="train", paths=settings.paths, prepared=str(folder / "prepared"), progress=False
    )


def milliseconds(make, source: images.ImageSource) -> float:
    """Returns the CPU milliseconds of one example, by the fastest of three passes over the files."""

    def once() -> float:
        began = time.process_time()
        for index in range(len(source)):
            make(source[index])
        return time.process_time() - began

    once()
    return 1000 * min(once() for _ in range(3)) / len(source)


def table(settings: config.Config) -> list[str]:
    """Returns the rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        source = source_of(pathlib.Path(folder))
        data, draw = settings.data, np.random.default_rng(0)
        train = functools.partial(
            images.train_example, size=data.size, augment=data.augment, rng=draw, mean=source.mean
        )
        uses = {"read and decoded": lambda record: record, "a training example": train}
        for size in settings.eval_sizes:
            uses[f"an evaluation example, {size[0]} pixels"] = functools.partial(
                images.eval_example, size=size, crop_ratio=data.crop_ratio
            )
        found = {name: milliseconds(make, source) for name, make in uses.items()}
    return [f"| {name} | {spent:.1f} | {1000 / spent:,.0f} |" for name, spent in found.items()]


def differences(rows: list[str]) -> list[str]:
    """Returns a line for each figure of the page that is more than `TOLERANCE` times away."""
    stated = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \| [\d,]+ \|$", PAGE.read_text(), re.MULTILINE))
    wrong = []
    for row in rows:
        name, spent = re.match(r"\| ([^|]+) \| ([\d.]+)", row).groups()
        if name not in stated:
            wrong.append(f"{PAGE} has no row '{name}'")
        elif not 1 / TOLERANCE <= float(stated[name]) / float(spent) <= TOLERANCE:
            wrong.append(f"{PAGE} says {stated[name]} ms for '{name}', measured {spent}")
    return wrong


def main(check: bool) -> int:
    """Returns the exit code: 1 if figures differ that are to be checked."""
    rows = table(config.load(CONFIG))
    print("\n".join([HEADER, "|---|---:|---:|", *rows]))
    wrong = differences(rows) if check else []
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
