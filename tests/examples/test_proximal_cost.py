# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import copy

import torch

from examples.benchmarks.proximal_cost import run as script
from examples.common.files import read_json
from peft_linear import proximal_distance
from peft_linear.tuners.proximal_lora.state import find_adapters, live_records


def test_it_measures_every_form_and_writes_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "TARGETS", {"factors": 1e9, "delta": 1e9, "function": 1e9})
    assert script.main(["--cases", "tiny", "--rounds", "3", "--output", str(tmp_path)]) == 0
    forms = read_json(tmp_path / "results.json.gz")["cases"]["tiny"]["forms"]
    assert set(forms) == set(script.FORMS)
    for row in forms.values():
        assert row["ratio"] > 0 and row["added_quartiles"][0] <= row["added"] <= row["added_quartiles"][1]
        assert row["anchor_bytes"] == row["lora_a_bytes"] > 0  # zeros of B are not kept
    table = (tmp_path / "README.md").read_text()
    assert "delta, selective" in table and "All targets are met." in table and "--rounds 3" in table
    monkeypatch.setattr(script, "TARGETS", {"factors": -1.0, "delta": 1e9, "function": 1e9})
    assert script.main(["--cases", "tiny", "--rounds", "2", "--output", str(tmp_path / "missed")]) == 1
    assert "missed: tiny, factors, always on" in capsys.readouterr().err


def test_models_share_the_base_and_only_the_one_under_the_clock_is_pulled():
    models, batch = script.build("tiny", 2, "cpu")
    plain, pulled = models[script.PLAIN], models["factors, always on"]
    weights = {name: p for name, p in plain.named_parameters() if "base_layer" in name}
    assert weights and all(dict(pulled.named_parameters())[name] is p for name, p in weights.items())
    records = set(live_records)

    pulled.peft_config["default"].proximal_lambda = 1e12  # where it acts, nothing moves

    def moved(measured):
        optimizer = torch.optim.AdamW([p for p in pulled.parameters() if p.requires_grad], lr=1e-3)
        with script.alone(measured):
            whole, last = script.step(pulled, optimizer, batch, "cpu")
        assert 0 <= last <= whole
        return proximal_distance(pulled)

    assert moved(pulled) < 1e-6
    assert moved(plain) > 1e-3
    assert set(live_records) == records


def test_an_anchor_that_keeps_more_than_a_copy_of_a_is_found():
    models, _ = script.build("tiny", 2, "cpu")
    model = models["delta, always on"]
    anchors, factors = script.anchor_bytes(model)
    assert anchors == factors
    (adapter,) = find_adapters(model)
    first = next(iter(adapter.factors()))
    first.anchor.b = copy.deepcopy(first.b.detach())
    assert script.anchor_bytes(model)[0] == factors + first.b.numel() * first.b.element_size()
    row = {"ratio": 1.0, "target": 0.1, "anchor_bytes": factors + 4, "lora_a_bytes": factors}
    assert "anchors of" in script.missed({"cases": {"tiny": {"forms": {"delta": row}}}})[0]
