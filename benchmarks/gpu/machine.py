"""Part `machine`: the GPU, its driver and the versions of everything that the other parts measure."""

import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

from benchmarks.child import Child
from benchmarks.gpu.part import Settings, say

QUERY = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit,utilization.gpu"
PACKAGES = ("jax", "jaxlib", "jax-cuda", "flax", "optax", "torch", "triton", "nvidia-cudnn", "nvidia-cublas", "numpy")
DEVICES = """
import json, jax
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "device_kind": device.device_kind, "devices": jax.device_count(),
                  "memory": (device.memory_stats() or {}).get("bytes_limit")}))
"""
TORCH = "import json, torch; print(json.dumps([torch.cuda.is_available(), torch.version.cuda]))"


def machine(settings: Settings, seconds: float) -> dict[str, Any]:
    """Reports what nvidia-smi, JAX and PyTorch say, each of them only if it answers."""
    results = settings.results
    results["python"] = platform.python_version()
    results["cores"] = len(os.sched_getaffinity(0))
    results["load_average"] = os.getloadavg()[0]
    results["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
    found = {d.metadata["Name"].lower(): d.version for d in distributions() if d.metadata["Name"]}
    results["versions"] = {name: found[name] for name in sorted(found) if name.startswith(PACKAGES)}
    try:
        query = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        results["nvidia_smi"] = [dict(zip(QUERY.split(","), line.split(", "), strict=True)) for line in lines]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        results["nvidia_smi"] = f"no answer: {error}"[:200]
    children = {
        "jax_devices": Child([sys.executable, "-c", DEVICES]),
        "torch_cuda": Child([sys.executable, "-c", TORCH]),
    }
    for name, child in children.items():
        try:
            results[name] = child.read(min(60, seconds))
        except (TimeoutError, RuntimeError) as error:
            results[name] = str(error)[-200:]
        child.kill()
    device = results["jax_devices"]
    kind = f"{device['devices']} x {device['device_kind']}" if isinstance(device, dict) else "JAX finds no device"
    jax, torch = (found.get(name, "none") for name in ("jax", "torch"))
    say(f"machine: {kind}, jax {jax}, torch {torch}, Python {results['python']}, {results['cores']} cores")
    return {}
