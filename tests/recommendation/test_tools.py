# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The files for other tools: their own field names, what TRL reads in them, and nothing dropped in silence."""

import json
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from peft_linear.errors import PeftLinearError
from peft_linear.recommendation.names import parse_name
from peft_linear.recommendation.tools import TOOLS
from peft_linear.selection import ModuleScore, Recommendation, Settings
from peft_linear.selection.request import recommend_modules
from tests.helpers.small_models import llama, seeded, text_batches
from tests.recommendation.test_rules import LLAMA, NESTED, by_peft, choices, of


trl = pytest.importorskip("trl")
FIELDS = json.loads((Path(__file__).parent / "tool_fields.json").read_text(encoding="utf-8"))
SFT = ["--output_dir", "out", "--dataset_name", "d", "--model_name_or_path", "m", "--bf16", "False"]


def recommendation(choice, candidates=LLAMA, others=(), all_linear=0, learning_rate=4e-3, **fields):
    """A decision on a model whose other modules are known."""
    facts = {"same_type": [*candidates, *others], "all_linear": all_linear}
    rows = tuple(ModuleScore(n, 1.0, i + 1, 10, n in choice, "", 1.0) for i, n in enumerate(candidates))
    about = Settings(candidates=tuple(candidates), kernels={"peft": facts}, **fields.pop("settings", {}))
    return Recommendation(
        tuple(choice),
        rows,
        {},
        "trace",
        len(choice),
        0.1,
        about,
        module_ranks=choice,
        learning_rate=learning_rate,
        **fields,
    )


def config_of(tool, text, folder):
    """The LoraConfig that the tool makes of its file."""
    values = yaml.safe_load(text)
    if tool == "trl":
        (folder / "trl.yaml").write_text(text, encoding="utf-8")
        parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
        _, training, model = parser.parse_args_and_config([*SFT, "--config", str(folder / "trl.yaml")])
        assert training.learning_rate == values.get("learning_rate", 2e-5)
        return trl.get_peft_config(model)
    if tool == "llamafactory":  # llamafactory.model.adapter._setup_lora_tuning
        return LoraConfig(
            r=values["lora_rank"],
            lora_alpha=values["lora_alpha"],
            target_modules=[part.strip() for part in values["lora_target"].split(",")],
            modules_to_save=values["additional_target"].split(",") if "additional_target" in values else None,
        )
    return LoraConfig(  # axolotl.loaders.adapter._build_peft_lora_config
        r=values["lora_r"],
        lora_alpha=values["lora_alpha"],
        target_modules=values["lora_target_modules"],
        layers_to_transform=values.get("peft_layers_to_transform"),
        layers_pattern=values.get("peft_layers_pattern"),
        modules_to_save=values.get("lora_modules_to_save"),
        rank_pattern=values.get("lora_rank_pattern") or {},
    )


class AsRule:
    """A config in the place of a rule."""

    def __init__(self, config):
        self.kind = "all-linear" if config.target_modules == "all-linear" else "config"
        self.rank, self.config = config.r, config

    def config_fields(self):
        names = ("target_modules", "layers_to_transform", "layers_pattern", "rank_pattern")
        return {name: value for name in names if (value := getattr(self.config, name))}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_reads_adapts_exactly_the_choice(tool, tmp_path):
    @given(choices())
    @settings(max_examples=60, deadline=None)
    def check(problem):
        candidates, choice, others = problem
        assume(choice)
        try:
            text = recommendation(choice, candidates, others).to_yaml(tool)
        except PeftLinearError as error:
            assert tool != "axolotl" and ("one rank" in str(error) or "names end as others do" in str(error))
            return
        config = config_of(tool, text, tmp_path)
        assert by_peft(AsRule(config), [*candidates, *others]) == choice
        assert config.lora_alpha == 16 and not config.use_rslora

    check()


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
@pytest.mark.parametrize(
    "choice",
    [
        of(LLAMA, lambda n: n.is_mlp, 2),
        of(LLAMA, lambda n: n.is_mlp and n.layer < 9, 2),
        of(LLAMA, lambda n: n.is_mlp, 2) | {LLAMA[0]: 2},
        dict.fromkeys(LLAMA[::11], 1),
    ],
)
def test_every_field_is_one_of_the_tools_own_with_its_type(tool, choice):
    rec = recommendation(choice)
    rec = replace(rec, settings=replace(rec.settings, kernels=rec.settings.kernels | {"always_trained": ["score"]}))
    fields = yaml.safe_load(rec.to_yaml(tool))
    known = FIELDS[tool]["fields"]
    assert set(fields) <= set(known)
    for name, value in fields.items():
        kind = eval(known[name], {"Literal": typing.Literal, "PositiveInt": int, "Any": typing.Any})
        if typing.get_origin(kind) is typing.Literal:
            assert value in typing.get_args(kind)
        else:
            kinds = [typing.get_origin(k) or k for k in (typing.get_args(kind) or [kind])]
            assert any(isinstance(value, k) for k in kinds), (name, value)


