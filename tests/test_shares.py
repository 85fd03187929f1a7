"""What ranks store by `shares.py` and `global_tensors.py` reads back as it was, on every grid; the rest is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shares import assert_same, model, numbered, read_files, read_tensors
from small import GPT2
from small_experts import BIASED, LATENT_EXPERTS, MIXTRAL, MLA, SHARED, SIGMOID

from megahf.errors import Refused
from megahf.global_tensors import global_objects, global_tensors
from megahf.shares import places, ranked
from megahf.target import Target
from megahf.tiles import Tiled
from megahf.weights import WORDS

MIXER = {"mamba_state_dim": 6, "mamba_head_dim": 4, "mamba_num_groups": 4, "mamba_num_heads": 8, "num_query_groups": 4}
DEEPSEEK = {**MLA, **MIXTRAL, **SHARED, **SIGMOID, "moe_layer_freq": [0, 1, 1, 1], "mtp_num_layers": 1}
HYBRID: dict[str, Any] = {**MIXER, **MIXTRAL, "num_layers": 8, "position_embedding_type": "none"}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {**GPT2, "swiglu": False, "normalization": "LayerNorm", "add_bias_linear": True,
             "position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": False},
    "tied": {"untie_embeddings_and_output_weights": False, "qk_layernorm": True},
    "sinks": {"softmax_type": "learnable"},
    "mixtral": MIXTRAL,
    "experts with biases": {**MIXTRAL, **BIASED},
    "latent experts": {**MIXTRAL, **LATENT_EXPERTS, **SHARED, "moe_layer_freq": 2},
    "MLA": {**MLA, "q_lora_rank": 8},
    "MLA, straight queries": {**MLA, "q_lora_rank": None, "qk_layernorm": False},
    "deepseek": DEEPSEEK,
    "MTP": {"mtp_num_layers": 2},
    "MTP, tied": {"mtp_num_layers": 2, "untie_embeddings_and_output_weights": False},
    "MTP, experts": {**MIXTRAL, "mtp_num_layers": 1},
    "hybrid": {**HYBRID, "hybrid_override_pattern": "M*-ME-M*"},
    "hybrid with heads": {**HYBRID, "hybrid_override_pattern": "M*-ME-M*/*E/*E", "mtp_num_layers": 2},
}  # fmt: skip

STAGES: list[dict[str, Any]] = [
    {},
    {"pp": 2},
    {"pp": 4},
    {"pp": 2, "vpp": 2},
    {"pp": 2, "first": 1},
    {"pp": 2, "last": 1},
    {"pp": 3, "first": 1, "last": 1},
    {"pp": 3, "account_for_embedding": True, "account_for_loss": True},
    {"pp": 2, "layout": "Et|t|tt|{m}L"},
    {"pp": 4, "layout": "E|tt|tt|{m}L"},
    {"pp": 2, "layout": "Ettt|t{m}L"},
]
HYBRID_STAGES: list[dict[str, Any]] = [
    {}, {"pp": 2}, {"pp": 4}, {"pp": 2, "first": 3}, {"pp": 2, "last": 0},
    {"pp": 2, "layout": "M*-|ME-M*"}, {"pp": 2, "layout": "M|*-M||E-M*"},
]  # fmt: skip


@st.composite
def targets(draw: st.DrawFn, kind: str, format: str) -> dict[str, Any]:
    """Options of a target that Megatron has for a kind."""
    changes = KINDS[kind]
    stages = (
        HYBRID_STAGES if "hybrid" in kind else STAGES[:1] if (kind, format) == ("MTP, tied", "torch_dist") else STAGES
    )
    chosen = {"format": format, **draw(st.sampled_from(stages))}
    if "layout" in chosen:
        chosen["layout"] = chosen["layout"].replace("{m}", "m" * changes.get("mtp_num_layers", 0))
    chosen["tp"], chosen["engine"] = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    if "num_experts" in changes:
        biased, latent = changes.get("add_bias_linear", False), "moe_latent_size" in changes
        chosen["ep"] = draw(st.sampled_from([1, 2, 4, 8]))
        chosen["etp"] = 1 if biased else draw(st.sampled_from([size for size in (1, 2, 4) if size <= chosen["tp"]]))
        layouts = [
            "sequential",
            *(["te-grouped"] * chosen["engine"]),
            *(["legacy-grouped"] * (not biased and not latent)),
        ]
        chosen["experts"] = draw(st.sampled_from(layouts))
    return {**chosen, "divisible_by": draw(st.sampled_from([1, 5, 16]))}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_files_of_ranks_read_back_bit_for_bit(kind: str, data: st.DataObject) -> None:
    args, config = model(**KINDS[kind])
    copies, target = numbered(config), Target.of(config, **data.draw(targets(kind, "torch")))
    assert_same(read_files(args, config, copies, target), config, copies)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_global_tensors_are_covered_once_and_read_back_bit_for_bit(kind: str, data: st.DataObject) -> None:
    args, config = model(**KINDS[kind])
    copies = numbered(config)
    target = Target.of(config, **data.draw(targets(kind, "torch_dist")))
    assert_same(read_tensors(args, config, copies, target), config, copies)


def names(kind: str, **options: Any) -> tuple[list[str], int]:
    """The names of all copies, and the largest writer and process, of a target."""
    _, config = model(**KINDS[kind])
    target = Target.of(config, **options)
    copies = numbered(config)
    if target.format == "torch":
        files = ranked(config, copies, target)
        stored = [copy.name for models in files.values() for keys in models.values() for copy in keys.values() if copy]
        return stored, max(place.process for place in files)
    tensors = global_tensors(config, copies, target)
    writers = [piece.writer for tensor in tensors for piece in tensor.pieces]
    items = [item.writer for item in global_objects(config, target)]
    return [piece.copy.name for tensor in tensors for piece in tensor.pieces], max(*writers, *items)


@pytest.mark.parametrize("format", ["torch", "torch_dist"])
@pytest.mark.parametrize("kind", ["deepseek", "hybrid with heads"])
def test_every_copy_has_a_name_of_its_own_and_a_process_of_the_run(kind: str, format: str) -> None:
    stored, last = names(kind, format=format, tp=2, pp=2, ep=2, etp=1)
    assert not [name for name, count in Counter(stored).items() if count > 1]
    assert last == 3


def test_replicas_are_stored_once_together_and_in_every_file() -> None:
    _, config = model(**KINDS["mixtral"])
    copies, router = numbered(config), "decoder.layers.0.mlp.router.weight"
    files = ranked(config, copies, Target.of(config, tp=2, ep=2))
    assert [router in models["model"] for models in files.values()] == [True] * 4
    tensors = global_tensors(config, copies, Target.of(config, tp=2, ep=2, format="torch_dist"))
    (stacked,) = [tensor for tensor in tensors if tensor.key == "decoder.layers.mlp.router.weight"]
    assert [(piece.start, piece.writer) for piece in stacked.pieces] == [((layer, 0, 0), 0) for layer in range(4)]


def folders(**options: Any) -> list[str]:
    _, config = model(**KINDS["mixtral"])
    return [place.folder.removeprefix("mp_rank_") for place in places(Target.of(config, **options))]


def test_files_are_those_of_the_ranks_that_meet() -> None:
    assert folders() == ["00"]
    assert folders(tp=2, pp=2) == ["00_000", "01_000", "00_001", "01_001"]
    assert folders(tp=2, ep=2, etp=1) == ["00_000", "01_001"]
    assert folders(tp=4, ep=2, etp=1) == ["00_000", "01_001", "02_000", "03_001"]
    assert folders(tp=4, ep=2, etp=2) == ["00_000", "01_000", "02_001", "03_001"]
    assert folders(tp=2, pp=2, ep=2, etp=1) == ["00_000_000", "01_000_001", "00_001_000", "01_001_001"]


def test_rows_of_padding_are_zeros_and_padding_that_is_too_much_goes() -> None:
    _, config = model()
    copies = numbered(config)
    longer = Tiled.of(np.concatenate([copies[0].array.numpy(), np.full((200, 16), -7, np.float32)]))
    for words in (copies[0], replace(copies[0], array=longer)):
        target = Target.of(config, tp=2, divisible_by=32)
        assert target.vocabulary == 64
        files = ranked(config, [words, *copies[1:]], target)
        shares = [models["model"][WORDS] for models in files.values()]
        whole = np.concatenate([share.array.numpy() for share in shares if share])
        np.testing.assert_array_equal(whole[:61], copies[0].array.numpy())
        assert (whole[61:] == (0 if words is copies[0] else -7)).all()
        assert whole.shape == (64, 16)


def test_a_tied_output_layer_is_a_copy_on_a_last_stage_of_its_own_alone() -> None:
    _, config = model(**KINDS["tied"])
    copies = numbered(config)
    assert output_layers(ranked(config, copies, Target.of(config)).values()) == 0
    files = ranked(config, copies, Target.of(config, tp=2, pp=2))
    assert output_layers(files.values()) == 2
    tensors = global_tensors(config, copies, Target.of(config, pp=2, format="torch_dist"))
    assert "output_layer.weight" not in {tensor.key for tensor in tensors}


def output_layers(files: Iterable[dict[str, Any]]) -> int:
    return sum("output_layer.weight" in models["model"] for models in files)


def test_number_formats_stay_and_layers_of_one_tensor_have_one() -> None:
    _, config = model(**KINDS["deepseek"])
    target = Target.of(config, format="torch_dist")
    found = {tensor.dtype.name for tensor in global_tensors(config, numbered(config, np.float16), target)}
    assert found == {"float16", "float32"}  # the biases of the choice of experts
    _, config = model()
    copies = numbered(config)
    copies[5] = replace(copies[5], dtype=np.dtype(np.float16))
    with pytest.raises(Refused, match=r"stored as float16 and as float32 .*give one number format"):
        global_tensors(config, copies, Target.of(config, format="torch_dist"))


@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_what_is_stored_again_is_compared_once_for_each_share(format: str) -> None:
    _, config = model(**KINDS["mixtral"])
    copies = [replace(copy, same=(("there", copy.array),)) for copy in numbered(config)]
    target = Target.of(config, tp=2, ep=2, format=format)
    if format == "torch":
        files = ranked(config, copies, target)
        stored = [copy for models in files.values() for copy in models["model"].values() if copy]
    else:
        stored = [piece.copy for tensor in global_tensors(config, copies, target) for piece in tensor.pieces]
    compared = [copy for copy in stored if copy.same]
    for copy in compared:
        ((where, array),) = copy.same
        assert where == "there"
        np.testing.assert_array_equal(array.numpy(), copy.array.numpy())
    padding = 2 * (target.vocabulary - config.vocab_size) * config.hidden_size * 4  # bytes, of two matrices
    assert sum(copy.array.nbytes for copy in compared) == sum(copy.array.nbytes for copy in copies) + padding


NARROW = {**MLA, "q_lora_rank": 6, "ffn_hidden_size": 18}  # its heads divide where these do not

REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no size": ("llama", {"tp": 0}, "TP is 0, not a number of at least 1"),
    "format": ("llama", {"format": "zarr"}, "format is 'zarr', not one of torch, torch_dist"),
    "held": ("llama", {"experts": "packed"}, "experts is 'packed', not one of te-grouped"),
    "heads": ("llama", {"tp": 3}, "4 attention heads do not divide over 3 tensor-parallel ranks"),
    "groups": ("llama", {"tp": 3}, "2 query groups are neither a multiple nor a divisor of 3"),
    "ffn": ("narrow", {"tp": 4}, r"18 places do not divide over 4 .*\(.*axis 1 of decoder.layers.\*.mlp.linear_fc2.w"),
    "layers": ("llama", {"pp": 3}, "4 layers do not divide over 3 pipeline stages .*choose other stages"),
    "chunks": ("llama", {"pp": 2, "vpp": 3}, r"stages of \[2, 2\] layers do not divide into 3 virtual chunks"),
    "one stage": ("llama", {"vpp": 2, "first": 1}, "first is given, but there is one pipeline rank"),
    "layout": ("llama", {"pp": 2, "layout": "Ett|t"}, "is not E, then t for each layer"),
    "layout, layers": ("llama", {"pp": 2, "layout": "Ett|tL"}, "hold 3 layers, the model has 4"),
    "layout and more": ("llama", {"pp": 2, "layout": "Ett|ttL", "last": 2}, "first and last do not go with it"),
    "layout, heads": ("MTP", {"pp": 2, "layout": "Ett|ttmL"}, "has 1 m, the model has 2 heads"),
    "layout, heads apart": ("MTP", {"pp": 2, "layout": "Ettttm|mL"}, "does not have all m in one stage"),
    "no experts": ("llama", {"ep": 2, "etp": 2}, "EP is 2, but the model has no experts"),
    "experts": ("mixtral", {"ep": 3}, "8 experts do not divide over 3 expert-parallel ranks"),
    "width of experts": ("mixtral", {"tp": 8, "etp": 8}, r"12 places .* over 8 expert-tensor.*\(axis 1 of .*, axis 2"),
    "ETP of files": ("mixtral", {"tp": 1, "etp": 2}, "experts cut over 2 ranks do not fit .* files of 1 tensor ranks"),
    "biases cut": ("experts with biases", {"tp": 2}, "experts with biases are not cut: ETP is 2"),
    "biases grouped": ("experts with biases", {"experts": "legacy-grouped"}, "legacy-grouped experts have no biases"),
    "latent grouped": ("latent experts", {"experts": "legacy-grouped"}, "have no a latent size"),
    "grouped without TE": ("mixtral", {"engine": False, "experts": "te-grouped"}, "are Transformer Engine's"),
    "latent cut": ("narrow", {"tp": 4, "engine": False}, "6 places .*axis 0 of .*linear_q_down_proj.weight"),
    "Mamba heads": ("hybrid", {"tp": 16}, "8 Mamba heads do not divide over 16"),
    "Mamba groups": ("hybrid", {"tp": 8}, "4 Mamba groups do not divide over 8"),
    "heads apart": ("MTP, tied", {"pp": 2, "format": "torch_dist"}, "a tied output layer and heads for further tokens"),
    "hybrid chunks": ("hybrid", {"pp": 2, "vpp": 2}, r"virtual chunks only by a pattern with \|"),
    "hybrid accounts": ("hybrid", {"pp": 2, "account_for_loss": True}, "hybrids have no account_for_loss"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_megatron_could_not_load_is_refused_with_its_numbers(reason: str) -> None:
    kind, asked, message = REFUSALS[reason]
    _, config = model(**{**KINDS, "narrow": NARROW}[kind])
    with pytest.raises(Refused, match=message):
        Target.of(config, **asked)


def test_what_follows_from_another_reason_is_not_said() -> None:
    _, config = model(**KINDS["hybrid"])
    with pytest.raises(Refused) as refused:
        Target.of(config, tp=16)
    assert [line.split(" do ")[0] for line in str(refused.value).splitlines()[:-1]] == [
        "4 attention heads", "8 Mamba heads", "4 Mamba groups",
    ]  # fmt: skip


def test_all_reasons_are_given_at_once() -> None:
    _, config = model(**KINDS["deepseek"])
    with pytest.raises(Refused) as refused:
        Target.of(config, tp=3, pp=3, ep=3, experts="packed")
    found = str(refused.value)
    for part in ("4 attention heads", "8 experts", "pipeline stages", "'packed'"):
        assert part in found


def test_zero_centred_gamma_needs_transformer_engine() -> None:
    _, config = model(layernorm_zero_centered_gamma=True)
    with pytest.raises(Refused, match="Megatron's own layers do not have it"):
        Target.of(config, engine=False)
