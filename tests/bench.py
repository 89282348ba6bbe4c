"""How fast embeddings and clicks are, and how much memory many images take.

    make bench  or  python -m tests.bench [--only embed,decode,clicks,restart,memory] [--quick]

It prints a table and writes the same to bench.json. Only on a machine that does nothing else do the
figures say something. `--quick` shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import requests
import torch
from rich.console import Console

from ml_backend.loading import load_predictor
from ml_backend.settings import load_settings
from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.config import MODELS
from sam_ext.evaluate.common import box_prompt, print_rows
from sam_ext.evaluate.records import machine_facts
from sam_ext.predictor import Predictor
from sam_ext.resolution import default_policy
from sam_ext.sam import Sam, build_sam
from sam_ext.stable_sam import StableSam
from tests.ml_backend.backend import encoded, payload, random_image, setup_body
from tests.ml_backend.servers import Answer, FakeLabelStudio
from tests.ml_backend.test_concurrency import Gunicorn, gunicorn

# isort: split
from segment_anything import SamPredictor  # which sam_ext.sam makes importable

EMBED_SIZES_HW = ((768, 1024), (384, 512), (1536, 2048))
CLICK_SIZE_HW = (768, 1024)
# Images smaller than ViT-B's training side are not enlarged to it, as they are by default.
NATIVE = {"SAM_RESOLUTION": "native:512-1024"}
MEMORY_SIZES_HW = ((384, 512), (512, 384), (400, 480), (320, 512))
BARS = {
    "embed 1024x768": "ratio >= 4",
    "embed 512x384": "ratio >= 20",
    "decode 1 box, with plugin": "ratio <= 1.2",
    "decode 16 boxes, with plugin": "ratio <= 1.2",
    "click, 8 annotators": "median <= 60, p99 <= 150",
    "click, 8 annotators, while encoding": "p99 <= 300",
    "first click after a restart": "median <= 200",
    "memory after 300 images": "ratio <= 1.05",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    unit: str
    runs: int
    median: float
    p99: float
    ratio: float | None = None
    """How many times faster than segment-anything; with a plugin, how many times the time without;
    of memory, how many times what it was."""
    bar: str | None = None
    """What this project wants it to be."""


def row(name: str, unit: str, values: Sequence[float], *, ratio: float | None = None) -> Row:
    return Row(
        name=name,
        unit=unit,
        runs=len(values),
        median=round(float(np.median(values)), 1),
        p99=round(float(np.percentile(values, 99)), 1),
        ratio=None if ratio is None else round(ratio, 3),
        bar=BARS.get(name),
    )


def embed_rows(model: Path, *, sizes_hw: Sequence[tuple[int, int]], repeats: int) -> list[Row]:
    """Ours, at native size, and segment-anything's in single precision, in turns."""
    environ = {"SAM_MODEL": str(model), "SAM_DEVICE": "cpu"} | NATIVE
    ours = load_predictor(load_settings(environ))
    theirs = SamPredictor(load_sam(str(model), weights_dir=model.parent))
    images = {size_hw: np.asarray(random_image(0, size_hw=size_hw)) for size_hw in sizes_hw}
    for image in images.values():
        ours.embed(image)
    with torch.inference_mode():
        theirs.set_image(images[sizes_hw[0]])
    times: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
    for _ in range(repeats):
        for size_hw, image in images.items():
            mine, other = times.setdefault(size_hw, ([], []))
            mine.append(milliseconds(lambda image=image: ours.embed(image)))
            with torch.inference_mode():
                other.append(milliseconds(lambda image=image: theirs.set_image(image)))
    rows = []
    for (height, width), (mine, other) in times.items():
        name = f"embed {width}x{height}"
        ratio = float(np.median(other) / np.median(mine))
        rows.append(row(name, "ms", mine, ratio=ratio))
        rows.append(row(f"{name}, segment-anything", "ms", other))
    return rows


def decode_rows(model: Path, *, counts: Sequence[int], repeats: int) -> list[Row]:
    """Boxes to masks on one image, as served, with Stable-SAM's plugin and without, in turns."""
    sam = load_sam(str(model), weights_dir=model.parent)
    policy = default_policy(sam.image_encoder.img_size)
    torch.manual_seed(0)
    plugin = StableSam()
    torch.nn.init.normal_(plugin.offset.weight, std=0.1)  # or nothing would be shifted
    predictors = {
        "": Predictor(sam, policy=policy, precision="auto"),
        ", with plugin": Predictor(sam, policy=policy, precision="auto", stable_sam=plugin.eval()),
    }
    image = np.asarray(random_image(0, size_hw=CLICK_SIZE_HW))
    embedding = predictors[""].embed(image)
    height, width = CLICK_SIZE_HW
    rows = []
    for count in counts:
        boxes = [
            np.array([0.1, 0.1, 0.3 + 0.03 * i, 0.4 + 0.03 * i]) * (width, height, width, height)
            for i in range(count)
        ]
        prompts = [box_prompt(box) for box in boxes]
        times: dict[str, list[float]] = {name: [] for name in predictors}
        for turn in range(repeats + 1):
            for name, predictor in predictors.items():
                elapsed = milliseconds(
                    lambda p=predictor, asked=prompts: p.decode(embedding, asked)
                )
                if turn:  # the first is not like the others
                    times[name].append(elapsed)
        base = float(np.median(times[""]))
        title = f"decode {count} box{'es'[: 2 * (count > 1)]}"
        for name, values in times.items():
            ratio = float(np.median(values)) / base if name else None
            rows.append(row(title + name, "ms", values, ratio=ratio))
    return rows


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


class Clicks:
    """A served backend, images that it has never seen, and clicks on them."""

    def __init__(self, server: Gunicorn, label_studio: FakeLabelStudio) -> None:
        self.server = server
        self._label_studio = label_studio
        self._random = random.Random(0)
        self._sizes_hw: dict[str, tuple[int, int]] = {}
        label_studio.legacy_tokens_enabled = True
        answer = server.post("/setup", setup_body(payload("10"), label_studio.url))
        assert answer.ok, answer.text

    def new_image(self, seed: int, size_hw: tuple[int, int]) -> str:
        path = f"/data/upload/5/bench-{seed}.jpg"
        self._sizes_hw[path] = size_hw
        self._label_studio.routes[path] = Answer(
            encoded(random_image(seed, size_hw=size_hw), "JPEG")
        )
        return path

    def click(self, path: str) -> float:
        """Click somewhere in an image; how many milliseconds the regions took to come."""
        body = payload("10")
        body["tasks"][0]["data"]["image"] = path
        body["tasks"][0]["id"] = int(re.findall(r"\d+", path)[-1])
        [region] = body["params"]["context"]["result"]
        region |= dict(
            zip(("original_height", "original_width"), self._sizes_hw[path], strict=True)
        )
        region["value"] |= {axis: self._random.uniform(5, 95) for axis in "xy"}
        started = time.perf_counter()
        answer = self.server.post("/predict", body)
        elapsed = 1000 * (time.perf_counter() - started)
        assert answer.ok, "".join(self.server.log[-30:])
        return elapsed

    def load(self, paths: Sequence[str], *, annotators: int, seconds: float) -> list[float]:
        """Let annotators click once a second each, not all in the same moment."""
        started = time.perf_counter()

        def annotate(index: int) -> list[float]:
            times = []
            for number in range(max(1, round(seconds))):
                due = started + number + index / annotators
                time.sleep(max(0.0, due - time.perf_counter()))
                times.append(self.click(paths[index % len(paths)]))
            return times

        with ThreadPoolExecutor(annotators) as pool:
            return [one for times in pool.map(annotate, range(annotators)) for one in times]


@contextmanager
def clicking(model: Path, data_dir: Path, **variables: str) -> Iterator[Clicks]:
    with FakeLabelStudio() as label_studio, gunicorn(data_dir, model, **variables) as server:
        yield Clicks(server, label_studio)


def click_rows(
    model: Path, data_dir: Path, *, annotators: Sequence[int], busy: int, seconds: float
) -> list[Row]:
    """Clicks on embedded images: by more and more annotators, and while others are encoded."""
    rows = []
    with clicking(model, data_dir) as clicks:
        paths = [clicks.new_image(index, CLICK_SIZE_HW) for index in range(4)]
        first = [clicks.click(path) for path in paths]
        rows.append(row("first click on a new image", "ms", first))
        for count in annotators:
            times = clicks.load(paths, annotators=count, seconds=seconds)
            rows.append(row(f"click, {count} annotator{'s'[: count > 1]}", "ms", times))
        stop = threading.Event()

        def keep_encoding() -> list[float]:
            times = []
            while not stop.is_set():
                times.append(clicks.click(clicks.new_image(100 + len(times), CLICK_SIZE_HW)))
            return times

        with ThreadPoolExecutor(1) as pool:
            encoding = pool.submit(keep_encoding)
            try:
                times = clicks.load(paths, annotators=busy, seconds=seconds)
            finally:
                stop.set()
            meanwhile = encoding.result()
        rows.append(row(f"click, {busy} annotators, while encoding", "ms", times))
        rows.append(row("first click on a new image, meanwhile", "ms", meanwhile))
    return rows


