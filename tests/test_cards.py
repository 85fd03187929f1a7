"""Promise: a converted folder has a card that the Hub takes and that is true; the pages are what the rows say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hub
import pytest
from huggingface_hub import ModelCard
from small import megahf, write_torch
from small_hybrid import write_hybrid
from tiny import BERTS, HYBRIDS, MIXTURES, VARIANTS, tiny_bert_config, tiny_config, tiny_hybrid_config

import megahf as package
from megahf import cards, convert, rows
from megahf import weights as table
from megahf.cards import card
from megahf.cuts import mixer_width
from megahf.export import plan_for
from megahf.families import FAMILIES
from megahf.folder import provenance
from megahf.plan import Plan

PAGES = Path(package.__file__).parents[1] / "model_cards"
sys.path.insert(0, str(PAGES))

import pages  # noqa: E402

SAMPLES = Path(package.__file__).with_name("samples")
CONFIGS: dict[str, Any] = {
    **{name: tiny_config(**fields) for name, fields in {**VARIANTS, **MIXTURES}.items()},
    **{f"hybrid, {name}": tiny_hybrid_config(name) for name in HYBRIDS},
    **{f"BERT, {name}": tiny_bert_config(**fields) for name, fields in BERTS.items()},
}
FRESH = """
import sys
sys.modules["megahf"] = None
{code}
print(type(model).__name__)
"""


def made(plan: Plan, **options: Any) -> ModelCard:
    return ModelCard(card(plan, provenance(plan, {"a": "b"}), **options).decode())


def python_of(card: ModelCard, name: Path | str) -> list[str]:
    """The Python that a card shows, for the folder `name`."""
    code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return [text.replace("ORG/NAME", str(name)) for text in code]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def zen() -> Plan:
    return plan_for(SAMPLES / "zen", tokenizer=SAMPLES / "zen" / "tokenizer")


@pytest.fixture(scope="module")
def globe() -> Plan:
    return plan_for(SAMPLES / "globe")


def test_the_metadata_says_what_it_is(zen: Plan, globe: Plan) -> None:
    common = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert made(zen).data.to_dict() == {**common, "tags": ["megatron", "megahf", "custom_code"]}
    assert made(globe).data.to_dict() == {**common, "tags": ["megatron", "megahf", "custom_code", "moe", "mamba2"]}


@pytest.mark.parametrize("name", ["org/base", 'a: "quoted" #name', "line\nbreak: 1"])
def test_the_base_model_is_a_name_whatever_is_in_it(zen: Plan, name: str) -> None:
    assert made(zen, base_model=name).data.to_dict()["base_model"] == name


def test_the_hub_finds_nothing_wrong_with_it(zen: Plan, globe: Plan, tmp_path: Path) -> None:
    """`ModelCard.validate` asks the Hub."""
    paths = []
    for name, plan in (("zen", zen), ("globe", globe)):
        paths.append(str(tmp_path / name))
        Path(paths[-1]).write_bytes(card(plan, provenance(plan, {})))
    code = "import sys; from huggingface_hub import ModelCard; [ModelCard.load(p).validate() for p in sys.argv[1:]]"
    with hub.running() as server:
        command = [sys.executable, "-c", code, *paths]
        done = subprocess.run(command, env=server.environment(tmp_path / "home"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert server.seen == ["POST /api/validate-yaml"] * 2


def test_the_numbers_are_those_of_the_model(globe: Plan, tmp_path: Path) -> None:
    convert(SAMPLES / "globe", tmp_path / "hf")
    from megahf.models.modeling_mcore_hybrid import McoreHybridForCausalLM

    model = McoreHybridForCausalLM.from_pretrained(tmp_path / "hf")
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    active = total - routed // 2  # two experts of four
    text = made(globe).text
    assert f"| {total:,}, of which {active:,} take part in a token |" in text
    for words in ("`McoreHybridForCausalLM`", "iteration 10", "written at TP2", "`MEM*-MEM*-`", "bfloat16", "31 rows"):
        assert words in text


def test_what_is_not_certain_is_said(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt", swiglu=False, strange_argument=3, **{"odd`name\n# title": 1})
    plan = plan_for(tmp_path / "ckpt", dtype="bf16")
    text = made(plan).text
    assert "`strange_argument`" in text
    assert "\n# title" not in text
    assert "bfloat16 (from float32)" in text
    for note in plan.notes:
        assert note in text


def test_a_lowered_model_needs_no_code(zen: Plan) -> None:
    lowered = made(zen, family=FAMILIES["llama"])
    assert "custom_code" not in lowered.data.to_dict()["tags"]
    assert "`LlamaForCausalLM` (`llama`)" in lowered.text
    assert "trust_remote_code" not in lowered.text


def test_a_hugging_face_source_has_no_iteration(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    convert(tmp_path / "ckpt", tmp_path / "hf")
    text = made(plan_for(tmp_path / "hf")).text
    assert "- `hf`: hf\n" in text
    assert "megahf verify" not in text


def test_convert_writes_it(tmp_path: Path) -> None:
    """The card of the folder is the plan's, with the digests of what was written."""
    tokenizer = SAMPLES / "zen" / "tokenizer"
    assert megahf("convert", SAMPLES / "zen", tmp_path / "hf", "--tokenizer", tokenizer).exit_code == 0
    written = ModelCard.load(tmp_path / "hf" / "README.md")
    assert written.data.library_name == "transformers"
    assert "AutoTokenizer" in written.text
    assert "with a digest of every weight" in written.text


