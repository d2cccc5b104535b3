"""report.json is strict JSON and follows the published schema."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from amp_convert.report import RunReport
from amp_convert.report.writers.json_report import SCHEMA_FILE, json_text, schema_text


@pytest.fixture
def schema() -> dict[str, Any]:
    text = files("amp_convert.report").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def test_the_published_schema_is_current() -> None:
    published = files("amp_convert.report").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
    assert published == schema_text(), f"write json_report.schema_text() into {SCHEMA_FILE}"


def _refuse(token: str) -> None:
    raise AssertionError(f"{token} is not JSON")


def test_json_is_strict_and_follows_the_schema(
    small_report: RunReport, schema: dict[str, Any]
) -> None:
    document = json.loads(json_text(small_report), parse_constant=_refuse)
    assert document["inference"]["nodes"][3]["accumulated_rel_l2"] == "NaN"
    Draft202012Validator.check_schema(schema)
    assert list(Draft202012Validator(schema).iter_errors(document)) == []


def test_training_follows_the_schema(trained_report: RunReport, schema: dict[str, Any]) -> None:
    document = json.loads(json_text(trained_report), parse_constant=_refuse)
    norms = document["training"]["run"]["arms"][1]["gradient_norms"]
    assert norms[:2] == ["Infinity", 1.0]
    assert document["training"]["gradients"]["weight_range"]["histogram"]["counts"] == {
        "-12": 10,
        "-3": 30,
    }
    assert list(Draft202012Validator(schema).iter_errors(document)) == []


def test_onnx_follows_the_schema(exported_report: RunReport, schema: dict[str, Any]) -> None:
    document = json.loads(json_text(exported_report), parse_constant=_refuse)
    assert document["onnx"]["model"]["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}
    ]
    assert document["onnx"]["parity"]["runs"][2]["without"] == ["SimplifiedLayerNormFusion"]
    assert list(Draft202012Validator(schema).iter_errors(document)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"schema_version": 2},
        {"created": None},
        {"verdict": {"status": "maybe", "checks": []}},
    ],
)
def test_the_schema_refuses_what_is_no_report(
    small_report: RunReport, schema: dict[str, Any], change: dict[str, Any]
) -> None:
    document = json.loads(json_text(small_report)) | change
    assert list(Draft202012Validator(schema).iter_errors(document))


def test_the_schema_refuses_other_spellings_of_a_number(
    small_report: RunReport, schema: dict[str, Any]
) -> None:
    document = json.loads(json_text(small_report))
    document["inference"]["nodes"][0]["sqnr_db"] = "nan"
    assert list(Draft202012Validator(schema).iter_errors(document))


def test_hostile_names_survive(hostile_report: RunReport) -> None:
    assert RunReport.model_validate_json(json_text(hostile_report)) == hostile_report