def test_a_file_in_the_words_of_each_tool():
    rec = recommendation(of(LLAMA, lambda n: n.is_mlp and n.layer < 3, 2), learning_rate_interval=(2e-3, 8e-3))
    first = "# gate_proj, up_proj and down_proj of layers 0–2 at rank 2 (alpha/rank scaling)\n"
    rate = "# learning_rate: the best one lies between 0.002 and 0.008\n"
    assert rec.to_yaml("axolotl") == (
        f"{first}{rate}adapter: lora\nlora_r: 2\nlora_alpha: 16\nlora_dropout: 0.0\n"
        "lora_target_modules: [gate_proj, up_proj, down_proj]\npeft_layers_to_transform: [0, 1, 2]\n"
        "peft_layers_pattern: [layers]\nlearning_rate: 0.004\n"
    )
    assert rec.to_yaml("trl") == (
        f"{first}# TRL has no field for layers: the same modules as a regular expression\n{rate}"
        "use_peft: true\nlora_r: 2\nlora_alpha: 16\nlora_dropout: 0.0\n"
        "lora_target_modules: ['model\\.layers\\.(?:0|1|2)\\.(?:mlp\\.gate_proj|mlp\\.up_proj|mlp\\.down_proj)']\n"
        "learning_rate: 0.004\n"
    )
    text = rec.to_yaml("llamafactory")
    assert "# LLaMA-Factory has no field for layers: the same modules as full names\n" in text
    assert yaml.safe_load(text)["lora_target"].split(",") == list(rec.modules)


def test_all_linear_is_said_so_where_that_is_exact():
    rec = recommendation(dict.fromkeys(LLAMA, 1), all_linear=len(LLAMA))
    assert rec.target_modules == rec.to_config().target_modules == "all-linear"
    assert yaml.safe_load(rec.to_yaml("axolotl"))["lora_target_modules"] == "all-linear"
    assert yaml.safe_load(rec.to_yaml("trl"))["lora_target_modules"] == ["all-linear"]
    types = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    assert yaml.safe_load(rec.to_yaml("llamafactory"))["lora_target"].split(",") == types
    assert recommendation(dict.fromkeys(LLAMA, 1)).target_modules == types


def test_one_type_is_no_regular_expression_that_matches_nothing(tmp_path):
    """TRL makes a text of a list of one, which peft takes for a pattern of whole names."""
    rec = recommendation(of(LLAMA, lambda n: n.kind == "mlp.down_proj", 2))
    config = config_of("trl", rec.to_yaml("trl"), tmp_path)
    assert by_peft(AsRule(config), LLAMA) == rec.ranks


@pytest.mark.parametrize("tool", ["trl", "llamafactory"])
def test_ranks_that_differ_are_refused_where_there_is_one(tool):
    rec = recommendation(of(LLAMA, lambda n: n.is_mlp, 2) | {LLAMA[0]: 4})
    with pytest.raises(PeftLinearError, match="one rank for all modules, and this choice has ranks 2 to 4; train in"):
        rec.to_yaml(tool)
    assert yaml.safe_load(rec.to_yaml("axolotl"))["lora_rank_pattern"] == {"q_proj": 4}


def test_what_no_field_says_is_refused():
    rec = recommendation({"proj": 2}, NESTED)
    assert yaml.safe_load(rec.to_yaml("axolotl"))["lora_target_modules"] == "proj"
    with pytest.raises(PeftLinearError, match="no field of llamafactory adapts exactly"):
        rec.to_yaml("llamafactory")
    with pytest.raises(PeftLinearError, match="no YAML for 'unsloth'; there is one for axolotl, llamafactory, trl"):
        rec.to_yaml("unsloth")
    half = replace(rec, settings=replace(rec.settings, lora_alpha=12.5))
    with pytest.raises(PeftLinearError, match=r"takes lora_alpha as an integer, got 12\.5"):
        half.to_yaml("trl")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_rate_that_was_not_recommended_is_a_comment(tool):
    text = recommendation(of(LLAMA, lambda n: n.is_mlp, 2), learning_rate=None).to_yaml(tool)
    assert "# learning_rate: none was recommended" in text and "learning_rate" not in yaml.safe_load(text)


