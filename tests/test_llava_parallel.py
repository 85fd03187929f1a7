"""Promise: processes that share a LLaVA say what one says and learn what it learns, the encoder included.

Two processes over gloo, as in tests/test_parallel.py: heads and widths of the encoder, of the projection and of the
language model are shared out where transformers can cut them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import VARIANTS, batch, tiny_llava, tiny_llava_config, tiny_vision_config
from torch import Tensor

from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration

# A gate with biases (RADIO-g's) is whole on both processes, norms over all heads keep attention whole.
CASES = [("tp", name) for name in ("clip", "internvit", "radio, gate", "radio-g, hybrid", "siglip, affine")]
CASES += [("fsdp", "clip")]
RANKS = """
import sys
from pathlib import Path
import torch, torch.distributed as dist, transformers
import megahf
from transformers.distributed import DistributedConfig
megahf.register()
dist.init_process_group("gloo")
full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    inputs, way = torch.load(folder / "inputs.pt")
    load = {"distributed_config": DistributedConfig(**way)}
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **load)
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    gradients = {name: full(x.grad) for name, x in model.named_parameters() if x.grad is not None}
    cut = [name for name, x in model.named_parameters() if getattr(x, "to_local", lambda: x)().shape != x.shape]
    found = {"logits": out.logits.detach(), "gradients": gradients, "cut": cut}
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
dist.destroy_process_group()
"""


def whole(variant: str) -> McoreLlavaForConditionalGeneration:
    """The model as one process has it, of heads and words that two can share out."""
    heads = {} if variant == "internvit" else {"num_attention_heads": 4}
    vision = tiny_vision_config(VARIANTS[variant][0], **heads, force_cpe_eval_mode=True)
    text = {**tiny_llava_config(variant).text_config.to_dict(), "vocab_size": 62}
    return tiny_llava(variant, vision_config=vision, text_config=text)


def folder_of(way: str, variant: str) -> str:
    return f"{way} {variant}".replace(" ", "_").replace(",", "")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case, with what two processes made of it in `found.pt`."""
    root = tmp_path_factory.mktemp("parallel")
    for way, variant in CASES:
        model = whole(variant)
        model.save_pretrained(root / folder_of(way, variant))
        torch.save((batch(model.config), {f"{way}_size": 2}), root / folder_of(way, variant) / "inputs.pt")
    (root / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(root / "ranks.py"), str(root)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    return root


@pytest.mark.parametrize(("way", "variant"), CASES)
def test_two_processes_say_and_learn_what_one_does(way: str, variant: str, parallel: Path) -> None:
    model, found = whole(variant).eval(), torch.load(parallel / folder_of(way, variant) / "found.pt")
    inputs: dict[str, Tensor] = batch(model.config)
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    torch.testing.assert_close(found["logits"], out.logits, rtol=1e-4, atol=1e-5)
    expected = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    torch.testing.assert_close(found["gradients"], expected, rtol=1e-4, atol=1e-5)


PARTS: dict[str, set[str]] = {
    "clip": {"self_attention", "mlp", "vision_projection"},
    "internvit": {"mlp", "vision_projection"},
    "radio, gate": {"self_attention", "mlp", "vision_projection"},
    "radio-g, hybrid": {"self_attention", "vision_projection"},
    "siglip, affine": {"self_attention", "mlp"},
}


@pytest.mark.parametrize("variant", PARTS)
def test_the_parts_that_are_shared_out_are_cut(variant: str, parallel: Path) -> None:
    cut: list[Any] = torch.load(parallel / folder_of("tp", variant) / "found.pt")["cut"]
    seen = [name.split(".") for name in cut if "vision" in name]
    assert {part for name in seen for part in name if part in ("self_attention", "mlp", "vision_projection")} == PARTS[
        variant
    ]
