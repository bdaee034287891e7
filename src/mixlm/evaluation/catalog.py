"""From names of tasks to tasks: mixlm's own, files, and everything the harness knows."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from mixlm.errors import ConfigError, MixlmError, UnsupportedError, close_matches

FOLDER = Path(__file__).parent / "tasks"


def own_tasks() -> dict[str, str]:
    """Return the names of mixlm's own tasks, each with a line about it."""
    with quiet():
        manager = _manager()(include_path=str(FOLDER), include_defaults=False)
        return {name: manager.task_index[name].cfg["metadata"]["about"] for name in manager.all_subtasks}


def load_tasks(names: Sequence[str], *, data: str | Path | None = None) -> dict[str, Any]:
    """Load tasks by name, with their questions; groups and tags become their tasks.

    names: of mixlm's tasks, YAML files of the harness's form, or names that the harness knows (reading those takes
    about 10 seconds). data: a folder of JSONL files, for mixlm's own tasks. Raises ConfigError for an unknown name or
    questions that cannot be read, UnsupportedError for a task that a language model cannot do.
    """
    if not names:
        raise ConfigError("no task is named", "name one or more; mixlm eval --list shows mixlm's own")
    if data is not None and not Path(data).is_dir():
        raise ConfigError(f"there is no folder {data}", "give the folder that holds gsm8k.jsonl and the like")
    # Under a name of its own: the harness hands it to the tasks of others too.
    metadata = {"mixlm_data": str(data)} if data is not None else {}
    with quiet():
        ours = set(_manager()(include_path=str(FOLDER), include_defaults=False).all_tasks)
        # Names with our prefix are ours, so a misspelt one is refused without the harness's ten seconds.
        defaults = any(not (_is_file(name) or name in ours or name.startswith("mixlm_")) for name in names)
        manager = _manager()(include_path=str(FOLDER), include_defaults=defaults, metadata=metadata)
        for name in names:
            if name not in manager.task_index and not _is_file(name):
                if name.endswith((".yaml", ".yml")):
                    raise ConfigError(f"there is no file {name}", "give the path of a task's YAML file")
                close = close_matches(name, manager.all_tasks, 5)
                hint = f"did you mean {' or '.join(repr(task_name) for task_name in close)}?" if close else None
                raise ConfigError(f"there is no task {name!r}", hint or "mixlm eval --list shows mixlm's own tasks")
        tasks: dict[str, Any] = {}
        for name in names:
            tasks |= _loaded(manager, name)
    return tasks


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the harness says about its own steps off the screen."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"evaluation needs lm-eval: {error}", "pip install 'mixlm[eval]'") from error
    return TaskManager


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _loaded(manager: Any, name: str) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = manager.load(name)["tasks"]
    except MixlmError:
        raise
    except Exception as error:  # a task may run any code, and the hub's client has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "a task's file has task, doc_to_text and so on: see lm-evaluation-harness's guide to tasks"
        raise ConfigError(f"the task {name} could not be loaded: {reason}", hint if _is_file(name) else None) from error
    for task_name, task in tasks.items():
        if getattr(task, "MULTIMODAL", False):
            raise UnsupportedError(f"the task {task_name} has images or sound, and mixlm's models read text")
        if getattr(task, "UNSAFE_CODE", False):
            raise UnsupportedError(f"the task {task_name} runs code that a model wrote, which mixlm does not do")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks
