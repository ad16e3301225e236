"""What a configuration may name as a class."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import atlas_lm.runs.resolve  # noqa: F401  # registers what conf/ needs
from atlas_lm.config.validate import check_config, check_targets
from tests.support import ROOT


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.Popen", "torch.os.system", "callbacks.support.probing.record",
     "callbacks.niah_probe.Path",
     "callbacks.niah_probe.Any", "builtins.eval", "atlas_lm.runs.folder.os.system", "",
     "atlas_lm.training.module.AtlasModule",
     "atlas_lm.data.prepare.StdlibSource.__init__", "atlas_lm.data.tokens.os.system", "callbacksx.Y", None, 3, {}, [],
     "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler", "lightning.Trainer"],
)  # fmt: skip
def test_only_classes_of_known_packages_are_built(target: Any) -> None:
    probe = {"_target_": "callbacks.niah_probe.NiahProbe"}
    check_targets({**probe, "more": [{"_target_": "atlas_lm.data.stdlib.StdlibSource"}]}, "x")
    with pytest.raises(ValueError, match="_target_"):
        check_targets({**probe, "source": [{"a": {"_target_": target}}]}, "x")


@pytest.mark.parametrize("text", ["${oc.create:{_target_: os.system}}", "a${oc.env:HOME}", "\\${x}"])
def test_what_would_be_resolved_again_is_refused(text: str) -> None:
    """`instantiate` resolves once more, after the check: what is text now would then be a class."""
    with pytest.raises(ValueError, match="resolved a second time"):
        check_targets({"_target_": "callbacks.niah_probe.NiahProbe", "needles": [text]}, "x")


@pytest.mark.parametrize("name", ["num_nodes", "devices", "max_steps"])
def test_numbers_of_the_trainer_fit_32_bits(name: str) -> None:
    """torch's rendezvous takes no others, and said so with a traceback."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=["paths.run=here", f"++trainer.{name}=1000000000000"])
    with pytest.raises(ValueError, match=rf"trainer\.{name}=1000000000000 must be at most 2147483647: lower it"):
        check_config(cfg)
