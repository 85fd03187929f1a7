"""Promise: the model may be spread over memory, disk and processes, or compiled, and says the same.

Without a GPU: layers on the CPU and on disk, `torch.compile`, tensor parallelism of two processes over gloo.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from tiny import LLAMA, VARIANTS, tiny, tokens
from transformers import AutoModelForCausalLM, StaticCache

import megahf
from megahf import McoreGPTForCausalLM

megahf.register()

SPREAD = {
    "model.embedding": "cpu",
    "model.rotary_pos_emb": "cpu",
    "model.decoder.layers.0": "disk",
    "model.decoder.layers.1": "cpu",
    "model.decoder.final_layernorm": "cpu",
    "output_layer": "cpu",
}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("variant", ["gpt2", "llama", "window and sinks"])
@torch.no_grad()
def test_layers_on_disk_change_nothing(variant: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    model = tiny(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "model")
    places = {name: place for name, place in SPREAD.items() if variant != "gpt2" or name != "model.rotary_pos_emb"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=disk)
    layers = spread.model.decoder.layers
    assert {parameter.device.type for parameter in layers[0].parameters()} == {"meta"}
    assert {parameter.device.type for parameter in layers[1].parameters()} == {"cpu"}
    assert torch.equal(spread(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert torch.equal(spread.generate(tokens(2, 9), **GREEDY), model.generate(tokens(2, 9), **GREEDY))


@torch.no_grad()
def test_a_map_made_for_little_memory_splits_no_layer(tmp_path: Path) -> None:
    model = tiny(**VARIANTS["window and sinks"], num_layers=6)
    expected, size = model(tokens(2, 9)).logits, sum(x.numel() * x.element_size() for x in model.parameters())
    memory = {"cpu": int(0.7 * size)}
    places = infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules))
    split = {name for name in places if name.startswith("model.decoder.layers.") and name.count(".") > 3}
    assert not split and {"cpu", "disk"} == {str(place) for place in places.values()}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "disk")
    assert torch.equal(spread(tokens(2, 9)).logits, expected)


@torch.no_grad()
def test_an_automatic_map_loads_a_saved_folder(tmp_path: Path) -> None:
    model = tiny(**LLAMA, num_layers=6)
    model.save_pretrained(tmp_path / "model")
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(spread(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@torch.no_grad()
def test_compiled_decoding_says_the_same() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler: torch.compile cannot be tested here; install g++ or set CXX")
    model, whole = tiny(**LLAMA, num_layers=1), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(whole[:, :8], past_key_values=cache)
    for end in range(9, 13):
        found = compiled(whole[:, end - 1 : end], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, model(whole[:, :end]).logits[:, -1], rtol=1e-4, atol=1e-5)


def shared(variant: str) -> McoreGPTForCausalLM:
    """A model whose vocabulary two processes can share out evenly, as transformers 5.17 still asks."""
    return tiny(**VARIANTS[variant], vocab_size=62)


PARALLEL = ["gpt2", "llama", "sinks", "off by one", "window and sinks", "gate and norms"]
# Each rank loads its part of the folders at sys.argv[1] with the code that lies in them.
RANKS = """
import sys
from pathlib import Path
sys.modules["megahf"] = None  # an import of it fails
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
dist.init_process_group("gloo")
torch.manual_seed(0)
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if (path / "config.json").is_file()):
    load = {"trust_remote_code": True, "distributed_config": DistributedConfig(tp_size=2)}
    if dist.get_rank() == 0:  # one copies the code into the cache, then both import it
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    found = {"local": {name: tuple(getattr(x, "to_local", lambda: x)().shape) for name, x in model.named_parameters()}}
    ids = torch.load(folder / "ids.pt")
    with torch.no_grad():
        found["logits"] = model(ids).logits
        greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "disable_compile": True}
        found["dynamic"] = model.generate(ids, **greedy)
        found["static"] = model.generate(ids, cache_implementation="static", **greedy)
        found["in chunks"] = model.generate(ids, cache_implementation="static", prefill_chunk_size=4, **greedy)
    model.train()
    model(ids, labels=ids).loss.backward()
    full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
    found["gradients"] = {name: full(x.grad) for name, x in model.named_parameters()}
    model.save_pretrained(folder / "again", is_main_process=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder a variant, with what two processes made of it in found.pt and again/."""
    root = tmp_path_factory.mktemp("parallel")
    for variant in PARALLEL:
        shared(variant).save_pretrained(root / variant)
        torch.save(tokens(2, 9), root / variant / "ids.pt")
    (root / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "cache")}
    with (root / "log").open("w") as log:
        command = [*launcher, str(root / "ranks.py"), str(root)]
        run = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log, start_new_session=True)
        try:
            code = run.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            code = run.wait()
    assert code == 0, (root / "log").read_text()[-5000:]
    yield root


@pytest.mark.parametrize("variant", PARALLEL)
def test_two_processes_say_what_one_says(variant: str, parallel: Path) -> None:
    model, found = shared(variant), torch.load(parallel / variant / "found.pt")
    layer = "model.decoder.layers.0."
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        rows, columns = model.get_parameter(f"{layer}{name}.weight").shape
        assert found["local"][f"{layer}{name}.weight"] == (rows // 2, columns)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(tokens(2, 9)).logits, rtol=1e-4, atol=1e-5)
    alone = model.generate(tokens(2, 9), **GREEDY)
    for way in ("dynamic", "static", "in chunks"):
        assert torch.equal(found[way], alone), way


@pytest.mark.parametrize("variant", PARALLEL)
def test_two_processes_find_the_gradients_of_one(variant: str, parallel: Path) -> None:
    model = shared(variant).train()
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = torch.load(parallel / variant / "found.pt")["gradients"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", PARALLEL)
def test_two_processes_save_the_bytes_they_loaded(variant: str, parallel: Path) -> None:
    before, after = parallel / variant, parallel / variant / "again"
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
