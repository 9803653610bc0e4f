"""Draws the parts and their defects: textures (weave, grain), objects (washer, capsule), patterns.

Every example is a function of (category, split, index) alone. A part is drawn first, a defective
one is the same part with a defect drawn over it, and the camera's noise is added last; the mask is
where the defective image and its good twin differ, bit for bit. The defects of textures and objects
are none of those that training makes up: no patch of the image is moved, rotated or recoloured. The
patterns, `sheet` and `blister`, are in patterns.py.

While drawn, images are float `[h, w, 3]` RGB in [0, 1], and so are colours.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from data.synthetic_ad import patterns
from data.synthetic_ad.pieces import (
    SIZE,
    X,
    Y,
    blend,
    blotch,
    curve,
    edge,
    lighting,
    pick,
    smooth_noise,
)

NUM_EXAMPLES = {
    **{"train": 64, "test_good": 12, "test_defective": 24},
    # In neither data set: for trying a trained model.
    **{"new_good": 3, "new_defective": 3},
}
# Differences from the good twin that a person sees, in [0, 1]; smaller ones are taken back.
VISIBLE = 0.05
# Defects are drawn anew until their share of the image is within these.
SMALLEST, LARGEST = 0.005, 0.06
SPLITS = ("train", "test", "new")
_SEED = 20240

# Good parts: rng -> (image, geometry). Geometry tells the defects where the part is: "part" is its
# opacity `[h, w]`, "surface" says where a defect may be centred, bool `[h, w]`; the rest serves
# single defects.


def weave(rng: np.random.Generator):
    """Draws twill, blue warp and pale weft, each weft thread over two and under one."""
    pitch = 7.0
    angle = rng.uniform(-0.04, 0.04)
    phase = rng.uniform(0, 3 * pitch, 2)
    sway = 0.7 * smooth_noise(rng, 14), 0.7 * smooth_noise(rng, 14)
    u = (X * np.cos(angle) + Y * np.sin(angle) + phase[0] + sway[0]) / pitch
    v = (-X * np.sin(angle) + Y * np.cos(angle) + phase[1] + sway[1]) / pitch
    warp_index, weft_index = np.floor(u).astype(int), np.floor(v).astype(int)
    u, v = u - warp_index - 0.5, v - weft_index - 0.5  # within the crossing, in [-0.5, 0.5]
    weft_on_top = (warp_index + weft_index) % 3 != 0

    def thread(across, along, tint, index):
        round_ = np.sqrt(np.clip(1 - (across / 0.52) ** 2, 0, 1))
        shade = (0.45 + 0.55 * round_) * (0.80 + 0.20 * np.cos(np.pi * along))
        shade *= (1 + 0.05 * rng.standard_normal(64))[index % 64]  # no two threads are alike
        twist = 1 + 0.05 * np.sin(2 * np.pi * (2.0 * along + 1.5 * across))
        return np.asarray(tint) * (shade * twist)[..., None]

    warp = thread(u, v, (0.27, 0.40, 0.62), warp_index)
    weft = thread(v, u, (0.86, 0.82, 0.72), weft_index)
    image = np.where(weft_on_top[..., None], weft, warp)
    image = ndimage.gaussian_filter(image, (0.45, 0.45, 0)) * lighting(rng)  # the lens
    geometry = {
        "part": np.ones((SIZE, SIZE)),
        "surface": np.ones((SIZE, SIZE), bool),
        "weft_on_top": weft_on_top,
        "weft_index": weft_index,
        "warp": warp,
    }
    return image, geometry


def grain(rng: np.random.Generator):
    """Draws planed wood, the grain running from left to right."""
    rings = Y / 15 + 0.35 * smooth_noise(rng, (10, 45)) + 0.0035 * X * rng.uniform(-1, 1)
    rings = rings + rng.uniform(0, 1)
    ring = rings - np.floor(rings)
    late = ring**3 * edge(ring - 0.96, 0.08)  # late wood is dark and ends sharply
    fibre = smooth_noise(rng, (0.6, 9))
    pores = edge(1.9 - smooth_noise(rng, (0.5, 3.5)), 0.8)
    image = blend(np.full((SIZE, SIZE, 3), (0.80, 0.62, 0.42)), (0.52, 0.33, 0.18), 0.75 * late)
    image = image * (1 + 0.035 * fibre + 0.03 * smooth_noise(rng, 20))[..., None]
    image = blend(image, (0.42, 0.27, 0.16), 0.35 * pores) * lighting(rng)
    return image, {"part": np.ones((SIZE, SIZE)), "surface": np.ones((SIZE, SIZE), bool)}


def washer(rng: np.random.Generator):
    """Draws a turned steel washer on a dark mat."""
    centre = SIZE / 2 + rng.uniform(-5, 5, 2)
    outer, inner = 46 + rng.uniform(-1, 1), 21 + rng.uniform(-0.7, 0.7)
    y, x = Y - centre[0], X - centre[1]
    radius, angle = np.hypot(y, x), np.arctan2(y, x)
    mat = np.full((SIZE, SIZE, 3), (0.17, 0.20, 0.24))
    mat = mat * (1 + 0.06 * smooth_noise(rng, 0.8) + 0.04 * smooth_noise(rng, 12))[..., None]
    light = rng.uniform(0, 2 * np.pi)
    offset = 4 * np.array([np.sin(light), np.cos(light)])
    behind = np.hypot(y - offset[0], x - offset[1])
    shadow = edge(behind - outer, 7) * (1 - edge(behind - inner, 7))
    mat = blend(mat, (0.03, 0.04, 0.05), 0.7 * shadow)
    # Turned metal is bright where its rings lie across the light.
    metal = 0.56 + 0.13 * np.cos(2 * (angle - light)) + 0.05 * np.cos(angle - light)
    tool_marks = np.interp(radius, np.arange(SIZE), 0.02 * rng.standard_normal(SIZE))
    metal = metal + tool_marks + 0.008 * smooth_noise(rng, 0.7)
    facing = np.cos(angle - light - np.pi)
    metal = metal + 0.22 * facing * (edge(outer - 3 - radius, 1) - edge(radius - inner - 3, 1))
    ring = edge(radius - outer) * (1 - edge(radius - inner))
    image = blend(mat, metal[..., None] * np.array([0.97, 1.0, 1.03]), ring) * lighting(rng, 0.05)
    geometry = {
        "part": ring,
        "surface": (radius < outer - 5) & (radius > inner + 5),
        "rims": (np.abs(radius - outer) < 1) | (np.abs(radius - inner) < 1),
        "behind": mat,
    }
    return image, geometry


_STROKES = (  # "A7", each stroke from (x, y) to (x, y), in units of the letters' height
    ((-0.95, 0.5), (-0.55, -0.5)),
    ((-0.55, -0.5), (-0.15, 0.5)),
    ((-0.80, 0.18), (-0.30, 0.18)),
    ((0.15, -0.45), (0.85, -0.45)),
    ((0.85, -0.45), (0.40, 0.5)),
)


def _print(x: np.ndarray, y: np.ndarray, height: float) -> np.ndarray:
    """The opacity of the printed mark in coordinates whose origin is the mark's centre."""
    nearest = np.full(x.shape, np.inf)
    for (x0, y0), (x1, y1) in _STROKES:
        dx, dy = (x1 - x0) * height, (y1 - y0) * height
        t = np.clip(((x - x0 * height) * dx + (y - y0 * height) * dy) / (dx**2 + dy**2), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - x0 * height - t * dx, y - y0 * height - t * dy))
    return edge(nearest - 1.5)


