"""The hub, as a user meets it: the first command, the cache, damage, refusals, pushing.

All against a small hub on loopback (`tests/hub.py`).
"""

import gzip
import json
from pathlib import Path

import pytest

from prunebench.models.linears import find_linears
from prunebench.models.save import save_masks
from prunebench.models.source import catalog
from prunebench.results.store import ResultStore
from prunebench.testing import tiny_model
from tests.conftest import prose
from tests.hub import files_of

LLAMA = catalog()["llama2-7b"]
MASKS = LLAMA.masks.removeprefix("hub:")
C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"


def c4_file(*, seed: int, documents: int = 30) -> bytes:
    """A shard of C4 in miniature: a JSON document a line, compressed."""
    rows = [{"text": prose(1200, seed=seed * 100 + i)} for i in range(documents)]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def owners_hub(loopback, tiny_folder, tmp_path):
    """Llama-2-7B in miniature at the pinned revision, its published masks, and C4."""
    from prunebench.models.blocks import BlockWalker
    from prunebench.pruners import METHODS
    from prunebench.sparsity import Sparsity

    model = tiny_model("llama")
    walker = BlockWalker(model)
    half = {one.name: Sparsity.parse("2:4") for one in walker.linears}
    METHODS.make("magnitude", {}).prune(walker, half)
    save_masks(find_linears(model), tmp_path / "mask_compressed.npz")
    llama = files_of(tiny_folder) | {"original/params.json": b"{}", "README.md": b"# Llama"}
    loopback.model(LLAMA.hub, llama, sha=LLAMA.revision)
    masks = (tmp_path / "mask_compressed.npz").read_bytes()
    loopback.model(MASKS, {"mask_compressed.npz": masks})
    shards = {
        "en/c4-train.00000-of-01024.json.gz": c4_file(seed=1),
        "en/c4-validation.00000-of-00008.json.gz": c4_file(seed=2),
    }
    loopback.dataset("allenai/c4", shards, sha=C4)
    return loopback


OWNERS = ["run", "--method", "maskllm", "--model", "llama2-7b"]
SMALL = ["--ppl", "c4", "--ppl-seqlen", "64", "--ppl-tokens", "640"]


def only_row(folder="results"):
    (result,) = ResultStore(Path(folder)).read()[0]
    return result


def test_the_first_command_files_a_row_with_revision_and_origins(cli, owners_hub):
    outcome = cli(*OWNERS, *SMALL)
    row = only_row()
    masks = owners_hub.models[MASKS].refs["main"]
    assert row.status == "ok" and row.spec.sparsity == "2:4"
    assert (row.model.id, row.model.source) == ("llama2-7b", "hub")
    assert row.model.revision == row.spec.model_revision == LLAMA.revision
    assert row.model.pull_request is None
    assert row.method.options == {"masks": f"hub:{MASKS}@{masks}"}
    name = "en/c4-validation.00000-of-00008.json.gz"
    assert row.spec.ppl_origins == (f"hub:allenai/c4@{C4}/{name}",)
    assert row.sparsity.realised_ratio == 0.5
    assert "maskllm 2:4 on llama2-7b" in outcome.stdout
    assert not owners_hub.asked("^(POST|PUT)")
    assert not owners_hub.asked("original/")
