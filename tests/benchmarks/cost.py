"""Which share of a matrix product's speed each published network reaches: the table behind the estimates of ``cellfm check``.

No weights are needed: networks get random ones in the published sizes and run through the engine in the default recipe, rows of up to
1,024 tokens, one thread. Times are CPU seconds, those of the probe too, so that other work on the machine counts little; best of three.

Run from the top of a checkout: ``python tests/benchmarks/cost.py``. It writes ``src/cellfm_hub/cost.json``.
"""

import argparse
import json
import platform
import resource
import time
from datetime import UTC, datetime

import numpy as np
import torch
from fidelity import ROWS, embed, fill, processor

from cellfm_hub import cost
from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.nn import Encoder
from cellfm_hub.registry import Entry, registry

MODELS = [
    "geneformer-v1-10m",
    "geneformer-v2-104m",
    "geneformer-v2-316m",
    "scgpt-human",
    "scfoundation-01b",
    "uce-4l",
    "nt-v2-50m-multi-species",
    "nt-v2-500m-multi-species",
    "dnabert2-117m",
]


def measure(entry: Entry, rows: int, longest: int) -> dict[str, float]:
    """Measure one network."""
    adapter_class, config = entry.adapter_class(), dict(entry.checkpoint.config)
    assert issubclass(adapter_class, TokenAdapter)
    if entry.family == "uce":
        config["rows"] = 20_000  # the rest of the token table is never computed with
    made = ROWS[entry.family](config, np.random.default_rng(0), rows, min(longest, entry.checkpoint.max_tokens or longest))
    with torch.device("meta"):
        network = adapter_class.published(config)[0]
    network.to_empty(device="cpu").eval()
    fill(network, 0)
    encoder = next(module for module in network.modules() if isinstance(module, Encoder)).config
    layer = entry.recipes["default"].output_layer
    flops = cost.encoder_flops(encoder, made.tokens.lengths.astype(np.float64), layer if layer >= 0 else encoder.layers + 1 + layer)
    seconds, speed = float("inf"), 0.0
    a, b = torch.ones(1024, 768), torch.ones(768, 1024)
    for _ in range(3):
        begin = time.process_time()
        embed(entry, network, made)
        seconds = min(seconds, time.process_time() - begin)
        for _ in range(20):
            begin = time.process_time()
            torch.mm(a, b)
            speed = max(speed, 2 * 1024 * 768 * 1024 / (time.process_time() - begin))
    return {
        "dim": encoder.dim,
        "efficiency": round(flops / seconds / speed, 3),
        "tokens_per_second": round(len(made.tokens.ids) / seconds),
        "probe_gflops": round(speed / 1e9, 1),
        "peak_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    """Measure all, or those that are named, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default: all in the list")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = json.loads(cost.MEASURED.read_text()) if cost.MEASURED.exists() else {"networks": {"cpu float32": {}}}
    networks = table["networks"]["cpu float32"]
    for name in arguments.models or MODELS:
        large = name in ("geneformer-v2-316m", "nt-v2-500m-multi-species", "uce-4l")
        networks[name] = measure(registry().find(name), 2 if large else 4, 1024)
        print(name, networks[name], flush=True)  # noqa: T201, a script for people
    table = {
        "about": "made by tests/benchmarks/cost.py: random weights, one thread; efficiency:"
        " share of the speed of a (1024, 768) x (768, 1024) product",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": processor(), "cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "networks": {"cpu float32": networks},
    }
    cost.MEASURED.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
