"""Promise: processes that share a model say what one says, learn what it learns, and save the bytes they loaded.

Two processes over gloo share saved folders by tensor, expert and data parallelism (FSDP2) of transformers, with the
code that lies in the folders. What cannot be shared out is refused in words.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, MIXTURES, MLA, VARIANTS, tiny, tiny_hybrid, tokens
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from megahf.models import moe
from megahf.models.ops import grouped_linear

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
VOCABULARY = {"vocab_size": 62}  # which two processes can share out evenly, as transformers 5.17 still asks
DENSE = ["gpt2", "llama", "sinks", "off by one", "window and sinks", "gate and norms", "further tokens"]
TIED = {"tied": {**LLAMA, "tie_word_embeddings": True}}
MODELS = {name: VARIANTS[name] for name in (*DENSE, "latents", "latents, window and sinks")} | TIED | MIXTURES
HYBRIDS = ["everything", "latents", "mamba 1"]
WAYS: dict[str, dict[str, Any]] = {"tp": {"tp_size": 2}, "fsdp": {"fsdp_size": 2}}
if "ep_size" in DistributedConfig.__dataclass_fields__:
    WAYS |= {"ep": {"tp_size": 2, "ep_size": 2}, "fsdp and ep": {"fsdp_size": 2, "ep_size": 2}}
else:
    WAYS |= {"ep": {"tp_size": 2, "enable_expert_parallel": True}}
SENT = ["experts", "experts with biases", "latents and experts"]
CASES = [("tp", name) for name in MODELS]
CASES += [("fsdp", name) for name in ("tied", *SENT)]
CASES += [("ep", name) for name in MIXTURES]
CASES += [("fsdp and ep", name) for name in SENT if "fsdp and ep" in WAYS]
CASES += [("tp", f"hybrid {name}") for name in HYBRIDS] + [(way, "hybrid everything") for way in ("fsdp", "ep")]

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "groups": ({**LLAMA, "num_query_groups": 1}, {"tp_size": 2}, "num_query_groups, 1, does not share out over 2"),
    "heads": (
        {**MLA, "num_attention_heads": 3, "num_query_groups": 3},
        {"tp_size": 2},
        "num_attention_heads, 3, does not share out over 2",
    ),
    "widths": (
        {**MIXTURES["experts with biases"], "moe_ffn_hidden_size": 25},
        {"tp_size": 2},
        "moe_ffn_hidden_size, 25, does not share out over 2",
    ),
    "experts": ({**MIXTURES["experts"], "num_experts": 3}, WAYS["ep"], "Cannot evenly shard 3 experts across 2"),
    "no experts": (LLAMA, WAYS["ep"], "McoreGPTForCausalLM"),
    "stages": (LLAMA, {"pp_size": 2}, "tp_size, fsdp_size and ep_size share the model out"),
}

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
first, root = dist.get_rank() == 0, Path(sys.argv[1])
full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
local = lambda x: tuple(getattr(x, "to_local", lambda: x)().shape)

def use(model, way):
    found = {"shapes": {name: (local(x), tuple(x.shape)) for name, x in model.named_parameters()}}
    with torch.no_grad():
        found["logits"] = model(ids).logits
        greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "disable_compile": True}
        found["dynamic"] = model.generate(ids, **greedy)
        if way == "tp":
            found["static"] = model.generate(ids, cache_implementation="static", **greedy)
            found["in chunks"] = model.generate(ids, cache_implementation="static", prefill_chunk_size=4, **greedy)
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    found["loss"] = loss.detach()
    found["gradients"] = {name: full(x.grad).clone() for name, x in model.named_parameters()}
    model.zero_grad()
    model.config.loss_chunk_size = 4
    loss = model(ids, labels=ids).loss
    loss.backward()
    model.config.loss_chunk_size = None
    found["loss in chunks"] = loss.detach()
    found["gradients in chunks"] = {name: full(x.grad) for name, x in model.named_parameters()}
    return found

for folder in sorted(path for path in root.iterdir() if (path / "ways.pt").is_file()):
    if first:  # one copies the code into the cache, then both import it
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    dist.barrier()
    ids = torch.load(folder / "ids.pt")
    for way, sizes in torch.load(folder / "ways.pt").items():
        load = {"trust_remote_code": True, "distributed_config": DistributedConfig(**sizes)}
        if way == "refused":
            try:
                AutoModelForCausalLM.from_pretrained(folder, **load)
                found = "loaded"
            except ValueError as error:
                found = str(error)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
            found = use(model, way)
            model.save_pretrained(folder / f"again by {way}", is_main_process=first)
        if first:
            torch.save(found, folder / f"{way}.pt")
        dist.barrier()
dist.destroy_process_group()
"""


def whole(name: str) -> PreTrainedModel:
    """The model as one process has it, with biases of experts' scores that make a difference."""
    if name.startswith("hybrid "):
        model: PreTrainedModel = tiny_hybrid(name.removeprefix("hybrid "), **VOCABULARY)
    else:
        model = tiny(**MODELS[name], **VOCABULARY)
    for buffer, values in model.named_buffers():
        if buffer.endswith("expert_bias"):
            values.copy_(torch.linspace(-0.3, 0.3, len(values)))
    return model


def folder_of(name: str) -> str:
    """A name that Python takes for a module's."""
    return name.replace(" ", "_").replace(",", "")


