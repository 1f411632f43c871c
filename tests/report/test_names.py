# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import pytest

from peft_linear.recommendation.names import layer_grid, parse_name, short_labels
from tests.helpers.planted import BERT_NAMES, KINDS


@pytest.mark.parametrize(
    ("name", "stack", "layer", "kind"),
    [
        ("bert.encoder.layer.3.attention.self.query", "bert.encoder.layer", 3, "attention.self.query"),
        ("transformer.h.11.attn.c_proj", "transformer.h", 11, "attn.c_proj"),
        ("model.layers.0.mlp.experts.3.gate_proj", "model.layers", 0, "mlp.experts.3.gate_proj"),
        ("bert.pooler.dense", "", None, "bert.pooler.dense"),
        ("lm_head", "", None, "lm_head"),
        ("0.weight", "", 0, "weight"),
        ("layers.4", "", None, "layers.4"),  # the number is the module itself: nothing to tell kinds by
        ("conv1.proj", "", None, "conv1.proj"),
    ],
)
def test_names_taken_apart(name, stack, layer, kind):
    parsed = parse_name(name)
    assert (parsed.full, parsed.stack, parsed.layer, parsed.kind) == (name, stack, layer, kind)


def test_grid_of_a_bert_with_a_pooler():
    grid = layer_grid([*BERT_NAMES, "bert.pooler.dense"])
    assert grid.rows == ("0", "1", "2", "3", "4", "5", "–")
    assert grid.columns == (*KINDS, "bert.pooler.dense")
    assert grid.cells["bert.encoder.layer.4.output.dense"] == (4, 5)
    assert grid.cells["bert.pooler.dense"] == (6, 6)
    assert len(set(grid.cells.values())) == 37


def test_layers_are_sorted_as_numbers_and_may_have_gaps():
    grid = layer_grid(["h.10.a", "h.2.a", "h.2.b"])
    assert grid.rows == ("2", "10")
    assert grid.cells == {"h.10.a": (1, 0), "h.2.a": (0, 0), "h.2.b": (0, 1)}


def test_encoder_and_decoder_do_not_share_cells():
    names = [f"{stack}.block.{i}.q" for stack in ("encoder", "decoder") for i in (0, 1)]
    grid = layer_grid(names)
    assert grid.columns == ("encoder.block.q", "decoder.block.q")
    assert len(set(grid.cells.values())) == 4


def test_names_without_numbers_alone():
    grid = layer_grid(["fc1", "fc2"])
    assert (grid.rows, grid.columns) == (("–",), ("fc1", "fc2"))


def test_labels_are_short_but_never_the_same():
    assert short_labels(["h.1.q", "h.2.q"]) == {"h.1.q": "1 · q", "h.2.q": "2 · q"}
    assert short_labels(["encoder.1.q", "decoder.1.q", "x.1.k"]) == {
        "encoder.1.q": "encoder.1.q",
        "decoder.1.q": "decoder.1.q",
        "x.1.k": "1 · k",
    }