def capsule(rng: np.random.Generator):
    """Draws a two-coloured capsule with the mark A7 printed on its pale half."""
    centre = SIZE / 2 + rng.uniform(-4, 4, 2)
    angle = rng.uniform(-0.25, 0.25)
    y, x = Y - centre[0], X - centre[1]
    x, y = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    half, radius = 26.0, 24.0

    def outside(x, y):
        return np.hypot(np.maximum(np.abs(x) - half, 0), y) - radius

    table = np.full((SIZE, SIZE, 3), (0.74, 0.77, 0.78))
    table = table * (1 + 0.02 * smooth_noise(rng, 10))[..., None]
    table = blend(table, (0.35, 0.38, 0.42), 0.6 * edge(outside(x - 2, y - 5), 12))
    seam = 2 + 2 * rng.uniform(-1, 1)
    cap = edge(x - seam)
    body = blend(np.full((SIZE, SIZE, 3), (0.93, 0.90, 0.80)), (0.80, 0.25, 0.16), cap)
    body = blend(body, (0.45, 0.16, 0.12), 0.6 * edge(np.abs(x - seam) - 0.8))
    inside = np.clip(-outside(x, y) / radius, 0, 1)  # 0 at the rim, 1 on the axis
    shade = (0.50 + 0.50 * np.sqrt(1 - (1 - inside) ** 2)) * (1 - 0.12 * y / radius)
    mark_x, mark_y = 25.0, 1.0
    shine = edge(np.hypot(np.maximum(np.abs(x) - half + 4, 0), y + 12) - 2.5, 6)
    light, alpha = lighting(rng, 0.05), edge(outside(x, y))

    def finish(body):
        shiny = blend(body * shade[..., None], (1.0, 1.0, 1.0), 0.55 * shine)
        return blend(table, shiny, alpha) * light

    geometry = {
        "part": alpha,
        "surface": outside(x, y) < -7,
        "x": x - mark_x,
        "y": y - mark_y,
        "unprinted": finish(body),
    }
    return finish(
        blend(body, (0.20, 0.20, 0.30), 0.9 * _print(x - mark_x, y - mark_y, 15))
    ), geometry


