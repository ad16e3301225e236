"""A stream through a model as an object: it reads, freezes, forks, and continues from a file in another process (M14).

session = model.stream()
logits = session.read(tokens)        # learns while it reads; the state's size stays the same
session.save("state.pt")             # weights-only: tensors, numbers and names
"""

# B batch, T tokens, V vocabulary, D head dim

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas_lm.files import write_atomically
from atlas_lm.model.attention import AttentionState, rotated

PIECE = 1024  # tokens that are read at a time: what a call needs does not grow with the text


class Session:
    """`batch` streams of one age. Reading replaces `state`, which is never changed in place: a fork shares it."""

    def __init__(self, model: Any, batch: int = 1) -> None:
        self.model = model
        self.state: tuple[Any, ...] = model.initial_state(batch)
        self.age = 0  # tokens read
        self.logits: Tensor | None = None  # (B, V) after the last token read

    @torch.no_grad()
    def read(
        self,
        tokens_BT: Tensor,
        piece: int = PIECE,
        write: bool = True,
        document_start_BT: Tensor | None = None,
    ) -> Tensor:
        """The logits (B, T, V) of the tokens after each. `write`: the memories learn; else they answer as they are,
        while attention and convolution move on. `document_start_BT` (bool): there a model with `reset_at_document`
        restarts. ValueError: another batch, tokens outside the vocabulary, or documents that start in some rows
        alone."""
        parts = []
        pieces = tokens_BT.split(piece, dim=1)
        starts = [None] * len(pieces) if document_start_BT is None else document_start_BT.split(piece, dim=1)
        for tokens, start in zip(pieces, starts, strict=True):
            output = self.model(tokens, self.state, start, write=write)
            self.state, self.age = output.state, self.age + tokens.size(1)
            parts.append(output.logits)
        self.logits = parts[-1][:, -1].clone()
        return torch.cat(parts, dim=1)

    def fork(self) -> Session:
        """Another session that has read the same; what either reads from here on, the other does not know."""
        return self._of(self.model, self.state, self.age, self.logits)

    @classmethod
    def _of(cls, model: Any, state: tuple[Any, ...], age: int, logits: Tensor | None) -> Session:
        session = cls.__new__(cls)
        session.model, session.state, session.age, session.logits = model, state, age, logits
        return session

    def save(self, path: str | Path) -> None:
        """Write the state; `load` continues bit for bit. OSError: it cannot be written."""
        content = {
            "format": FORMAT, "state": self.state, "age": self.age, "logits": self.logits,
            "weights": weights_digest(self.model),
        }  # fmt: skip
        write_atomically(Path(path), lambda file: torch.save(content, file))

    @classmethod
    def load(cls, model: Any, path: str | Path) -> Session:
        """The session of a file. ValueError: it is none, or of a model with other weights; nothing else is run."""
        device = next(model.parameters()).device
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except FileNotFoundError:
            raise ValueError(f"no state {str(path)!r}: correct the path") from None
        except Exception as error:  # whatever a broken or foreign file makes of torch
            raise ValueError(f"{str(path)!r} is no saved state ({type(error).__name__}): save it again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is no saved state of this version: save it again")
        if content["weights"] != weights_digest(model):
            raise ValueError(f"{str(path)!r} was saved by a model with other weights: load it with that model")
        return cls._of(model, content["state"], content["age"], content["logits"])


FORMAT = "atlas-lm state 1"


def weights_digest(model: Any) -> str:
    """Of a sample of every parameter, chunk sizes included: equal for equal weights, and fast for large ones."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    digest.update(str(tuple(model.local_chunks)).encode())
    return digest.hexdigest()


@torch.no_grad()
def read_together(sessions: Sequence[Session], tokens_NT: Tensor, write: bool = True) -> Tensor:
    """Let sessions of any ages, of one model, each read its row of tokens: logits (N, T, V).

    Those at the same place of their chunks run as one batch. Each session continues with its own state.
    """
    groups: dict[Any, list[int]] = {}
    for i, session in enumerate(sessions):
        if session.model is not sessions[0].model:
            raise ValueError("sessions of different models cannot read together")
        groups.setdefault(_phase(session.state), []).append(i)
    logits: list[Any] = [None] * len(sessions)
    for rows in groups.values():
        joined = sessions[rows[0]].fork()
        joined.state = _join([sessions[i].state for i in rows])
        found = joined.read(tokens_NT[rows], write=write)
        for n, i in enumerate(rows):
            logits[i] = found[n]
            sessions[i].state, sessions[i].age = _row(joined.state, n), sessions[i].age + tokens_NT.size(1)
            sessions[i].logits = found[n, -1:].clone()
    return torch.stack(logits)


def _phase(state: Any) -> Any:
    """Everything that has to be alike in one batch: shapes, numbers, filled slots; not the position."""
    if isinstance(state, AttentionState):
        return state.k.shape[1:], tuple(state.valid.tolist()), state.base, _phase(state.conv)
    if isinstance(state, Tensor):
        return state.shape[1:]
    if isinstance(state, tuple):
        return tuple(_phase(part) for part in state)
    return state


def _join(states: list[Any]) -> Any:
    first = states[0]
    if isinstance(first, AttentionState):  # rotary positions are relative: older keys are turned to the first's place
        k = [rotated(s.k, first.position - s.position, s.base) for s in states]
        v, conv = torch.cat([s.v for s in states]), _join([s.conv for s in states])
        return first._replace(k=torch.cat(k), v=v, conv=conv)
    if isinstance(first, Tensor):
        return torch.cat(states)
    if isinstance(first, tuple):
        parts = [_join(list(part)) for part in zip(*states, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return first


def _row(state: Any, n: int) -> Any:
    if isinstance(state, AttentionState):
        return state._replace(k=_row(state.k, n), v=_row(state.v, n), conv=_row(state.conv, n))
    if isinstance(state, Tensor):
        return state[n : n + 1].clone()
    if isinstance(state, tuple):
        parts = [_row(part, n) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
