"""Drawings of the architecture page, and of blocks that join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from documentation.pictures import draw_unfreezing, layout
from finetune_trainer.contract.schedule import UnfreezeSchedule
from finetune_trainer.contract.selection import LayerSelection, resolve_blocks

STEPS = 1000


def unfreezing() -> str:
    """Four blocks that join from the top."""
    schedule = UnfreezeSchedule(every=200)
    blocks = schedule.ordered(resolve_blocks(LayerSelection(last=4), layout().block_count))
    return draw_unfreezing(
        lambda step: schedule.joined(len(blocks), step, 0.0),
        blocks,
        STEPS,
        "layers: {last: 4, unfreeze: {every: 200}}",
    )


@dataclass(frozen=True, slots=True)
class Box:
    """A part of the system."""

    name: str
    lines: Sequence[str]
    x: int
    y: int


WIDTH, HEIGHT = 190, 66
_BOLD = ' font-weight="bold"'
BOXES = (
    Box("user", ("kubectl, Argo CD, Flux", "writes the spec"), 10, 20),
    Box("job", ("FineTuneJob", "spec: the user's", "status: the operator's"), 270, 20),
    Box("operator", ("operator", "plan, render, decide", "one status patch"), 270, 150),
    Box("children", ("ConfigMap, PyTorchJob", "one pair an attempt"), 530, 20),
    Box("kubeflow", ("training operator", "makes the pods"), 530, 150),
    Box("pods", ("trainer pods", "launcher, finetune_trainer"), 530, 280),
    Box("store", ("object storage", "checkpoints, result,", "manifest.json last"), 270, 280),
)
ARROWS = (
    ("user", "job", "apply"),
    ("job", "operator", "watch"),
    ("operator", "children", "create"),
    ("children", "kubeflow", "watch"),
    ("kubeflow", "pods", "create"),
    ("pods", "store", "write"),
    ("pods", "operator", "progress, exit"),
)


DATA_BOXES = (
    Box("files", ("files", "S3, hub, claim, folder"), 10, 20),
    Box("rows", ("rows", "columns, tags"), 270, 20),
    Box("format", ("format", "named or recognised"), 530, 20),
    Box("screen", ("cleaning", "encoding, empty, short,", "leaked, duplicate"), 530, 150),
    Box("template", ("chat template", "with the answers' place"), 270, 150),
    Box("tokens", ("tokens and mask", "cached"), 10, 150),
    Box("packing", ("packing", "rows of a batch"), 10, 280),
    Box("report", ("manifest.json: data", "counts and examples"), 530, 280),
)
DATA_ARROWS = (
    ("files", "rows", ""),
    ("rows", "format", ""),
    ("format", "screen", ""),
    ("screen", "template", ""),
    ("template", "tokens", ""),
    ("tokens", "packing", ""),
    ("screen", "report", ""),
)


TRUST_BOXES = (
    Box("author", ("author of a job", "whoever may create one"), 10, 20),
    Box("api", ("API server", "admission, RBAC"), 270, 20),
    Box("operator", ("operator", "its own account"), 530, 20),
    Box("secrets", ("Secrets, claims", "of the job's namespace"), 10, 150),
    Box("pods", ("trainer pods", "no rights of their own"), 270, 150),
    Box("hub", ("hub", "config.json"), 530, 150),
    Box("inputs", ("data sets, models", "strangers' files"), 10, 280),
    Box("bucket", ("object store", "checkpoints, results"), 270, 280),
    Box("merge", ("finetune merge", "whoever uses a result"), 530, 280),
)
TRUST_ARROWS = (
    ("author", "api", "job"),
    ("api", "operator", ""),
    ("operator", "api", "jobs, children"),
    ("api", "pods", ""),
    ("pods", "api", "end, progress"),
    ("hub", "operator", ""),
    ("secrets", "pods", ""),
    ("inputs", "pods", ""),
    ("bucket", "pods", ""),
    ("pods", "bucket", "files"),
    ("bucket", "merge", ""),
)


def trust() -> str:
    """What crosses a border, each arrow of which is read as if a stranger had written it."""
    return _diagram(TRUST_BOXES, TRUST_ARROWS, "Where trust ends")


def architecture() -> str:
    """Who writes what."""
    return _diagram(BOXES, ARROWS, "Parts of the system")


def data() -> str:
    """From files to batches."""
    return _diagram(DATA_BOXES, DATA_ARROWS, "The way of the data")


def _diagram(boxes: Sequence[Box], arrows: Sequence[tuple[str, str, str]], title: str) -> str:
    places = {box.name: box for box in boxes}
    body = "\n".join([*map(_box, boxes), *(_arrow(places[start], places[end], label) for start, end, label in arrows)])
    return (
        f'<figure class="picture"><svg viewBox="0 0 740 360" width="740" role="img" aria-label="{title}">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" class="picture-tip"/></marker></defs>\n{body}\n</svg></figure>'
    )


def _box(box: Box) -> str:
    middle, top = box.x + WIDTH / 2, box.y + HEIGHT / 2 - 9 * (len(box.lines) - 1) + 5
    texts = (
        f'<text x="{middle}" y="{top + 18 * number}" text-anchor="middle"{_BOLD if number == 0 else ""}>{line}</text>'
        for number, line in enumerate(box.lines)
    )
    frame = f'<rect x="{box.x}" y="{box.y}" width="{WIDTH}" height="{HEIGHT}" rx="6" class="picture-box"/>'
    return frame + "".join(texts)


def _arrow(start: Box, end: Box, label: str) -> str:
    """From the side of a box to the facing side of another."""
    x1, y1 = start.x + WIDTH / 2, start.y + HEIGHT / 2
    x2, y2 = end.x + WIDTH / 2, end.y + HEIGHT / 2
    if start.x == end.x:
        down = 1 if end.y > start.y else -1
        y1, y2 = y1 + down * HEIGHT / 2, y2 - down * HEIGHT / 2
    else:
        right = 1 if end.x > start.x else -1
        x1, x2 = x1 + right * WIDTH / 2, x2 - right * WIDTH / 2
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="picture-arrow" marker-end="url(#tip)"/>'
    shift = 8 if x1 == x2 else 0
    anchor = "start" if x1 == x2 else "middle"
    text = f'<text x="{(x1 + x2) / 2 + shift}" y="{(y1 + y2) / 2 - 6}" text-anchor="{anchor}" class="picture-label">'
    return f"{line}{text}{label}</text>"
