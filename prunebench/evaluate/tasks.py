"""Tasks of lm-eval by name: checked before anything is loaded, then built with their records.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) brings tasks, prompts, targets,
metrics and standard errors; records come from a wheel where there is no hub (`evaluate.records`).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunebench.calibration.vocabulary import largest_id
from prunebench.errors import IncompatibleData, MissingResource, UsageError
from prunebench.evaluate.lm_eval_task import LmEvalTask, Protocol
from prunebench.evaluate.records import record_source, task_table
from prunebench.evaluate.requests import require_known_requests
from prunebench.models.hashing import hash_tokenizer
from prunebench.progress import Progress, quiet_libraries


def expand_presets(names: Sequence[str]) -> list[str]:
    """Replace the papers' lists (`wanda7`, ...) by their tasks; every task once, in order."""
    presets: dict[str, list[str]] = task_table()["preset"]
    return list(dict.fromkeys(task for name in names for task in presets.get(name, [name])))


@functools.lru_cache(maxsize=4)
def _all_tasks(include_path: Path | None) -> Any:
    """Read all of lm-eval's task files, 13,000 in version 0.4.12: a quarter of a minute."""
    with quiet_libraries():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(include_path) if include_path else None)


@functools.lru_cache(maxsize=4)
def _few_tasks(include_path: Path | None) -> Any:
    """Read the files of the papers' tasks, and those of `include_path`."""
    with quiet_libraries():
        import lm_eval.tasks

        root = Path(lm_eval.tasks.__file__).parent
        # a version of lm-eval may have moved a folder: then `_manager` reads all files
        folders = [root / folder for folder in task_table()["folders"] if (root / folder).is_dir()]
        paths = [*folders, include_path] if include_path else folders
        return lm_eval.tasks.TaskManager(include_path=[*map(str, paths)], include_defaults=False)


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Return a task manager that has all of `names`, if lm-eval has them.

    A group names other tasks, which may be anywhere; single tasks need no files but their own.
    """
    manager = _few_tasks(include_path)
    return manager if set(names) <= set(manager.all_subtasks) else _all_tasks(include_path)


def check_task_names(names: Sequence[str], include_path: Path | None) -> None:
    """Refuse a task that lm-eval does not have.

    Raises:
        UsageError: An unknown name; the nearest are named.
        MissingResource: There is no such folder of task files.
    """
    if include_path and not include_path.is_dir():
        raise MissingResource(
            f"--include-path {include_path} is not a folder", fix="check the path"
        )
    all_names = set(_manager(names, include_path).all_tasks)
    for name in names:
        if name not in all_names:
            near = difflib.get_close_matches(
                name, [*all_names, *task_table()["preset"]], n=3, cutoff=0.5
            )
            raise UsageError(
                f"unknown task {name!r}",
                where=f"lm-eval knows {len(all_names):,} tasks and groups",
                fix=f"did you mean {', '.join(near)}?" if near else "see lm-eval ls tasks",
            )


def prepare_tasks(
    names: Sequence[str], protocol: Protocol, *, tokenizer: Any, vocabulary: int, progress: Progress
) -> list[LmEvalTask]:
    """Build the tasks, with their records.

    Args:
        names: Names of lm-eval.
        protocol: Shots, limit and prompt format.
        tokenizer: The model's.
        vocabulary: Rows of the model's embedding.
        progress: Reports downloads.

    Raises:
        MissingResource: Records or few-shot examples that cannot be had here.
        UsageError: No chat template.
        IncompatibleData: A tokenizer that lm-eval cannot work with, or whose tokens the model
            does not have.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise IncompatibleData(
            "the tokenizer has neither a beginning nor an end of text",
            where="lm-eval puts one of them before a question",
            fix="add eos_token to tokenizer_config.json, or leave --tasks out",
        )
    if protocol.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "--apply-chat-template: the tokenizer has no chat template",
            fix="leave it out, or use an instruction-tuned model",
        )
    tasks, tokenizer_sha256 = [], hash_tokenizer(tokenizer)
    for name in names:
        with quiet_libraries(), record_source(progress) as loaded:
            built = _manager(names, protocol.include_path).load([name])
            counts = {leaf: len(task.eval_docs) for leaf, task in built["tasks"].items()}
            for task in built["tasks"].values():
                _set_shots(task, protocol.num_fewshot)
            # building all requests takes long: only where an unknown id is possible
            if largest_id(tokenizer) >= vocabulary:
                require_known_requests(
                    built["tasks"], limit=protocol.limit, chat=protocol.apply_chat_template,
                    tokenizer=tokenizer, vocabulary=vocabulary,
                )  # fmt: skip
        ready = LmEvalTask(name, built, dict(loaded), counts, protocol, tokenizer, tokenizer_sha256)
        ready.require_examples()
        tasks.append(ready)
    return tasks


def _set_shots(task: Any, shots: int | None) -> None:
    """Set the number of examples as lm-eval's command line does: a task's own 0 stays."""
    task_shots = task.get_config("num_fewshot")
    if shots is not None and task_shots != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif task_shots is None:
        task.set_config(key="num_fewshot", value=0)