def test_small_rates_are_numbers_for_yaml():
    text = recommendation(of(LLAMA, lambda n: n.is_mlp, 2), learning_rate=4e-5).to_yaml("axolotl")
    assert yaml.safe_load(text)["learning_rate"] == 4e-5


@pytest.mark.parametrize("name", ["a\nb: c", 'quote".x', "# no", "ünïcode", "{x}", "- y"])
def test_no_name_breaks_a_file(name):
    for tool in ("axolotl", "trl"):
        fields = yaml.safe_load(recommendation({name: 1}, [name, "rest"]).to_yaml(tool))
        assert fields["lora_r"] == 1 and len(fields["lora_target_modules"]) == 1


def test_training_arguments_are_what_was_planned(tmp_path):
    about = {"optimizer": "adamw", "train_batch_size": 4, "steps": 60}
    rec = recommendation(of(LLAMA, lambda n: n.is_mlp, 2), settings=about)
    made = rec.to_training_arguments(tmp_path, weight_decay=0.1)
    assert (made.learning_rate, made.per_device_train_batch_size, made.max_steps) == (4e-3, 4, 60)
    assert (made.optim, made.weight_decay, made.output_dir) == ("adamw_torch", 0.1, str(tmp_path))
    made = rec.to_training_arguments(tmp_path, num_train_epochs=2, learning_rate=1e-3)
    assert (made.max_steps, made.num_train_epochs, made.learning_rate) == (-1, 2, 1e-3)
    with pytest.raises(PeftLinearError, match="no learning rate, and the default"):
        replace(rec, learning_rate=None).to_training_arguments(tmp_path)


def test_rates_and_ranks_are_saved(tmp_path):
    rec = recommendation(of(LLAMA, lambda n: n.is_mlp, 2) | {LLAMA[0]: 4}, learning_rate_interval=(1e-3, 1e-2))
    rec.save(tmp_path)
    loaded = Recommendation.load(tmp_path)
    assert loaded == rec and loaded.ranks == rec.ranks
    assert (loaded.learning_rate, loaded.learning_rate_interval) == (4e-3, (1e-3, 1e-2))
    with pytest.raises(PeftLinearError, match="module_ranks need a rank of at least 1"):
        replace(rec, module_ranks={LLAMA[0]: 4})


def test_the_choice_of_a_real_model_is_said_by_type(tmp_path):
    """From the model to the config: peft adapts exactly the choice, at its ranks, scaled by α over each of them."""
    batches = [batch | {"labels": batch["input_ids"]} for batch in text_batches()]
    rec = recommend_modules(seeded(llama, causal=True), batches, 14, draws=1, progress=False)
    assert (rec.rule.kind, str(rec.rule)) == ("all-linear", "all 14 linear modules at rank 8")
    mlp = {name: 1 + 2 * name.endswith("down_proj") for name in rec.modules if parse_name(name).is_mlp}
    rows = tuple(replace(row, chosen=row.name in mlp) for row in rec.scores)
    rec = replace(rec, modules=tuple(mlp), scores=rows, module_ranks=mlp)
    assert set(rec.target_modules) == {"gate_proj", "up_proj", "down_proj"}
    assert rec.parameters == sum(rank * sum(rec.settings.shapes[name]) for name, rank in mlp.items())
    rec.save(tmp_path)
    for source in (rec, Recommendation.load(tmp_path)):
        model = get_peft_model(llama(causal=True), source.to_config(task_type="CAUSAL_LM")).get_base_model()
        found = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        assert {name: layer.r["default"] for name, layer in found.items()} == mlp
        assert all(layer.scaling["default"] == 16 / mlp[name] for name, layer in found.items())


def test_candidates_that_are_not_all_of_a_type_are_not_said_by_it():
    """What was not asked about is not adapted, although it ends alike."""
    asked = [f"model.layers.1.self_attn.{kind}_proj" for kind in "qk"]
    batches = [batch | {"labels": batch["input_ids"]} for batch in text_batches()]
    rec = recommend_modules(seeded(llama, causal=True), batches, 2, targets=asked, draws=1, progress=False)
    assert rec.rule.kind == "layers" and str(rec.rule) == "all 2 candidates at rank 8"
    model = get_peft_model(llama(causal=True), rec.to_config(task_type="CAUSAL_LM")).get_base_model()
    assert [name for name, m in model.named_modules() if isinstance(m, LoraLayer)] == asked
    assert yaml.safe_load(rec.to_yaml("axolotl"))["peft_layers_to_transform"] == [1]
    about = rec.settings.kernels
    earlier = {key: value for key, value in about["peft"].items() if key not in ("same_type", "all_linear")}
    of_earlier = replace(rec, settings=replace(rec.settings, kernels=about | {"peft": earlier}))
    assert of_earlier.target_modules == asked
