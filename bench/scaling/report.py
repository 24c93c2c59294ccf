"""What two GPUs do beside one. `python -m bench.scaling.report scaling.json` prints results as a table in Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


def line(result: Result) -> str:
    """One run."""
    if "error" in result:
        return f"{result['name']:20} {result['error'][:160]}\n"
    text = (
        f"{result['name']:20} {result['tokens_per_second']:10,.0f} tok/s  step {1e3 * result['median_seconds']:8.1f} ms"
        f"  peaks {' '.join(f'{peak:.2f}' for peak in result['peaks_gib'])} GiB"
        f"  first step {result['first_step_seconds']:.1f} s"
        f"  losses {result['losses'][0]:.3f} .. {result['losses'][-1]:.3f}"
    )
    found = result.get("communication")
    if found and found["overlap"] is not None:
        text += (
            f"  NCCL {found['communication_ms']} ms, {100 * found['overlap']:.1f} % beside computation,"
            f" {found['exposed_ms']} ms alone; idle {found['idle_ms']} of {found['span_ms']} ms"
        )
    return text + "\n"


def ratios(results: Sequence[Result]) -> dict[str, Any]:
    """Tokens a second of each run on several GPUs over those of one GPU with the same model.

    What one GPU cannot hold would take there the time that lies on the line through runs with fewer blocks.
    """
    measured = [result for result in results if "error" not in result]
    found: dict[str, Any] = {}
    for result in measured:
        if len(result["gpus"]) > 1:
            one = _on_one(result, [other for other in measured if len(other["gpus"]) == 1])
            if one is not None:
                rows = len(result["gpus"])
                ratio = rows * one["seconds"] / result["median_seconds"]
                found[result["name"]] = {"ratio": round(ratio, 3), "one": one}
    return found


def _on_one(result: Result, others: Sequence[Result]) -> dict[str, Any] | None:
    """Seconds of a step with the rows of one GPU; None where nothing is known of it."""
    same = [other for other in others if other["trained"] == result["trained"]]
    by_blocks = {other["blocks"]: other["median_seconds"] for other in same}
    blocks = result["blocks"]
    if blocks in by_blocks:
        return {"seconds": by_blocks[blocks], "measured": True}
    if len(by_blocks) < 2:
        return None
    (few, less), *_, (many, more) = sorted(by_blocks.items())
    each = (more - less) / (many - few)
    return {
        "seconds": more + each * (blocks - many),
        "measured": False,
        "blocks": [few, many],
        "seconds_a_block": each,
        "seconds_beside": less - each * few,
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The ratios, for people."""
    for name, about in found.items():
        how = "measured" if about["one"]["measured"] else f"by the line through {about['one']['blocks']} blocks"
        yield f"{name:20} {about['ratio']:6.3f} times one GPU ({1e3 * about['one']['seconds']:.1f} ms, {how})\n"


HEAD = """\
| run | GPUs | step, ms | tok/s | times one GPU | peaks, GiB | NCCL, ms | beside computation | alone, ms | idle, ms |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def markdown(report: Mapping[str, Any]) -> str:
    """All runs as a table."""
    return HEAD + "".join(_row(result, report["ratios"].get(result["name"])) for result in report["results"])


def _row(result: Result, about: Mapping[str, Any] | None) -> str:
    name, gpus = result["name"], len(result["gpus"])
    if "error" in result:
        return f"| {name} | {gpus} | {result['error'][:80]} |{' |' * 7}\n"
    found = result.get("communication") or {}
    overlap = found.get("overlap")
    cells = [
        name,
        str(gpus),
        f"{1e3 * result['median_seconds']:.1f}",
        f"{result['tokens_per_second']:,.0f}",
        f"{about['ratio']:.3f}" if about else "",
        ", ".join(f"{peak:.1f}" for peak in result["peaks_gib"]),
        str(found.get("communication_ms", "")),
        f"{100 * overlap:.1f} %" if overlap is not None else "",
        str(found.get("exposed_ms", "")),
        str(found.get("idle_ms", "")),
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())))
