"""Which records a task was asked: each task of a group knows its own."""

import json

import pytest

from prunebench.evaluate import tasks as tasks_module
from prunebench.evaluate.lm_eval_task import Protocol
from prunebench.evaluate.tasks import prepare_tasks
from prunebench.progress import Silent

# One worker: the index of lm-eval's tasks takes seconds to build.
pytestmark = pytest.mark.xdist_group("lm-eval")

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, trust_remote_code: true}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: ["yes", "no"]
"""


def test_each_task_of_a_group_over_local_files_has_its_own_records(
    tmp_path, byte_tokenizer, monkeypatch
):
    """All are `dataset_path: json` without a name; only their data_files tell them apart."""
    # a group is looked for among all of lm-eval's files, which takes half a minute
    monkeypatch.setattr(tasks_module, "_all_tasks", tasks_module._few_tasks)
    for name in ("first", "second"):
        data = tmp_path / f"{name}.jsonl"
        data.write_text(json.dumps({"q": name, "label": 0}) + "\n")
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (tmp_path / "both.yaml").write_text("group: both\ntask: [first, second]\n")

    def sources():
        (group,) = prepare_tasks(
            ["both"], Protocol(include_path=tmp_path), tokenizer=byte_tokenizer, vocabulary=256,
            progress=Silent(),
        )  # fmt: skip
        found = {name: group._source(task) for name, task in group.built["tasks"].items()}
        return {name: (one.origin, one.content) for name, one in found.items()}, group.key

    before, key = sources()
    assert before["first"] != before["second"]
    assert {origin for origin, _ in before.values()} == {"file:json"}
    (tmp_path / "first.jsonl").write_text(json.dumps({"q": "other", "label": 0}) + "\n")
    after, other_key = sources()
    assert after["first"] != before["first"] and after["second"] == before["second"]
    assert other_key != key
