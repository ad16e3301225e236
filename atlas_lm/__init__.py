"""Memory-augmented language models that train so that no failure stays silent.

from atlas_lm import generate, load

model, tokenizer = load("stage1")       # an experiment, a run folder or a checkpoint
print(generate(model, tokenizer, "def "))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_lm.config.model import ModelConfig
    from atlas_lm.model.atlas import AtlasLM
    from atlas_lm.model.sampling import generate
    from atlas_lm.runs.load import load
    from atlas_lm.training.module import AtlasModule

__version__ = "0.2.0"
__all__ = ["AtlasLM", "AtlasModule", "ModelConfig", "__version__", "generate", "load"]

# Imported when they are asked for: torch takes seconds, and a command line's --help needs none of it.
_HOME = {
    "AtlasLM": "atlas_lm.model.atlas",
    "AtlasModule": "atlas_lm.training.module",
    "ModelConfig": "atlas_lm.config.model",
    "generate": "atlas_lm.model.sampling",
    "load": "atlas_lm.runs.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