def test_what_the_card_says_to_run_runs(zen: Plan, tmp_path: Path) -> None:
    tokenizer = SAMPLES / "zen" / "tokenizer"
    convert(SAMPLES / "zen", tmp_path / "hf", tokenizer=tokenizer)
    alone, registered = python_of(made(zen, tokenizer=True), tmp_path / "hf")
    assert run(FRESH.format(code=alone)) == "McoreGPTForCausalLM"
    setting = "import megahf\nfrom transformers import AutoModelForCausalLM\n"
    name = f"name, revision = {str(tmp_path / 'hf')!r}, 'main'\n"
    said = run(setting + name + registered + "print(type(model).__module__)")
    assert said == "megahf.models.modeling_mcore_gpt"  # and none of the folder's code


@pytest.mark.parametrize("model_type", pages.KINDS)
def test_the_pages_are_what_the_rows_say(model_type: str) -> None:
    page = (PAGES / f"{model_type}.md").read_text(encoding="utf-8")
    assert pages.filled(page, pages.KINDS[model_type]) == page, "run python model_cards/pages.py"
    assert sorted(re.findall(r"<!-- begin (\w+) -->", page)) == sorted(pages.TABLES)


def test_every_class_has_a_page_and_the_overview_names_it() -> None:
    from megahf.architectures import AUTO_MAPS

    assert set(pages.KINDS) == set(AUTO_MAPS)
    overview = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}]({name}.md)" in overview for name in AUTO_MAPS)


def test_the_template_is_the_one_that_is_used() -> None:
    assert (PAGES / "template.md").resolve() == cards.TEMPLATE.resolve()


def names_on(page: str) -> set[str]:
    """The weights in the tables of a page, with their places."""
    found, place = set(), ""
    for line in page.splitlines():
        if again := re.fullmatch(r"`(\S+)` has the rows of `(\S+)` once more, .*", line):
            found |= {name.replace(again[2], again[1]) for name in found if name.startswith(again[2])}
        elif line == "Once in the model":
            place = ""
        elif title := re.fullmatch(r"`(\S+\.)`", line):
            place = title[1]
        elif row := re.match(r"\| `(\S+)` \| `\[", line):
            found.add(place + row[1])
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_every_weight_of_a_model_is_on_its_page(config: Any) -> None:
    page = (PAGES / f"{config.model_type}.md").read_text(encoding="utf-8")
    assert {weight.row.name for weight in table.weights(config)} <= names_on(page)


def known(config: Any) -> dict[str, Any]:
    """The config's fields, and the width of a mixer, for the formulas of the letters; 0 for what is not given."""
    fields = {name: 0 if value is None else value for name, value in vars(config).items()}
    return {**fields, "mixer": mixer_width(config) if rows.is_hybrid(config) else 0}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_the_letters_mean_what_the_shapes_are(config: Any) -> None:
    shapes = rows.sizes(config)
    used: Iterable[str] = {letter for weight in table.weights(config) for letter in weight.row.shape.split()}
    values = known(config)
    for letter in used:
        assert eval(pages.LETTERS[letter][0], {}, values) == shapes[letter], letter


def test_a_card_of_a_model_without_positions_speaks_of_none(tmp_path: Path) -> None:
    write_hybrid(tmp_path / "ckpt", "M-M", position_embedding_type="none")
    text = made(plan_for(tmp_path / "ckpt")).text
    assert "texts of at most" not in text
