"""What a labelling config offers: the images, the tags to prompt with, the tags to answer into.

Label Studio sends the config as XML with every request. Tag and attribute names are compared as its
page does, without regard to case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from ml_backend.errors import LabelConfigError

__all__ = ["Control", "ImageTag", "Kind", "LabelConfig", "parse_label_config"]

Kind = Literal["brush", "bitmask", "polygon", "rectangle", "ellipse", "keypoint", "labels"]

_TAGS: dict[str, Kind] = {
    "brush": "brush",
    "brushlabels": "brush",
    "bitmask": "bitmask",
    "bitmasklabels": "bitmask",
    "polygon": "polygon",
    "polygonlabels": "polygon",
    "rectangle": "rectangle",
    "rectanglelabels": "rectangle",
    "ellipse": "ellipse",
    "ellipselabels": "ellipse",
    "keypoint": "keypoint",
    "keypointlabels": "keypoint",
    "labels": "labels",
}
_PROMPTS: tuple[Kind, ...] = ("keypoint", "rectangle", "ellipse")
_OUTPUTS: tuple[Kind, ...] = ("brush", "bitmask", "polygon", "rectangle")


@dataclass(frozen=True, kw_only=True)
class ImageTag:
    """An `<Image>` tag."""

    name: str
    """What controls and regions call it (`toName`, `to_name`)."""
    value_key: str
    """The field of `task.data` with the address: `image` for `value="$image"`."""
    is_list: bool = False
    """The field holds a list of addresses (`valueList`); regions then carry an `item_index`."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A control tag: what draws regions, or labels them."""

    name: str
    """What regions call it (`from_name`)."""
    kind: Kind
    """What it draws; `labels` for a `<Labels>` tag, which labels what unlabelled tags drew."""
    to_names: tuple[str, ...]
    """The `<Image>` tags it works on."""
    result_type: str
    """The `type` of its regions: the tag's name in lower case."""
    value_key: str | None
    """Where the region's `value` holds the labels; None for a tag without labels of its own."""
    labels: tuple[str, ...] = ()
    """The labels as regions carry them: a label's alias, or else its value."""
    label_values: tuple[str, ...] = ()
    """The same labels as the annotator sees them: their values."""
    has_dynamic_labels: bool = False
    """The labels come from the task (`value="$labels"`), so any label may be one of them."""
    smart: bool = False
    """Asked for as a smart tool (`smart="true"` or `smartOnly="true"`), that is, for prompting."""

    def has_label(self, label: str) -> bool:
        """Say whether a region of this tag may carry the label."""
        return self.has_dynamic_labels or label in self.labels


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """A labelling config, as far as image regions go."""

    images: tuple[ImageTag, ...]
    """The `<Image>` tags, at least one, in the order of the config."""
    controls: tuple[Control, ...]
    """The control tags that work on an image, in the order of the config; possibly none."""

    def find_control(self, name: str) -> Control | None:
        """Look a control tag up by its name."""
        return next((control for control in self.controls if control.name == name), None)

    def find_image(self, name: str) -> ImageTag | None:
        """Look an `<Image>` tag up by its name."""
        return next((image for image in self.images if image.name == name), None)

    def prompts_for(self, image_name: str) -> tuple[Control, ...]:
        """List the tags that an annotator can prompt with on this image."""
        return tuple(c for c in self._controls_of(image_name) if c.kind in _PROMPTS)

    def outputs_for(
        self,
        image_name: str,
        *,
        labels: Sequence[str] = (),
        wanted: Sequence[str] | None = None,
    ) -> tuple[Control, ...]:
        """Choose the tags that a mask is answered into: at most one of each kind.

        Of several tags of one kind it is the first that has all the labels, or else the first.

        Args:
            image_name: The `<Image>` tag's name.
            labels: The labels of the object, as the prompt's region carries them.
            wanted: The kinds to return, out of brush, bitmask, polygon and rectangle. None means
                all, but rectangle only where the tag is no smart tool: that one is there to draw
                prompts with, and a rectangle beside every mask would be in the way. If the config
                has nothing but such rectangles, they are what is answered.

        Returns:
            The tags: brush first, then bitmask, polygon and rectangle.

        Raises:
            LabelConfigError: If the config has no tag to answer into, or none of a wanted kind.
        """
        candidates = [c for c in self._controls_of(image_name) if c.kind in _OUTPUTS]
        if wanted is not None:
            candidates = [c for c in candidates if c.kind in wanted]
        else:
            plain = [c for c in candidates if c.kind != "rectangle" or not c.smart]
            candidates = plain or candidates
        if not candidates:
            tags = ", ".join(f"<{kind.capitalize()}Labels>" for kind in wanted or _OUTPUTS)
            got = ", ".join(c.result_type for c in self._controls_of(image_name)) or "none"
            raise LabelConfigError(
                f'the labelling config must have a tag with toName="{image_name}" to answer into, '
                f"one of {tags}, got {got}; add one, or change SAM_OUTPUT"
            )
        chosen = []
        for kind in _OUTPUTS:
            same = [c for c in candidates if c.kind == kind]
            fitting = [c for c in same if self._has_all(c, labels)]
            chosen += (fitting or same)[:1]
        return tuple(chosen)

    def can_carry(self, image_name: str, *, label: str) -> bool:
        """Say whether a mask on this image can be answered with a label; the empty one is none."""
        kinds = {control.kind for control in self._controls_of(image_name)}
        labelled = (*_OUTPUTS, "labels")
        return not kinds.isdisjoint(_OUTPUTS) and (
            not label
            or any(
                self.resolve_label(control, label) is not None
                for control in self._controls_of(image_name)
                if control.kind in labelled
            )
        )

    def labels_tag_for(self, image_name: str, *, labels: Sequence[str]) -> Control | None:
        """Choose the `<Labels>` tag that labels what a tag without labels drew.

        Returns:
            The first on this image that has all the labels; None if there is none.
        """
        tags = (c for c in self._controls_of(image_name) if c.kind == "labels")
        return next((tag for tag in tags if self._has_all(tag, labels)), None)

    def resolve_label(self, control: Control, label: str) -> str | None:
        """Translate a label, as some other tag's region carries it, into the control's own.

        The same label may have an alias in one tag and not in the other; then the value that the
        annotator sees, `value`, tells that they are the same.

        Returns:
            The label for the control's region; None if the control has no such label.
        """
        if control.has_label(label):
            return label
        shown = {
            value
            for other in self.controls
            for carried, value in zip(other.labels, other.label_values, strict=True)
            if carried == label
        }
        own = zip(control.labels, control.label_values, strict=True)
        return next((carried for carried, value in own if value in shown | {label}), None)

    def _controls_of(self, image_name: str) -> list[Control]:
        return [control for control in self.controls if image_name in control.to_names]

    def _has_all(self, control: Control, labels: Sequence[str]) -> bool:
        return all(self.resolve_label(control, label) is not None for label in labels)


