"""Our models in lm-evaluation-harness (EleutherAI): each request is read by a stream of its own, however long it is.

What comes before a text is a separator, as in training. A memory carries the whole of a long text, so nothing is cut
into windows, and a perplexity is that of the text read once from its beginning to its end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from atlas_lm.config.names import nearest
from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.exchange.export import save_tokenizer
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.sampling import draw
from atlas_lm.model.session import PIECE

TASKS = Path(__file__).parent / "tasks"
OURS = "held_out"  # its documents are of the run
GENERATED = 256  # tokens, where a task does not say how many
RULER = "niah_", "ruler_"  # how the names of its tasks begin
RULER_LENGTHS = tuple(4096 * 2**n for n in range(6))  # tokens; RULER's tasks have a metric of each
NOT_ASKED = -1  # what it gives for the other lengths

Tick = Callable[[int], object]  # called with the number of tokens that were just computed


class Score(NamedTuple):
    """What the harness found: a metric's value, and its standard error where it has one."""

    task: str
    metric: str
    value: float
    error: float | None


def evaluate(
    model: AtlasLM,
    tokenizer: Tokenizer,
    tasks: list[str],
    documents: list[str],
    limit: int | None,
    tick: Tick,
    length: int = 0,
) -> list[Score]:
    """The harness's figures. `documents`: of the task `held_out`. `limit`: examples of each task; None: all. `length`:
    tokens of the texts that RULER's tasks make; 0: 4,096.

    ValueError: an unknown task, one whose data or package is not at hand, or a length that RULER has not.
    FloatingPointError: logits that are not finite.
    """
    ruler = [task for task in tasks if task.startswith(RULER)]
    if ruler and length and length not in RULER_LENGTHS:
        raise ValueError(f"length={length} is none of {ruler[0]}: there are {', '.join(map(str, RULER_LENGTHS))}")
    if OURS in tasks and not documents:
        raise ValueError(f"tasks={OURS}: the run's held-out data is no text, choose another task")
    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name)
        (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        for path in TASKS.glob("*.yaml"):
            (folder / path.name).write_text(path.read_text().replace("DOCUMENTS", str(folder / "documents.jsonl")))
        save_tokenizer(tokenizer, folder / "tokenizer")
        # what a task that makes its texts goes by
        metadata = {"tokenizer": str(folder / "tokenizer"), "max_seq_lengths": [length or RULER_LENGTHS[0]]}
        manager = TaskManager(include_path=name, metadata=metadata)
        for task in tasks:
            if task not in manager.all_tasks and not Path(task).is_file():
                hint = nearest(task, manager.all_tasks)
                raise ValueError(f"tasks={task} is unknown{hint}: `lm-eval ls tasks` lists them")
        try:
            found = simple_evaluate(
                HarnessModel(model, tokenizer, tick), tasks=tasks, task_manager=manager, limit=limit,
                bootstrap_iters=1000, verbosity="ERROR",
            )  # fmt: skip
        except ImportError as error:  # of a task's own package
            raise ValueError(f"tasks={','.join(tasks)} cannot be evaluated: {' '.join(str(error).split())}") from error
        except (OSError, ConnectionError) as error:  # of datasets: no network, no such file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"tasks={','.join(tasks)} cannot be evaluated ({reason}): their data has to be on this machine, or "
                "within reach"
            ) from error
    assert found is not None
    return list(_scores(found["results"]))


def _scores(results: dict[str, Any]) -> Iterator[Score]:
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            if metric.isdecimal() and value == NOT_ASKED:
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            yield Score(task, shown, float(value), float(error) if isinstance(error, (int, float)) else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own bars and advice; a progress bar of ours shows tokens."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with patch.dict(os.environ, {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}):
            yield
    finally:
        logger.setLevel(level)


class HarnessModel(TemplateLM):
    """A model of ours as the harness asks for it."""

    def __init__(self, model: AtlasLM, tokenizer: Tokenizer, tick: Tick) -> None:
        super().__init__()
        self.model, self.words, self.tick = model, tokenizer, tick
        self._device = next(model.parameters()).device
        self._generator = torch.Generator(self._device)  # `draw` asks for one; the likeliest token needs none

    @property
    def eot_token_id(self) -> int:
        """The separator of documents."""
        return self.words.separator_id

    @property
    def tokenizer_name(self) -> str:
        """Its fingerprint."""
        return self.words.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; nothing is put before or after them."""
        return [int(token) for token in self.words.encode(string)]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        begin = [self.eot_token_id]
        return [
            self._score(context if context[:1] == begin else begin + context, continuation)
            for _, context, continuation in requests
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, nats."""
        return [self._score([self.eot_token_id], self.tok_encode(request.args[0]))[0] for request in requests]

    @torch.no_grad()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of the continuation in nats, and whether each of its tokens is the likeliest one.

        FloatingPointError: logits that are not finite.
        """
        tokens = torch.tensor([context + continuation], device=self._device)
        session, total, greedy = self.model.stream(1), 0.0, True
        first = len(context) - 1  # the place whose logits are of the continuation's first token
        for start in range(0, tokens.size(1) - 1, PIECE):
            piece = tokens[:, start : min(start + PIECE, tokens.size(1) - 1)]
            logits = session.read(piece)[0, max(0, first - start) :].double()
            if not bool(logits.isfinite().all()):
                raise FloatingPointError("the model's logits are not finite: choose an earlier checkpoint")
            wanted = tokens[0, start + 1 + max(0, first - start) : start + 1 + piece.size(1)]
            if len(wanted):
                total += float(torch.log_softmax(logits, -1).gather(1, wanted[:, None]).sum())
                greedy &= bool((logits.argmax(-1) == wanted).all())
            self.tick(piece.size(1))
        return total, greedy

    @torch.no_grad()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedily, until one of the request's strings or a separator comes. FloatingPointError as of `draw`."""
        found = []
        for request in requests:
            context, settings = request.args
            asked = settings.get("until") or []
            stops = [stop for stop in ([asked] if isinstance(asked, str) else asked) if stop]
            session = self.model.stream(1)
            prompt = [self.eot_token_id, *self.tok_encode(context)]
            session.read(torch.tensor([prompt], device=self._device))
            self.tick(len(prompt))
            ids: list[int] = []
            text = ""
            for _ in range(int(settings.get("max_gen_toks", GENERATED))):
                assert session.logits is not None
                token = draw(session.logits, 0, 1, self._generator)
                if int(token) == self.eot_token_id:
                    break
                ids.append(int(token))
                text = self.words.decode(ids)
                if any(stop in text for stop in stops):
                    break
                session.read(token)
                self.tick(1)
            for stop in stops:
                text = text.split(stop)[0]
            found.append(text)
        return found


def documents_of(text: bytes, length: int) -> list[str]:
    """Held-out text in pieces of about `length` bytes, cut at newlines.

    The text is that of the validation's sequences, one after another: a piece may hold parts of several documents.
    """
    pieces: list[list[str]] = [[]]
    size = 0
    for line in text.decode("utf-8", errors="replace").splitlines(keepends=True):
        if size >= length:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    return ["".join(lines) for lines in pieces if lines]
