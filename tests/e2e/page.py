"""Label Studio's labelling page in Chromium; selectors as found in release 1.23.2."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_STAGE = ".konvajs-content canvas"
_AUTO_ANNOTATION = "[data-testid=bottombar-auto-annotation-toggle]"
_SMART_GROUP = ".lsf-toolbar > .lsf-toolbar__group > button.lsf-tool_smart"
_SMART_TOOL = '.lsf-toolbar__smart button.lsf-tool_smart[aria-label="{}"]'
_ACCEPT = "[data-testid=bottombar-accept-suggestions-button]"
_SUBMIT = "[data-testid=bottombar-submit-button]"
_IMAGE_IS_LOADED = """() => {
    const annotation = window.Htx && window.Htx.annotationStore.selected;
    const image = annotation && [...annotation.names.values()].find(tag => tag.type === 'image');
    return image && image.naturalWidth > 1;
}"""
# The image is drawn scaled and shifted inside its stage; the hidden <img> has the same box.
_IMAGE_BOX = """() => {
    const boxes = [...document.querySelectorAll('img')]
        .filter(e => e.src.startsWith('blob:') || e.src.includes('/data/'))
        .map(e => e.getBoundingClientRect()).sort((a, b) => b.width - a.width);
    return [boxes[0].x, boxes[0].y, boxes[0].width, boxes[0].height];
}"""
_SUGGESTIONS = "() => window.Htx.annotationStore.selected.suggestions.size"
_REGION_IDS = "() => [...window.Htx.annotationStore.selected.areas.values()].map(r => r.cleanId)"
_IDLE = "() => !window.Htx.awaitingSuggestions"


class LabellingPage:
    """One task on the labelling page, as an annotator uses it."""

    def __init__(self, page: Any, url: str, *, screenshots: Path, name: str) -> None:
        self.page = page
        self.url = url
        self.seconds: list[float] = []
        """From the end of each drawing to its suggestion on the screen."""
        self._screenshots = screenshots
        self._name = name
        self._shots = 0
        self._sent: list[dict[str, Any]] = []
        page.on("request", self._remember)

    def _remember(self, request: Any) -> None:
        if "interactive-annotating" in request.url:
            self._sent.append(json.loads(request.post_data))

    def log_in(self, email: str, password: str) -> None:
        self.page.goto(f"{self.url}/user/login/")
        self.page.fill("input[name=email]", email)
        self.page.fill("input[name=password]", password)
        self.page.click("button[type=submit]")
        self.page.wait_for_url(lambda url: "/user/login" not in url)

    def open(self, project_id: int, task_id: int) -> None:
        self.page.goto(f"{self.url}/projects/{project_id}/data?task={task_id}")
        self.page.wait_for_selector(_STAGE)
        self.page.wait_for_function(_IMAGE_IS_LOADED)
        toggle = self.page.locator(_AUTO_ANNOTATION)
        if not toggle.is_checked():
            self.page.locator(f"label:has({_AUTO_ANNOTATION})").click()
        self.page.wait_for_selector(_SMART_GROUP)

    def choose(self, tool: str) -> None:
        """Choose a smart tool: `key-point-tool` or `rectangle-tool`."""
        self.page.mouse.move(700, 20)
        self.page.locator(_SMART_GROUP).hover()  # a click would change the tool instead
        self.page.locator(_SMART_TOOL.format(tool)).click()
        self.page.mouse.move(700, 20)

    def label(self, index: int) -> None:
        """Choose a label, counted over all tags; Label Studio forgets it after each region."""
        label = self.page.locator(".lsf-label").nth(index)
        if "lsf-label_selected" not in (label.get_attribute("class") or ""):
            label.click()
        self.page.wait_for_function(
            "index => document.querySelectorAll('.lsf-label')[index]"
            ".className.includes('lsf-label_selected')",
            arg=index,
        )

    def click(self, xy_percent: tuple[float, float], *, alt: bool = False) -> list[dict[str, Any]]:
        """Click on the image; returns the prompts that the page sent."""
        x, y = self._page_xy(xy_percent)
        with self._suggested():
            if alt:
                self.page.keyboard.down("Alt")
            self.page.mouse.move(x, y)
            self.page.mouse.click(x, y)
            if alt:
                self.page.keyboard.up("Alt")
        return self._sent[-1]["context"]["result"]

    def drag(
        self, start_percent: tuple[float, float], end_percent: tuple[float, float]
    ) -> list[dict[str, Any]]:
        """Drag a rectangle over the image; returns the prompts that the page sent."""
        (left, top), (right, bottom) = self._page_xy(start_percent), self._page_xy(end_percent)
        with self._suggested():
            self.page.mouse.move(left, top)
            self.page.mouse.down()
            self.page.mouse.move((left + right) / 2, (top + bottom) / 2, steps=4)
            self.page.mouse.move(right, bottom, steps=4)
            self.page.mouse.up()
        return self._sent[-1]["context"]["result"]

    def region_ids(self) -> set[str]:
        """The ids of the regions that are accepted."""
        return set(self.page.evaluate(_REGION_IDS))

    def accept(self) -> None:
        self.page.click(_ACCEPT)
        self.page.wait_for_function(f"() => ({_SUGGESTIONS})() === 0")

    def submit(self) -> int:
        """Submit; returns the status that Label Studio answered."""
        with self.page.expect_response(
            lambda response: (
                "/annotations" in response.url and response.request.method in ("POST", "PATCH")
            )
        ) as info:
            self.page.click(_SUBMIT)
        return int(info.value.status)

    def image_pixels(self) -> np.ndarray:
        """What the screen shows where the image is, [H, W, 3] uint8."""
        x, y, width, height = self.page.evaluate(_IMAGE_BOX)
        clip = {"x": x, "y": y, "width": width, "height": height}
        return np.asarray(Image.open(BytesIO(self.page.screenshot(clip=clip))).convert("RGB"))

    def screenshot(self, what: str) -> None:
        self._shots += 1
        path = self._screenshots / f"{self._name}_{self._shots:02d}_{what}.png"
        self.page.screenshot(path=str(path))

    @contextmanager
    def _suggested(self) -> Any:
        """Wait until the drawing made inside the block is answered and shown."""
        with self.page.expect_response(lambda r: "interactive-annotating" in r.url) as info:
            yield
            started = time.perf_counter()
        assert info.value.status == 200, info.value.text()
        self.page.wait_for_function(_IDLE)
        self.page.wait_for_function(f"() => ({_SUGGESTIONS})() > 0")
        # What was set is drawn in the frame after the next.
        self.page.evaluate(
            "() => new Promise(done => "
            "requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
        )
        self.seconds.append(time.perf_counter() - started)

    def _page_xy(self, xy_percent: tuple[float, float]) -> tuple[float, float]:
        x, y, width, height = self.page.evaluate(_IMAGE_BOX)
        return x + width * xy_percent[0] / 100, y + height * xy_percent[1] / 100
