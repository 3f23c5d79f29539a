"""Peak host memory and time of loading a random 2 GB checkpoint; prints JSON.

``python tests/benchmarks/load_memory.py [--gigabytes 2] [--out result.json]``

The network is the hub's own BERT (Geneformer's layout, where query, key and value are three tensors that become one matrix). Every way of
loading runs in processes of its own; what is counted is the largest resident memory (``VmHWM``) minus that of the same process just before
the load, over the size of the file: the largest of three repeats. The file is in the page cache, so seconds say nothing about disks.
``used`` also reads every weight once after the load, as a first forward pass would.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTH, INNER, HEADS, VOCABULARY = 1152, 4608, 18, 20275
LIMIT = 1.15
REPEATS = 3


def config(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": 4096,
    }


def make(folder: Path, gigabytes: float) -> int:
    """Write random weights of about that size as safetensors and as a torch file; return the number of layers."""
    import torch

    from cellfm_adapters.geneformer.adapter import GeneformerAdapter
    from cellfm_hub.safe_files import write_tensors

    per_layer = (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) * 4
    layers = round((gigabytes * 1e9 - VOCABULARY * WIDTH * 4) / per_layer)
    with torch.device("meta"):
        layout = GeneformerAdapter.published(config(layers))[1]
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(key.shape, generator=generator) * 0.02 for name, key in layout.items() if key.required}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save(tensors, folder / "before_torch_1.6.bin", _use_new_zipfile_serialization=False)  # cannot be mapped
    return layers


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(path: Path, layers: int, device: str, dtype: str, *, use: bool) -> dict[str, Any]:
    """Load once in this process."""
    import torch

    from cellfm_adapters.geneformer.adapter import GeneformerAdapter
    from cellfm_hub.safe_files import read_tensors
    from cellfm_hub.weights import load_network

    with torch.device("meta"):
        layout = GeneformerAdapter.published(config(layers))[1]
    if device != "cpu":
        torch.zeros(1, device=device)
    torch.zeros(100, 100) @ torch.zeros(100, 100)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = status("VmRSS")
    begin = time.perf_counter()
    network = load_network(
        lambda: GeneformerAdapter.published(config(layers))[0],
        read_tensors(path),
        layout,
        origin=path.name,
        device=torch.device(device),
        dtype=getattr(torch, dtype),
    )
    seconds = time.perf_counter() - begin
    loaded = status("VmHWM") - before
    if use:
        for parameter in network.parameters():
            parameter.sum()
    size = path.stat().st_size
    peak = status("VmHWM") - before
    return {
        "file": path.name,
        "device": device,
        "dtype": dtype,
        "used": use,
        "file_bytes": size,
        "seconds": round(seconds, 3),
        "peak_after_load": round(loaded / size, 4),
        "peak": round(peak / size, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where to write the files (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        path, layers, device, dtype, use = arguments.one
        print(json.dumps(measure(Path(path), int(layers), device, dtype, use=use == "1")))  # noqa: T201
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        layers = make(folder, arguments.gigabytes)
        import torch

        runs = [("cpu", "float32", False), ("cpu", "float32", True), ("cpu", "bfloat16", True)]
        runs += [("cuda", "float32", True), ("cuda", "float16", True)] if torch.cuda.is_available() else []
        results = []
        for device, dtype, use in runs:
            for file in ("model.safetensors", "pytorch_model.bin", "before_torch_1.6.bin"):
                command = [sys.executable, __file__, "--one", str(folder / file), str(layers), device, dtype, str(int(use))]
                repeats = []
                for _ in range(REPEATS):
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    repeats.append(json.loads(done.stdout.splitlines()[-1]))
                worst = max(repeats, key=lambda result: result["peak"])
                results.append(worst | {"seconds": sorted(result["seconds"] for result in repeats)})
    highest = max(result["peak"] for result in results if result["file"] == "model.safetensors")
    report = {
        "what": "peak host memory of loading, as a multiple of the file",
        "limit": LIMIT,
        "worst_safetensors": highest,
        "passed": highest <= LIMIT,
        "layers": layers,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "results": results,
    }
    text = json.dumps(report, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)  # noqa: T201
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