# Defects: (rng, image, geometry) -> image.


def stain(rng, image, geometry):
    """Soaks a dark brown blotch into the surface; the structure shows through."""
    amount = blotch(rng, pick(rng, geometry["surface"]), rng.uniform(7, 13), 4)
    return blend(image, image * (0.42, 0.33, 0.24), 0.95 * amount)


def hole(rng, image, geometry):
    """Tears a hole with a frayed rim."""
    centre, radius = pick(rng, geometry["surface"]), rng.uniform(6, 10)
    fray = 1.6 * smooth_noise(rng, 1.2)
    distance = np.hypot(Y - centre[0], (X - centre[1]) * rng.uniform(0.7, 1.3)) - radius + fray
    image = blend(image, (0.95, 0.93, 0.86), 0.7 * edge(np.abs(distance) - 1.0, 1.5))
    return blend(image, (0.05, 0.05, 0.06), edge(distance + 1))


def missing_thread(rng, image, geometry):
    """Leaves out a stretch of one weft thread: the dark gap and the warp below show."""
    y, x = pick(rng, geometry["surface"])
    row = geometry["weft_index"] == geometry["weft_index"][int(y), int(x)]
    stretch = edge(np.abs(X - x) - rng.uniform(18, 30))
    depth = np.where(geometry["weft_on_top"], 0.35, 0.75)
    below = geometry["warp"] * depth[..., None]
    return blend(image, below, row * stretch)


def scratch(rng, image, geometry):
    """Scores a thin pale line with a dark flank."""
    centre, angle = pick(rng, geometry["surface"]), rng.uniform(0.5, np.pi - 0.5)
    length, bend = rng.uniform(38, 66), rng.uniform(1, 4)
    distance, along = curve(rng, centre, length, angle, bend)
    reach = 1.0 - 0.5 * along**2
    part = geometry["part"]
    image = blend(image, image * 0.35, part * edge(distance - 2.0 * reach, 1.2))
    return blend(image, (0.98, 0.95, 0.88), part * edge(distance - 1.0 * reach))