@lru_cache(maxsize=128)  # every request brings the text again
def parse_label_config(xml: str) -> LabelConfig:
    """Read a labelling config.

    Tags that draw no region on an image (text, choices, video, ...) are left out. A document type
    is refused, so no entity is ever expanded.

    Args:
        xml: The config as Label Studio sends it: `label_config` of a predict request.

    Returns:
        The config; the same object for the same text.

    Raises:
        LabelConfigError: If the text is not XML, has a document type, has no `<Image>` tag, or has
            one without a name or an address.
    """
    elements = list(_parse_xml(xml).iter())
    images = tuple(_image_tag(e) for e in elements if e.tag.lower() == "image")
    if not images:
        raise LabelConfigError(
            "the labelling config must have an <Image> tag, "
            f"got {', '.join(dict.fromkeys(e.tag for e in elements))}; "
            'add <Image name="image" value="$image"/>'
        )
    names = {image.name for image in images}
    controls = (_control(e) for e in elements if e.tag.lower() in _TAGS)
    return LabelConfig(
        images=images,
        controls=tuple(c for c in controls if c.name and not names.isdisjoint(c.to_names)),
    )


def _parse_xml(xml: str) -> Element:
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_doctype
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    try:
        parser.Parse(xml, True)
    except (expat.ExpatError, UnicodeError) as error:  # UnicodeError: half of a surrogate pair
        raise LabelConfigError(
            f"the labelling config must be XML, got {xml[:80]!r} ({error}); "
            "copy it from the project's labelling interface settings"
        ) from error
    return builder.close()


def _refuse_doctype(*_declaration: object) -> None:
    raise LabelConfigError(
        "the labelling config must be plain tags, got a <!DOCTYPE ...>; remove the document type"
    )


def _attributes(element: Element) -> dict[str, str]:
    return {name.lower(): value for name, value in element.attrib.items()}


def _image_tag(element: Element) -> ImageTag:
    attributes = _attributes(element)
    name = attributes.get("name")
    value = attributes.get("value")
    value_list = attributes.get("valuelist")
    address = value or value_list
    if not name or not address:
        missing = "an address" if name else "a name"
        raise LabelConfigError(
            f"the labelling config's <Image> tag must have a name and an address, got one without "
            f'{missing}; write it as <Image name="image" value="$image"/>'
        )
    return ImageTag(name=name, value_key=address.removeprefix("$"), is_list=not value)


def _control(element: Element) -> Control:
    attributes = _attributes(element)
    result_type = element.tag.lower()
    shown_by_label: dict[str, str] = {}
    for child in element.iter():
        if child.tag.lower() == "label":
            label = _attributes(child)
            value = label.get("value", "")
            if carried := label.get("alias") or value:
                shown_by_label.setdefault(carried, value)
    return Control(
        name=attributes.get("name", ""),
        kind=_TAGS[result_type],
        to_names=tuple(part.strip() for part in attributes.get("toname", "").split(",")),
        result_type=result_type,
        value_key=result_type if result_type.endswith("labels") else None,
        labels=tuple(shown_by_label),
        label_values=tuple(shown_by_label.values()),
        has_dynamic_labels=attributes.get("value", "").startswith("$"),
        smart="true" in (attributes.get("smart", ""), attributes.get("smartonly", "")),
    )