def put(model: PreTrainedModel, folder: Path, ways: dict[str, Any]) -> None:
    """A saved folder with what `RANKS` is to do with it."""
    model.save_pretrained(folder)
    torch.save(tokens(2, 9), folder / "ids.pt")
    torch.save(ways, folder / "ways.pt")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder a model, with what two processes made of it in `{way}.pt` and `again by {way}`."""
    root = tmp_path_factory.mktemp("parallel")
    for name in {name for _, name in CASES}:
        put(whole(name), root / folder_of(name), {way: WAYS[way] for way, of in CASES if of == name})
    for name, (changes, sizes, _) in REFUSED.items():
        put(tiny(**changes, **VOCABULARY), root / folder_of(f"refused {name}"), {"refused": sizes})
    (root / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "cache")}
    with (root / "log").open("w") as log:
        command = [*launcher, str(root / "ranks.py"), str(root)]
        run = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log, start_new_session=True)
        try:
            code = run.wait(timeout=500)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            code = run.wait()
    assert code == 0, (root / "log").read_text()[-5000:]
    yield root


@pytest.mark.parametrize(("way", "name"), CASES)
def test_two_processes_say_what_one_says(way: str, name: str, parallel: Path) -> None:
    model, found = whole(name), torch.load(parallel / folder_of(name) / f"{way}.pt")
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(tokens(2, 9)).logits, rtol=1e-4, atol=1e-5)
    alone = model.generate(tokens(2, 9), **GREEDY)
    for kind in {"dynamic", "static", "in chunks"} & found.keys():
        assert torch.equal(found[kind], alone), kind


@pytest.mark.parametrize(("way", "name"), CASES)
def test_two_processes_find_the_loss_and_the_gradients_of_one(way: str, name: str, parallel: Path) -> None:
    model, found = whole(name).train(), torch.load(parallel / folder_of(name) / f"{way}.pt")
    loss = model(tokens(2, 9), labels=tokens(2, 9)).loss
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for way in ("", " in chunks"):
        torch.testing.assert_close(found["loss" + way], loss.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["gradients" + way], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("way", "name"), CASES)
def test_two_processes_save_the_bytes_they_loaded(way: str, name: str, parallel: Path) -> None:
    before, after = parallel / folder_of(name), parallel / folder_of(name) / f"again by {way}"
    files = {path.name for path in before.iterdir() if path.suffix in (".safetensors", ".json", ".py")}
    assert {path.name for path in after.iterdir()} == files
    for file in files:
        assert (after / file).read_bytes() == (before / file).read_bytes(), file


HALVES = {  # what each of two processes has half of, by the ends of its names; all else it has whole
    "tp": (
        *("word_embeddings.weight", "output_layer.weight", "core_attention.softmax_offset"),
        *("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight"),
        *("linear_q_proj.weight", "linear_q_up_proj.weight", "linear_kv_up_proj.weight"),
        *("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight"),
        *("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj"),
    ),
    "ep": tuple(f"experts.{name}{bias}" for name in ("gate_up_proj", "down_proj") for bias in ("", "_bias")),
}


@pytest.mark.parametrize(("way", "name"), [case for case in CASES if case[0] in HALVES])
def test_each_process_has_its_half_of_what_is_shared(way: str, name: str, parallel: Path) -> None:
    shapes = torch.load(parallel / folder_of(name) / f"{way}.pt")["shapes"]
    sizes = {name: (torch.Size(mine).numel(), torch.Size(all_).numel()) for name, (mine, all_) in shapes.items()}
    assert {mine / all_ for mine, all_ in sizes.values()} <= {0.5, 1.0}
    halves = {name for name, (mine, all_) in sizes.items() if mine < all_}
    if way == "ep":
        halves = {name for name in halves if ".experts." in name}  # tensor parallelism has the rest
    assert halves == {name for name in sizes if name.endswith(HALVES[way])}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_share_out_is_refused_in_words(name: str, parallel: Path) -> None:
    assert REFUSED[name][2] in torch.load(parallel / folder_of(f"refused {name}") / "refused.pt")


class Undefined(torch.autograd.Function):
    """Makes rows from `start` on NaN, and their gradients: a grouped matmul does not define those of no group."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, start: int) -> torch.Tensor:
        ctx.start = start
        return torch.cat((x[:start], torch.full_like(x[start:], torch.nan)))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return Undefined.forward(ctx, grad, ctx.start), None


@pytest.mark.parametrize("name", ["experts", "gated experts with biases"])
def test_experts_that_others_hold_leave_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def undefined(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return Undefined.apply(grouped_linear(Undefined.apply(x, int(ends[-1])), weight, ends), int(ends[-1]))

    monkeypatch.setattr(moe, "grouped_linear", undefined)
    experts = tiny(**MIXTURES[name]).model.decoder.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=generator).requires_grad_()
    weights = torch.rand(6, 2, generator=generator).requires_grad_()
    chosen = torch.tensor([[0, 4], [4, 4], [1, 0], [4, 2], [3, 1], [4, 4]])  # 4: held elsewhere
    experts._is_expert_parallel = True
    out = experts(hidden, chosen, weights)
    out.square().sum().backward()
    assert not out[[1, 5]].any() and not hidden.grad[[1, 5]].any() and not weights.grad[chosen == 4].any()
    found = out.detach(), hidden.grad, weights.grad, [x.grad for x in experts.parameters()]
    hidden.grad = weights.grad = None
    experts.zero_grad()
    experts._is_expert_parallel, masked = False, weights.masked_fill(chosen == 4, 0)
    monkeypatch.undo()
    out = experts(hidden, chosen.clamp(max=3), masked)
    out.square().sum().backward()
    expected = out.detach(), hidden.grad, weights.grad, [x.grad for x in experts.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
