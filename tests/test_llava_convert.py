"""Promise: a LLaVA is read from Megatron's files and written to them as they are, or it is said why not."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shares import assert_same, numbered, read_files, read_tensors
from small import cut, megahf
from small_llava import KINDS, Kind, images, model
from tokenizers import Tokenizer, models

from megahf import convert, from_megatron, llava, verify
from megahf.architectures import fields
from megahf.arguments import grid
from megahf.checkpoint import open_checkpoint
from megahf.command_lines import command_line
from megahf.errors import Refused
from megahf.image_tokens import tags
from megahf.inspection import inspect
from megahf.layouts import Grid, layers
from megahf.llava_types import LANGUAGES
from megahf.plan import build
from megahf.run_arguments import run_arguments
from megahf.target import Target
from megahf.weights import weights

State = dict[str, torch.Tensor]
TP2_PP2: dict[str, Any] = {"tp": 2, "pp": 2, "divisible_by": 16}
ROWS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "embedder.weight")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def unmarked(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name != llava.MARK}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("format", ["torch", "torch_dist"])
@pytest.mark.parametrize("engine", [True, False])
def test_every_share_is_read_back_as_it_was(name: str, format: str, engine: bool) -> None:
    args, config = model(KINDS[name])
    if engine == ("affine" in name) or (not engine and ("experts" in name or "hybrid" in name)):
        pytest.skip("Megatron does not build it of these layers")
    copies = numbered(config)
    for sizes in (TP2_PP2, {"tp": 1, "divisible_by": 16}):
        target = Target.of(config, **sizes, format=format, engine=engine)
        plan = (read_files if format == "torch" else read_tensors)(unmarked(args), config, copies, target)
        assert plan.config == config
        plan.config = config.text_config
        assert_same(plan, config.text_config, copies)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_dummy_heads_are_zeros_on_every_rank_that_lacks_true_ones(ranks: int, format: str) -> None:
    args, config = model(KINDS["internvit"])
    copies, target = numbered(config), Target.of(config, tp=ranks, format=format, divisible_by=16)
    plan = (read_files if format == "torch" else read_tensors)(unmarked(args), config, copies, target)
    found = {copy.name: copy for copy in plan.copies if copy.blank}
    dummies = (24 // ranks + 1) * ranks - 25
    rows = found["vision_model.decoder.layers.0.self_attention.linear_qkv.weight"].blank[0][1]
    columns = found["vision_model.decoder.layers.0.self_attention.linear_proj.weight"].blank[0][1]
    assert (rows.shape, columns.shape) == ((3 * 2 * dummies, 8), (8, 2 * dummies))
    assert not rows.numpy().any() and not columns.numpy().any()


def written(path: Path, ranks: Callable[[str, torch.Tensor, int], torch.Tensor], **changes: Any) -> State:
    """CLIP before a Llama in files of TP2 PP2, made by hand: the encoder on the first stage, two layers on each."""
    kind = KINDS["clip"]
    args, config = model(kind._replace(args={**kind.args, **changes}))
    generator = torch.Generator().manual_seed(0)
    state = {weight.name: torch.randn(weight.shape, generator=generator) for weight in weights(config)}
    args |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "rank": 0}
    for stage in range(2):
        for rank in range(2):
            held = {place(name, stage): ranks(name, value, rank) for name, value in state.items()}
            file = path / "iter_0000007" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            content = {"args": Namespace(**unmarked(args)), "iteration": 7, "checkpoint_version": 3.0}
            torch.save({**content, "model": {key: value for key, value in held.items() if key}}, file)
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return state


def place(name: str, stage: int) -> str:
    """The key of a weight on a stage; empty where it is not held."""
    if name.startswith("language_model.decoder.layers."):
        number, rest = name.split(".", 4)[3:]
        return f"language_model.decoder.layers.{int(number) % 2}.{rest}" if int(number) // 2 == stage else ""
    last = name.startswith(("language_model.decoder.final", "language_model.output"))
    return name if last == bool(stage) else ""


def share(name: str, value: torch.Tensor, rank: int) -> torch.Tensor:
    """A tensor-parallel rank's share of two, by hand."""
    own = name.removeprefix("language_model.")
    if name != own:
        return cut(own, value, rank, 2, True)
    if name.endswith(ROWS):
        return value.chunk(2)[rank].clone()
    return value.chunk(2, 1)[rank].clone() if name.endswith(COLUMNS) else value.clone()