def burn(rng, image, geometry):
    """Chars a spot: nearly black in the middle, brown around."""
    centre, radius = pick(rng, geometry["surface"]), rng.uniform(6, 10)
    image = blend(image, (0.30, 0.15, 0.07), 0.85 * blotch(rng, centre, radius, 5))
    return blend(image, (0.07, 0.05, 0.04), 0.9 * blotch(rng, centre, 0.6 * radius, 4))


def chip(rng, image, geometry):
    """Breaks a splinter out along the grain: raw pale wood, shadow on its upper edge."""
    y, x = pick(rng, geometry["surface"])
    half_length, half_height = rng.uniform(14, 24), rng.uniform(3.5, 6)
    ragged = 1 + 0.12 * smooth_noise(rng, (1.0, 3.0))
    inside = np.hypot((X - x) / half_length, (Y - y) / half_height) * ragged
    image = blend(image, (0.97, 0.88, 0.70), edge(inside - 1, 0.15))
    shadow = edge(inside - 1, 0.15) * edge(Y - y + 0.45 * half_height, 1.5)
    return blend(image, (0.28, 0.17, 0.09), shadow)


def nick(rng, image, geometry):
    """Bites a piece out of the outer or the inner rim: the mat shows."""
    bite = blotch(rng, pick(rng, geometry["rims"]), rng.uniform(7, 11), 1)
    return blend(image, geometry["behind"], bite)


def rust(rng, image, geometry):
    """Rusts a mottled spot."""
    spot = blotch(rng, pick(rng, geometry["surface"]), rng.uniform(6, 10), 3)
    spot = spot * geometry["part"]
    mottle = np.clip(0.5 + 0.35 * smooth_noise(rng, 1.3), 0, 1)[..., None]
    return blend(image, (1 - mottle) * (0.30, 0.13, 0.06) + mottle * (0.68, 0.34, 0.12), spot)


def fibre(rng, image, geometry):
    """Drops a coloured thread on the part, with its shadow."""
    centre, angle = pick(rng, geometry["surface"]), rng.uniform(0, np.pi)
    distance, _ = curve(rng, centre, rng.uniform(36, 54), angle, rng.uniform(5, 9))
    image = blend(image, image * 0.45, 0.9 * edge(ndimage.shift(distance, (2, 2), mode="nearest")))
    return blend(image, (0.12, 0.42, 0.30), edge(distance - 1.5))


def crack(rng, image, geometry):
    """Cracks the shell: a dark jagged line."""
    centre, angle = pick(rng, geometry["surface"]), rng.uniform(0.6, np.pi - 0.6)
    distance, along = curve(rng, centre, rng.uniform(32, 44), angle, 2.0, jag=2.0)
    reach = 2.2 * (1 - 0.8 * np.abs(along))
    return blend(image, (0.10, 0.07, 0.06), geometry["part"] * edge(distance - reach))


def misprint(rng, image, geometry):
    """Prints the mark askew and off its place."""
    angle = rng.choice([-1, 1]) * rng.uniform(0.5, 1.2)
    x, y = geometry["x"] + rng.uniform(-2, 7), geometry["y"] + rng.uniform(-4, 4)
    x, y = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    return blend(geometry["unprinted"], (0.18, 0.17, 0.25), 0.85 * _print(x, y, 15))


CATEGORIES: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "weave": (weave, {"hole": hole, "missing_thread": missing_thread, "stain": stain}),
    "grain": (grain, {"burn": burn, "chip": chip, "scratch": scratch}),
    "washer": (washer, {"nick": nick, "rust": rust, "scratch": scratch}),
    "capsule": (capsule, {"crack": crack, "fibre": fibre, "misprint": misprint}),
    **patterns.CATEGORIES,
}


# Examples.


def defect_type_of(category: str, split: str, index: int) -> str:
    """Returns "good" or the name of the defect of one example."""
    if split == "train" or index < NUM_EXAMPLES[f"{split}_good"]:
        return "good"
    names = sorted(CATEGORIES[category][1])
    return names[(index - NUM_EXAMPLES[f"{split}_good"]) % len(names)]


