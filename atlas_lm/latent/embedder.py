"""A sentence-transformers model, and what identifies it: the hash of its weights and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from atlas_lm.latent.frames import check_vectors

log = logging.getLogger(__name__)

INSTALL = "pip install 'atlas-lm[latent]'"


class Embedder:
    """Text → unit vectors. ValueError: there is no library, or the model cannot be loaded or is no embedder."""

    def __init__(self, model: str, batch: int) -> None:
        self.batch = batch
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(f"embed needs sentence-transformers: {INSTALL}") from error
        if not Path(model).exists():
            if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
                raise ValueError(f"model={model}: there is no such folder; correct the path")
            log.info("model=%s is no folder here: taken for a name, from the Hub's cache or the Hub", model)
        elif not (Path(model) / "modules.json").is_file():
            # the library makes an embedder of any model, by a mean that nothing was trained for
            raise ValueError(
                f"model={model} has no modules.json, so it is no sentence-transformers model, as all-MiniLM-L6-v2 is; "
                "to embed by its mean all the same, save it with SentenceTransformer(model).save(folder)"
            )
        try:
            self.model: Any = SentenceTransformer(model, device="cpu")
        except Exception as error:  # of a library that raises what its parts raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model={model} cannot be loaded ({type(error).__name__}: {reason}): give the folder of a "
                "sentence-transformers model, or a name that can be downloaded"
            ) from error
        self.hash = fingerprint(self.model)

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a passage that are read; None: all."""
        return self.model.max_seq_length

    def cut_short(self, texts: Sequence[str]) -> int:
        """How many passages are longer than the model reads."""
        if self.max_tokens is None:
            return 0
        lengths = self.model.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)
        return sum(len(ids) > self.max_tokens for ids in lengths["input_ids"])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32 of unit length. ValueError: the model gives what is none."""
        found = self.model.encode(
            list(texts), batch_size=self.batch, normalize_embeddings=True, show_progress_bar=False,
            convert_to_numpy=True,
        ).astype(np.float32)  # fmt: skip
        check_vectors(found, "the embedder's vectors")
        return found


def fingerprint(model: Any) -> str:
    """Hash of weights, tokenizer and the way in which both are used; the same for a copy in another folder."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else repr(model.tokenizer)).encode())
    for module in model:
        settings: dict[str, Any] = getattr(module, "get_config_dict", dict)()
        digest.update(f"{type(module).__name__} {sorted(map(str, settings.items()))}".encode())
    digest.update(str(model.max_seq_length).encode())
    return digest.hexdigest()
