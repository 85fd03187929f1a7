"""Promise: a saved folder loads anywhere by transformers alone, and saving it again gives the same bytes.

Each class is saved here and loaded in a fresh process in which `import megahf` fails and the Hub is offline.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import stranger
import torch
from safetensors import safe_open
from tiny import LLAMA, VARIANTS, randomise, tiny, tiny_config, tokens
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

import megahf.models.modeling_mcore_gpt as gpt

MODELS = Path(gpt.__file__).parent
CLASSES = {
    "AutoModel": gpt.McoreGPTModel,
    "AutoModelForCausalLM": gpt.McoreGPTForCausalLM,
    "AutoModelForSequenceClassification": gpt.McoreGPTForSequenceClassification,
    "AutoModelForTokenClassification": gpt.McoreGPTForTokenClassification,
    "AutoModelForQuestionAnswering": gpt.McoreGPTForQuestionAnswering,
}
# Loads SRC by the class named AUTO, keeps what it computes, saves it again to DST.
FRESH = """
import sys
import torch, transformers
src, auto, dst = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(src, trust_remote_code=True)
model, info = getattr(transformers, auto).from_pretrained(src, trust_remote_code=True, output_loading_info=True)
assert type(model).auto_map["AutoConfig"].endswith("." + type(config).__name__), type(config)
assert type(model).__module__.startswith("transformers_modules")
assert not [name for name in sys.modules if name.split(".")[0] == "megahf"]
try:
    type(model).from_megatron("nowhere")
except ImportError as error:
    assert "pip install megahf" in str(error), error
with torch.no_grad():
    outputs = model(torch.load(src + "/ids.pt"))
missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
torch.save({"outputs": outputs[0], "missing": missing, "unexpected": unexpected}, src + "/out.pt")
if auto == "AutoModelForCausalLM":
    torch.save(model.generate(torch.load(src + "/ids.pt"), max_new_tokens=4, do_sample=False), src + "/generated.pt")
model.save_pretrained(dst)
"""


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".py")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_fresh(source: Path, auto: str, target: Path) -> dict[str, Any]:
    """What a fresh process makes of the folder."""
    torch.save(tokens(1, 7), source / "ids.pt")
    done = stranger.run(FRESH, source, auto, target, folder=source)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(source / "out.pt")


@pytest.mark.parametrize("auto", CLASSES)
def test_each_class_loads_and_saves_the_same_bytes_without_megahf(auto: str, tmp_path: Path) -> None:
    model = randomise(CLASSES[auto](tiny_config(**VARIANTS["window and sinks"]))).eval()
    model.save_pretrained(tmp_path / "first")
    out = load_fresh(tmp_path / "first", auto, tmp_path / "second")
    assert out["missing"] == out["unexpected"] == []
    with torch.no_grad():
        torch.testing.assert_close(out["outputs"], model(tokens(1, 7))[0], atol=0, rtol=0)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_shards_are_saved_again_with_the_same_bytes(tmp_path: Path) -> None:
    gpt.McoreGPTForCausalLM(tiny_config(**LLAMA, num_layers=12)).save_pretrained(tmp_path / "a", max_shard_size="40KB")
    gpt.McoreGPTForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_causal_model_is_loaded_by_the_base_class_and_the_reverse(tmp_path: Path) -> None:
    model = tiny(**LLAMA)
    model.save_pretrained(tmp_path / "causal")
    model.model.save_pretrained(tmp_path / "base")
    out = load_fresh(tmp_path / "causal", "AutoModel", tmp_path / "causal-again")
    assert (out["missing"], out["unexpected"]) == ([], ["output_layer.weight"])
    with torch.no_grad():
        torch.testing.assert_close(out["outputs"], model.model(tokens(1, 7))[0], atol=0, rtol=0)
    out = load_fresh(tmp_path / "base", "AutoModelForCausalLM", tmp_path / "base-again")
    assert (out["missing"], out["unexpected"]) == (["output_layer.weight"], [])


@pytest.mark.parametrize("tied", [True, False])
def test_names_on_disk_are_those_of_megatron(tied: bool, tmp_path: Path) -> None:
    tiny(**{**VARIANTS["sinks"], "num_layers": 1, "qk_layernorm": True, "tie_word_embeddings": tied}).save_pretrained(
        tmp_path
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layer = "decoder.layers.0."
    assert names == {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        f"{layer}self_attention.linear_qkv.layer_norm_weight",
        f"{layer}self_attention.linear_qkv.weight",
        f"{layer}self_attention.q_layernorm.weight",
        f"{layer}self_attention.k_layernorm.weight",
        f"{layer}self_attention.core_attention.softmax_offset",
        f"{layer}self_attention.linear_proj.weight",
        f"{layer}mlp.linear_fc1.layer_norm_weight",
        f"{layer}mlp.linear_fc1.weight",
        f"{layer}mlp.linear_fc2.weight",
    } | (set() if tied else {"output_layer.weight"})


def test_biases_of_norms_travel_too(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        bias = file.get_tensor("decoder.layers.1.mlp.linear_fc1.layer_norm_bias")
    assert torch.equal(bias, model.model.decoder.layers[1].mlp.linear_fc1_layernorm.bias)


def test_auto_map_names_every_class_whichever_was_saved(tmp_path: Path) -> None:
    gpt.McoreGPTModel(tiny_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", *CLASSES}
    for auto, model in CLASSES.items():
        assert auto_map[auto] == f"modeling_mcore_gpt.{model.__name__}"
    for path in {value.split(".")[0] + ".py" for value in auto_map.values()}:
        assert (tmp_path / path).exists()


@pytest.mark.parametrize("file", sorted(path.name for path in MODELS.glob("*.py")))
def test_every_file_that_travels_imports_only_what_everyone_has(file: str) -> None:
    check_imports(MODELS / file)
    absolute = [line for line in (MODELS / file).read_text().splitlines() if line.startswith(("import ", "from "))]
    allowed = {"__future__", "torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    assert {line.split()[1].split(".")[0] for line in absolute if not line.startswith("from .")} <= allowed
    for sibling in get_relative_import_files(MODELS / file):
        assert Path(sibling).parent == MODELS
