"""What BLOOM-176B takes on one 80 GB GPU with 64 GB of host memory.

    python -m benchmarks.scripts.bloom_plan

Computed from the config and counted on the meta device; no weight and no GPU is needed. Nothing of
it has been measured on such a machine.
"""

from __future__ import annotations

import sys

import torch

from prunebench.models.footprint import count_footprint
from prunebench.models.linears import find_linears
from prunebench.models.load import skeleton
from prunebench.pruners import METHODS
from prunebench.run.forecast import groups_of
from prunebench.run.memory import Workload, gigabytes, model_sizes, plan_memory
from prunebench.run.probe import probe_method
from prunebench.sparsity import Sparsity

GPU_BYTES, HOST_BYTES = 80e9, 64e9
SAMPLES, SEQLEN, BATCH = 128, 2048, 8  # the papers' calibration; 16,384 tokens at a time
WINDOWS, SCORED = 166, 4  # WikiText-2 in windows of 2048
PROCESS_BYTES = 450_000_000  # Python, torch and transformers, as measured on our machine


def main() -> int:
    """Print the plan of both methods."""
    from transformers import BloomConfig

    config = BloomConfig(hidden_size=14336, n_layer=70, n_head=112, vocab_size=250880)
    dtype = torch.bfloat16
    model = skeleton(config)
    sizes, linears = model_sizes(model, dtype), find_linears(model)
    print(f"BLOOM, {gigabytes(sizes.total)} in bfloat16, a block {gigabytes(max(sizes.blocks))}")
    for name in ("wanda", "sparsegpt"):
        pruner = METHODS.make(name, {})
        work = Workload(
            samples=SAMPLES, seqlen=SEQLEN, batch=BATCH, windows=WINDOWS, window=SEQLEN,
            scored=SCORED, sequential=False, hessian=pruner.needs.hessian,
        )  # fmt: skip
        footprint = count_footprint(
            config, dtype, calibration=(BATCH, SEQLEN), scoring=(SCORED, SEQLEN),
            hessian=work.hessian,
        )  # fmt: skip
        cost = probe_method(pruner, Sparsity.parse("0.7"), torch.device("cpu"))
        need = plan_memory(
            sizes, config.hidden_size, footprint, work,
            method_peak=max(cost.peak(*group) for group in groups_of(linears)),
            dtype=dtype, weights="disk", placement="cpu", on_gpu=True, process=PROCESS_BYTES,
        )  # fmt: skip
        fits = need.device_total * 1.1 < GPU_BYTES and need.host_total * 1.1 < HOST_BYTES
        print(f"{name}: {'fits' if fits else 'does not fit'}")
        for place, parts in (("GPU", need.device), ("host", need.host)):
            print(f"  {place:<5} {gigabytes(sum(parts.values())):>9}")
            for what, size in sorted(parts.items(), key=lambda item: -item[1]):
                print(f"        {gigabytes(size):>9}  {what}")
        print(f"  disk  {gigabytes(need.disk):>9}  beside the model's own {gigabytes(sizes.total)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