def draw(category: str, split: str, index: int) -> dict:
    """Draws one example.

    Args:
      category: a key of `CATEGORIES`.
      split: "train", "test" or "new".
      index: from 0; from `NUM_EXAMPLES["test_good"]` on, test examples are defective, and new ones
        from `NUM_EXAMPLES["new_good"]` on.

    Returns:
      `image` uint8 `[128, 128, 3]`; `twin`, the same part without the defect; `mask` bool
      `[128, 128]`, where the two differ; `label` 0 or 1; `defect_type` and `name`, strings.
    """
    seed = (_SEED, list(CATEGORIES).index(category), SPLITS.index(split), index)
    part_rng, defect_rng, noise_rng = (np.random.default_rng((*seed, use)) for use in range(3))
    draw_part, defects = CATEGORIES[category]
    part, geometry = draw_part(part_rng)
    noise = 0.008 * noise_rng.standard_normal(part.shape)
    defect_type = defect_type_of(category, split, index)
    twin = image = _expose(part, noise)
    mask = np.zeros((SIZE, SIZE), bool)
    # Most drawings fit at once; those near a corner of the image may be too small.
    while defect_type != "good" and not SMALLEST <= mask.mean() <= LARGEST:
        changed = defects[defect_type](defect_rng, part, geometry)
        visible = np.abs(np.clip(changed, 0, 1) - np.clip(part, 0, 1)).max(axis=-1) > VISIBLE
        # Closed and filled, because a stain over a dark gap is still one stain.
        region = ndimage.binary_closing(visible, iterations=2) | visible
        region = ndimage.binary_fill_holes(region)
        image = np.where(region[..., None], _expose(changed, noise), twin)
        mask = (image != twin).any(axis=-1)
    folder = f"{split}/{defect_type}"
    return {
        "image": image,
        "twin": twin,
        "mask": mask,
        "label": int(defect_type != "good"),
        "defect_type": defect_type,
        "name": f"{folder}/{index:03}.png",
    }


def _expose(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(image + noise, 0, 1)).astype(np.uint8)


def examples(category: str, split: str) -> Iterator[dict]:
    """Yields all examples of a split, as `draw` returns them."""
    if split == "train":
        number = NUM_EXAMPLES["train"]
    else:
        number = NUM_EXAMPLES[f"{split}_good"] + NUM_EXAMPLES[f"{split}_defective"]
    for index in range(number):
        yield draw(category, split, index)


def write(out: Path, category: str) -> None:
    """Writes a category as PNG files in the MVTec AD folder layout, into `out`/`category`."""
    for split in ("train", "test"):
        for example in examples(category, split):
            path = out / category / example["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(example["image"]).save(path)
            if example["label"]:
                folder = out / category / "ground_truth" / example["defect_type"]
                folder.mkdir(parents=True, exist_ok=True)
                mask = Image.fromarray(np.uint8(255) * example["mask"])
                mask.save(folder / f"{path.stem}_mask.png")


def write_new(out: Path, category: str) -> None:
    """Writes the new parts of a category as PNG files into `out`/`category`, without masks."""
    (out / category).mkdir(parents=True, exist_ok=True)
    for index, example in enumerate(examples(category, "new")):
        name = f"{index}_{example['defect_type']}.png"
        Image.fromarray(example["image"]).save(out / category / name)


def main() -> None:
    """Runs `python -m data.synthetic_ad.drawing --out DIR`."""
    parser = argparse.ArgumentParser(description="Writes the data set in the MVTec AD layout.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the category folders")
    parser.add_argument("--new", type=Path, help="folder for a few more, in neither train nor test")
    parser.add_argument("--categories", default=",".join(CATEGORIES), help="default: %(default)s")
    args = parser.parse_args()
    for category in args.categories.split(","):
        if category not in CATEGORIES:
            parser.error(f"no category {category!r}; there are {', '.join(CATEGORIES)}")
        write(args.out, category)
        print(args.out / category)
        if args.new:
            write_new(args.new, category)
            print(args.new / category)


if __name__ == "__main__":
    main()
