"""What the C compiler in the image for GPUs is for: the module that Triton builds at its first use (docs/adr/0016).

Without a GPU the module cannot be used, but it can be built, by Triton's own function, with its own source and flags.
A stand-in takes the place of the driver's library: an empty one, which no container runtime puts in here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from images.checks import require
from images.container import output
from images.engine import Image

_BUILD = """
import json, os, pathlib, subprocess, sys, tempfile, time
import triton.backends.nvidia.driver as driver
from triton.runtime import build
folder = pathlib.Path(tempfile.mkdtemp())
empty = folder / "empty.c"; empty.write_text("")
library = str(folder / "libcuda.so.1")
subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, str(empty)], check=True)
source = pathlib.Path(driver.dirname, "driver.c").read_text()
place = folder / "cuda_utils.c"; place.write_text(source)
began = time.monotonic()
built = build._build("cuda_utils", str(place), str(folder), [str(folder)], driver.include_dirs, driver.libraries, [])
seconds = time.monotonic() - began
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton, triton.language as tl
names = folder / "kernel.py"
names.write_text(
    "import triton, triton.language as tl\\n@triton.jit\\ndef kernel(x, y, n: tl.constexpr):\\n"
    "    i = tl.arange(0, n)\\n    tl.store(y + i, tl.load(x + i) * 2 + 1)\\n")
sys.path.insert(0, str(folder))
import kernel
made = triton.compile(
    ASTSource(kernel.kernel, {"x": "*fp32", "y": "*fp32", "n": "constexpr"}, {"n": 64}),
    target=GPUTarget("cuda", 90, 32))
sys.stdout.write("\\n" + json.dumps({
    "bytes": os.path.getsize(built), "seconds": round(seconds, 2), "cubin": len(made.asm["cubin"]),
    "cache": os.environ.get("TRITON_CACHE_DIR"), "user": os.getuid()}))
"""


def check(image: Image, root: Path, pod: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Build Triton's module and a kernel for an H100 in a pod. Returns what was seen."""
    said = output(image, root, pod, folder, "python", "-c", _BUILD).splitlines()[-1]
    found: dict[str, Any] = json.loads(said)
    require(found["bytes"] > 10_000 and found["cubin"] > 1_000, f"Triton built something else: {found}")
    return found