def test_files_made_by_hand_are_read_to_the_bit(tmp_path: Path) -> None:
    state = written(tmp_path / "ckpt", share)
    convert(tmp_path / "ckpt", tmp_path / "hf")
    verify(tmp_path / "ckpt", tmp_path / "hf")
    filled = from_megatron(tmp_path / "ckpt")
    found = {key.removeprefix("model."): value for key, value in filled.state_dict().items()}
    for name, value in state.items():
        place = name.replace(".layer_norm_", "_layernorm.").removeprefix("language_model." * ("output" in name))
        kept = value[: filled.config.text_config.vocab_size] if "word_emb" in name or "output" in name else value
        assert torch.equal(found[place], kept), name


def test_an_encoder_on_a_stage_of_its_own_is_read_with_its_own_ranks(tmp_path: Path) -> None:
    state = written(tmp_path / "ckpt", share)
    folder = tmp_path / "ckpt" / "iter_0000007"
    own = {"encoder_pipeline_model_parallel_size": 1, "encoder_tensor_model_parallel_size": 1}
    stages: dict[str, dict[str, Any]] = {}
    for rank in range(2):
        for stage in range(2):  # the language model's stages become the second and the third
            content = torch.load(folder / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt", weights_only=False)
            vars(content["args"]).update(own)
            text = {key: value for key, value in content["model"].items() if key.startswith("language_model.")}
            stages[f"mp_rank_{rank:02d}_{stage + 1:03d}"] = {**content, "model": text}
    images = {name: value for name, value in state.items() if not name.startswith("language_model.")}
    stages["mp_rank_00_000"] = {**stages["mp_rank_00_001"], "model": images}
    (folder / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    (folder / "mp_rank_01_000").rmdir()
    for name, content in stages.items():
        (folder / name).mkdir(exist_ok=True)
        torch.save(content, folder / name / "model_optim_rng.pt")
    found = {copy.name: copy.array.numpy() for copy in build(open_checkpoint(tmp_path / "ckpt")).copies}
    assert sorted(found) == sorted(state)
    for name, value in images.items():
        np.testing.assert_array_equal(found[name], value.numpy(), name)
    assert "an encoder's stage of TP1" in str(inspect(tmp_path / "ckpt")["written_by"])


def change(path: Path, alter: Callable[[dict[str, Any], str], Any]) -> None:
    for file in sorted(path.glob("*/mp_rank_*/model_optim_rng.pt")):
        content = torch.load(file, weights_only=False)
        alter(content, file.parent.name)
        torch.save(content, file)


def says(**args: Any) -> Callable[[dict[str, Any], str], Any]:
    return lambda content, rank: vars(content["args"]).update(args)


def without(start: str) -> Callable[[dict[str, Any], str], Any]:
    return lambda content, rank: [content["model"].pop(key) for key in list(content["model"]) if key.startswith(start)]


def adds(rank: str, key: str, value: torch.Tensor) -> Callable[[dict[str, Any], str], Any]:
    return lambda content, name: content["model"].update({key: value} if name == rank else {})


QKV, TABLE = "vision_model.decoder.layers.0.self_attention.linear_qkv.weight", "vision_model.position_embeddings.weight"
BAD: dict[str, tuple[Callable[[dict[str, Any], str], Any], tuple[str, ...]]] = {
    "an encoder that is not built": (says(vision_model_type="pixtral-vit"), ("'pixtral-vit' is an encoder", "clip")),
    "no encoder at all": (says(vision_model_type="eyes"), ("'eyes' is no encoder of Megatron's",)),
    "transformers' encoder": (
        says(vision_model_type="hf://google/siglip"), ("--vision-model-type hf://google/siglip is transformers' own",)
    ),
    "transformers' language model": (says(language_model_type="hf://x/y"), ("--language-model-type hf://x/y is",)),
    "a language model that is not known": (says(language_model_type="gpt9"), ("'gpt9' is not built", "mistral_7b")),
    "args of another script": (
        lambda content, rank: vars(content["args"]).pop("language_model_type"), ("do not say language_model_type",)
    ),
    "sound": (says(sound_model_type="nemo://x"), ("--sound-model-type nemo://x is a model that hears",)),
    "any size": (says(dynamic_resolution=True), ("--dynamic-resolution True is images of any size",)),
    "a side that is no patches": (says(img_h=15), ("img_h 15 is no multiple of patch_dim 4",)),
    "no encoder's weights": (without("vision_model"), ("the image encoder is not in this checkpoint",)),
    "no projection": (without("vision_projection"), ("the projection is not in this checkpoint",)),
    "one of the encoder's weights": (without(TABLE), ("missing weights", TABLE)),
    "the encoder on a later stage": (
        adds("mp_rank_00_001", QKV, torch.zeros(192, 8)), ("on pipeline stage 1", "on the first alone")
    ),
    "another size of images": (says(img_h=32), ("shapes do not fit: stored [17, 8]", "[33, 8]", TABLE)),
    "another encoder": (says(vision_model_type="siglip"), ("are not heads of 72 channels: no siglip",)),
    "weights of another encoder": (
        adds("mp_rank_00_000", "vision_model.mask_token", torch.zeros(1, 8)), ("exist only with mask token",)
    ),
    "a GPT's beside": (
        adds("mp_rank_00_000", "decoder.layers.0.mlp.linear_fc2.weight", torch.zeros(16, 12)), ("no LLaVA",)
    ),
    "learned positions": (
        says(position_embedding_type="learned_absolute"), ("Megatron counts an image as one learned position",)
    ),
    "a text's muP": (says(use_mup=True, mup_embedding_mult=2.0), ("not those of images",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    alter, said = BAD[name]
    written(tmp_path / "ckpt", share)
    change(tmp_path / "ckpt", alter)
    result = megahf("convert", tmp_path / "ckpt", tmp_path / "hf")
    assert result.exit_code == 1 and not (tmp_path / "hf").exists()
    assert all(" ".join(part.split()) in " ".join(result.output.split()) for part in said), result.output


OWN = {"encoder_pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}


def test_an_encoders_own_stage_comes_before_the_others() -> None:
    assert grid(OWN) == Grid(4, 3, expert_tensor=4, first=0, encoder=4)
    assert grid({**OWN, "encoder_tensor_model_parallel_size": 2}).encoder == 2
    assert layers(grid(OWN), 6) == {(0, 0): range(0), (1, 0): range(3), (2, 0): range(3, 6)}


@pytest.mark.parametrize(
    "more",
    [
        {"encoder_pipeline_model_parallel_size": 2},
        {"decoder_first_pipeline_num_layers": 1},
        {"virtual_pipeline_model_parallel_size": 2},
        {"language_model_type": "nemotron5-hybrid-8b"},
    ],
)
def test_an_encoders_own_stage_is_refused_where_no_rule_says_what_the_others_hold(more: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="which stage holds which layers is not known"):
        grid({**OWN, **more})


def saved(folder: Path, kind: Kind, **own: Any) -> Path:
    """A folder of the kind's model, with random weights."""
    from megahf.models.configuration_mcore_llava import McoreLlavaConfig
    from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration

    torch.manual_seed(0)
    config = McoreLlavaConfig(**{**fields(model(kind)[1]), **own})
    McoreLlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["internvit", "radio-g", "cradio-g, experts", "radio, a hybrid"])
@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_a_folder_comes_back_from_megatron_byte_for_byte(name: str, format: str, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", KINDS[name])
    convert(first, tmp_path / "there", to="megatron", format=format, **TP2_PP2)
    verify(first, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "again", to="megatron", format=format, divisible_by=16)
    convert(tmp_path / "again", tmp_path / "back")
    verify(tmp_path / "there", tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(first)
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (first, tmp_path / "back"))
    for name in ("text_config", "vision_config"):
        ours, other = mine.pop(name), theirs.pop(name)
        assert {field: ours.get(field) for field in other} == other
    assert {field: mine.get(field) for field in theirs} == theirs


def test_dummy_heads_that_are_not_zeros_are_refused(tmp_path: Path) -> None:
    convert(saved(tmp_path / "first", KINDS["internvit"]), tmp_path / "there", to="megatron", format="torch", **TP2_PP2)
    norm, proj = (
        f"vision_model.decoder.layers.1.self_attention.{name}.weight" for name in ("q_layernorm", "linear_proj")
    )

    def alter(content: dict[str, Any], rank: str) -> None:
        if rank == "mp_rank_01_000":
            content["model"][norm][-1] = content["model"][proj][0, -1] = 1.0

    change(tmp_path / "there", alter)
    layouts: dict[str, dict[str, Any]] = {"hf": {}, "megatron": {"tp": 4, "divisible_by": 16}}
    for target, layout in layouts.items():
        with pytest.raises(Refused, match="dummy heads that are not zeros") as error:
            convert(tmp_path / "there", tmp_path / target, to=target, **layout)
        assert proj in str(error.value) and norm not in str(error.value)


def tokenizer(folder: Path, words: list[str]) -> Path:
    """A tokenizer of whole words and of single letters."""
    letters = [*"<>_ abcdefghijklmnopqrstuvwxyz0123456789"]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(letters)}, []))
    made.add_special_tokens(words)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_says_which_token_is_an_image_and_which_are_in_front_of_tiles(tmp_path: Path) -> None:
    written(tmp_path / "ckpt", share, use_tile_tags=True, max_num_tiles=2, tokenizer_prompt_format="qwen2p5")
    with pytest.raises(Refused, match="give --tokenizer DIR"):
        convert(tmp_path / "ckpt", tmp_path / "hf")
    words = tokenizer(tmp_path / "words", ["<image>", "<tile_1>", "<tile_2>", "<tile_global_thumbnail>"])
    convert(tmp_path / "ckpt", tmp_path / "hf", tokenizer=words)
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (told["image_token_id"], told["tile_tags"]) == (40, [[41], [42], [43]])
    verify(tmp_path / "ckpt", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", to="megatron", divisible_by=16)
    assert open_checkpoint(tmp_path / "back").args["use_tile_tags"] is True
    with pytest.raises(Refused, match="tokens long, not all alike"):
        convert(tmp_path / "ckpt", tmp_path / "two", tokenizer=tokenizer(tmp_path / "words", ["<image>"]))


@pytest.mark.parametrize(
    ("tiles", "prompts", "first", "last"),
    [
        (6, "qwen2p5", "<tile_1>", "<tile_global_thumbnail>"),
        (6, "nvlm-yi-34b", "<tile_1>", "<tile_global>"),
        (6, "nemotron5", "<tile_01>", "<tile_global_thumbnail>"),
        (12, "qwen2p5", "<tile_01>", "<tile_global_thumbnail0>"),
        (12, "nvlm-yi-34b", "<tile_01>", "<tile_global0>"),
        (12, "llama3p1", "<tile_01>", "<tile_global_thumbnail>"),
    ],
)
def test_tags_are_spelled_as_megatrons_script_spells_them(tiles: int, prompts: str, first: str, last: str) -> None:
    made = tags(tiles, prompts)
    assert (made[0], made[-1], len(made)) == (first, last, tiles + 1)


@pytest.mark.parametrize("name", KINDS)
def test_args_say_every_field_or_the_weights_do_and_the_options_are_the_scripts(name: str) -> None:
    args, config = model(KINDS[name])
    made = run_arguments(
        config, Target.of(config, engine="affine" not in name), source_args=None, dtype="bf16", iteration=1
    )
    asked, line = made["language_model_type"], command_line(made, "x")
    kind, wanted = LANGUAGES[asked], LANGUAGES[args["language_model_type"]]
    assert (kind.activation, kind.norm, kind.bias) == (wanted.activation, wanted.norm, wanted.bias)
    assert f"--language-model-type {asked}" in line and f"--img-h {config.vision_config.img_h}" in line
    assert ("--disable-vision-class-token" in line) == config.drop_vision_class_token
    assert llava.MARK not in made


def test_a_type_says_more_than_the_arguments() -> None:
    args, _ = model(KINDS["clip"])
    text = llava.language({**args, "swiglu": False, "add_bias_linear": True, "apply_layernorm_1p": True})
    assert (text["swiglu"], text["add_bias_linear"], text["apply_layernorm_1p"]) == (True, False, False)
    text = llava.language({**args, **images("clip", "nemotron5-hybrid-12b"), "mamba_num_heads": 3})
    assert (text["is_hybrid_model"], text["mamba_num_heads"], text["squared_relu"]) == (True, 128, True)


def test_a_projection_that_no_type_has_is_not_written() -> None:
    _, config = model(KINDS["clip"])
    config.projection_activation_func = "quick_gelu"
    with pytest.raises(Refused, match="no --language-model-type of Megatron's is a language model of silu behind"):
        llava.arguments(config)


def test_what_has_to_be_known_before_it_is_loaded_is_said(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", KINDS["internvit"], image_token_id=3)
    said = megahf("convert", first, tmp_path / "there", "--to", "megatron", "--tp", 2, "--pp", 2).output
    said = " ".join(said.split())
    for part in ("--special-tokens '<image>' adds it", "the encoder's num_layers 45 -> 2", "add_encoder=pre_process"):
        assert part in said
    notes = json.loads((tmp_path / "there" / "megahf.json").read_text())["notes"]
    assert any("set kv_channels in get_vision_model_config" in note for note in notes)


def test_the_page_and_the_card_show_what_sees_and_what_speaks(tmp_path: Path) -> None:
    written(tmp_path / "ckpt", share)
    said = megahf("inspect", tmp_path / "ckpt").output
    for part in (
        "images: clip of 2 layers, hidden 8, 2 heads of 64", "4 x 4 patches, 1 class token left out", "no norm",
        "stages: pp0 the encoder + 0-1 | pp1 2-3",
        "nothing stands in the way",
    ):  # fmt: skip
        assert part in said, part
    report = json.loads(megahf("inspect", tmp_path / "ckpt", "--json").output)
    assert report["config"]["vision_config"]["vision_model_type"] == "clip"
    convert(tmp_path / "ckpt", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "# A LLaVA of" in card and "images: clip of 2 layers" in card
    assert "AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)" in card
