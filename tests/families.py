"""Models of transformers' own architectures, small and random, taken to a folder of ours and back again.

transformers is the oracle: its class makes the files, computes the logits, and loads what was lowered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from tiny import randomise, tokens
from torch import Tensor

import megahf
from megahf import convert
from megahf.errors import Refused
from megahf.families import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(config: T.PretrainedConfig, dtype: torch.dtype = torch.float32) -> T.PreTrainedModel:
    """transformers' causal language model of `config`; every parameter and stored buffer is random."""
    model = randomise(T.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)).eval()
    stored = model.state_dict()
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def loaded(folder: Path) -> T.PreTrainedModel:
    """The model in `folder`, ours or transformers' own, without a word of complaint about its weights."""
    megahf.register()
    model, said = T.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    return model.eval()


@torch.no_grad()
def logits(model: T.PreTrainedModel, length: int = 40) -> Tensor:
    """Logits `[2, length, V]` of random tokens."""
    return model(tokens(2, length, vocabulary=model.config.vocab_size)).logits


def roundtrip(
    model: T.PreTrainedModel, tmp_path: Path, atol: float = 1e-5, max_shard_size: str = "5GB"
) -> tuple[Path, Path, Path]:
    """Saves `model`, brings it into a folder of ours and lowers that again: the same logits, the same bytes.

    A model is saved once it was loaded: transformers shares the weights of a new one out over files in another order.

    Returns:
        the folders `theirs` (as transformers saved it), `ours` and `back`.
    """
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    model.save_pretrained(tmp_path / "new")
    loaded(tmp_path / "new").save_pretrained(theirs, max_shard_size=max_shard_size)
    convert(theirs, ours, to="hf")
    expected = logits(model)
    assert expected.abs().max() > 1, "the logits are too small to tell a right model from a wrong one"
    torch.testing.assert_close(logits(loaded(ours)), expected, atol=atol, rtol=1e-5)
    convert(ours, back, to=config_of(theirs)["model_type"], max_shard_size=max_shard_size)
    assert stored(back) == stored(theirs)
    again = loaded(back)
    assert type(again) is type(model)
    again.set_attn_implementation("eager")
    assert torch.equal(logits(again), expected)
    return theirs, ours, back


def stored(folder: Path) -> dict[str, bytes]:
    """The files of the weights, and their index."""
    names = (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"))
    return {path.name: path.read_bytes() for path in names}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, *without: str, **changes: Any) -> Path:
    """Rewrites config.json in `folder`: with `changes`, `without` those keys."""
    config = {key: value for key, value in config_of(folder).items() if key not in without}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def refusal(source: Path, target: Path, to: str = "hf") -> str:
    """The words with which `source` is not made `target`; nothing is left there."""
    with pytest.raises(Refused) as error:
        convert(source, target, to=to)
    assert not target.exists()
    return str(error.value)


def refusal_of(config: T.PretrainedConfig, tmp_path: Path, *without: str, **changes: Any) -> str:
    """The words with which a model of transformers' own is not taken in, after `changes` to its config.json."""
    model_of(config).save_pretrained(tmp_path / "theirs")
    return refusal(change(tmp_path / "theirs", *without, **changes), tmp_path / "ours")


def refusal_to_lower(model: T.PreTrainedModel, family: str, tmp_path: Path) -> str:
    """The words with which a model of ours is not made one of `family`."""
    model.save_pretrained(tmp_path / "ours")
    return refusal(tmp_path / "ours", tmp_path / "back", family)


def unheard_of(config: T.PretrainedConfig) -> set[str]:
    """Settings that transformers writes and our family neither reads nor knows to do nothing."""
    return set(config.to_dict()) - FAMILIES[config.model_type].keys