def restart_rows(model: Path, data_dir: Path, *, repeats: int) -> list[Row]:
    """The first click of a process on an image that an earlier one has seen."""
    healthy, first = [], []
    with FakeLabelStudio() as label_studio:
        with gunicorn(data_dir, model) as server:
            clicks = Clicks(server, label_studio)
            path = clicks.new_image(0, CLICK_SIZE_HW)
            clicks.click(path)
        for _ in range(repeats):
            started = time.perf_counter()
            with gunicorn(data_dir, model) as server:
                assert requests.get(f"{server.url}/health", timeout=600).ok
                healthy.append(1000 * (time.perf_counter() - started))
                clicks.server = server
                first.append(clicks.click(path))
    return [
        row("restart to healthy", "ms", healthy),
        row("first click after a restart", "ms", first),
    ]


def memory_rows(model: Path, data_dir: Path, *, images: int, reference: int) -> list[Row]:
    """What all processes of the backend hold, with caches that are full long before `reference`."""
    bounds = {"EMBEDDING_CACHE_BYTES": str(4 << 20), "IMAGE_CACHE_BYTES": str(1 << 20)}
    memory = []
    with clicking(model, data_dir, **NATIVE, **bounds) as clicks:
        for seed in range(images):
            clicks.click(clicks.new_image(seed, MEMORY_SIZES_HW[seed % len(MEMORY_SIZES_HW)]))
            memory.append(resident_mb(clicks.server.process.pid))
    return [
        row(f"memory after {reference} images", "MB", memory[reference - 1 : reference]),
        row(
            f"memory after {images} images",
            "MB",
            memory[-1:],
            ratio=memory[-1] / memory[reference - 1],
        ),
    ]


def resident_mb(pid: int) -> float:
    """Resident memory of a process and all its children; Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(resident_mb(int(child)) for child in children)


def vit_b() -> Sam:
    """ViT-B with random weights, and `tiny`'s decoder: its masks have outlines, as real ones do.

    Noise instead would take far longer to be written as regions.
    """
    torch.manual_seed(0)
    sam, tiny = build_sam(MODELS["vit_b"]), load_sam("tiny", weights_dir=Path())
    sam.prompt_encoder.load_state_dict(tiny.prompt_encoder.state_dict())
    sam.mask_decoder.load_state_dict(tiny.mask_decoder.state_dict())
    torch.nn.init.constant_(sam.image_encoder.neck[-1].weight, 0.1)
    return sam


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", default="embed,decode,clicks,restart,memory", metavar="PART,...")
    parser.add_argument("--checkpoint", help="instead of a ViT-B with random weights")
    parser.add_argument("--quick", action="store_true", help="few runs: do they work at all?")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    options = parser.parse_args(arguments)
    quick: bool = options.quick
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "vit_b.safetensors"
        if options.checkpoint is None:
            save_checkpoint(vit_b(), model)
        else:
            model = Path(options.checkpoint)
        parts: dict[str, Callable[[Path], list[Row]]] = {
            "embed": lambda _: embed_rows(
                model,
                sizes_hw=EMBED_SIZES_HW[:2] if quick else EMBED_SIZES_HW,
                repeats=1 if quick else 5,
            ),
            "decode": lambda _: decode_rows(model, counts=(1, 16), repeats=2 if quick else 20),
            "clicks": lambda data_dir: click_rows(
                model,
                data_dir,
                annotators=(1, 8) if quick else (1, 2, 4, 8, 16),
                busy=8,
                seconds=3 if quick else 20,
            ),
            "restart": lambda data_dir: restart_rows(model, data_dir, repeats=1 if quick else 5),
            "memory": lambda data_dir: memory_rows(
                model, data_dir, images=8 if quick else 300, reference=4 if quick else 50
            ),
        }
        wanted = options.only.split(",")
        if unknown := set(wanted) - set(parts):
            parser.error(f"--only must be some of {','.join(parts)}, got {','.join(unknown)}")
        rows: list[Row] = []
        for name in wanted:
            rows += parts[name](Path(folder) / name)
            # After each part, as all of them take long.
            content = {"machine": facts, "rows": [asdict(one) for one in rows]}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
            print_rows(rows)
    said = ", ".join(f"{name}: {value}" for name, value in facts.items())
    Console().print(said, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
