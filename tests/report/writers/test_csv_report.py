"""layers.csv: one row a node, and no cell that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.report import RunReport
from amp_convert.report.text import printable
from amp_convert.report.writers.csv_report import COLUMNS, csv_text, layers_csv

_GRADIENTS, _ONNX = COLUMNS[-9:-6], COLUMNS[-6:-2]


def test_golden(trained_report: RunReport, golden: Callable[[str, str], None]) -> None:
    golden("layers.csv", layers_csv(trained_report))


def test_the_columns_are_the_contract(small_report: RunReport) -> None:
    header = layers_csv(small_report).splitlines()[0]
    assert header == (
        "node,layer,op,dtype,rule,reason,source,local_rel_l2,accumulated_rel_l2,sqnr_db,cosine,"
        "max_abs_err,max_ulp,nonfinite,overflow_fraction,underflow_fraction,grad_rel_l2,"
        "grad_cosine,grad_underflow_fraction,onnx_ops,onnx_ran,onnx_local_rel_l2,"
        "onnx_accumulated_rel_l2,output_rel_l2,error_share"
    )


def test_errors_are_joined_by_node_whatever_their_order(small_report: RunReport) -> None:
    inference = small_report.inference
    assert inference is not None
    turned = type(inference)(**(vars(inference) | {"nodes": inference.nodes[::-1]}))
    report = small_report.model_copy(update={"inference": turned})
    assert layers_csv(report) == layers_csv(small_report)


def test_without_inference_the_measured_cells_are_empty(small_report: RunReport) -> None:
    report = small_report.model_copy(update={"inference": None, "attribution": None})
    rows = list(csv.DictReader(io.StringIO(layers_csv(report))))
    assert len(rows) == len(report.plan.decisions)
    assert {row[name] for row in rows for name in COLUMNS[7:]} == {""}


def test_gradients_are_those_of_the_layer_and_their_underflow_that_of_the_node(
    trained_report: RunReport,
) -> None:
    names = _GRADIENTS
    table = csv.DictReader(io.StringIO(layers_csv(trained_report)))
    assert {row["node"]: [row[name] for name in names] for row in table} == {
        "features.0/aten.conv2d#0": ["0.0025", "0.999", "0.25"],
        # A layer without parameters, and a node that the train graph does not have.
        "features.1/aten.batch_norm#0": ["", "", ""],
        "classifier/aten.linear#0": ["0.005", "0.999", "0.0"],
        "/aten.exp#0": ["", "", ""],
        "/aten.frobnicate#0": ["", "", ""],
        "/aten.argmax#0": ["", "", ""],
    }


def test_without_training_their_cells_are_empty(small_report: RunReport) -> None:
    table = csv.DictReader(io.StringIO(layers_csv(small_report)))
    assert {row[name] for row in table for name in _GRADIENTS} == {""}


def test_what_a_node_became_in_onnx_is_in_its_row(exported_report: RunReport) -> None:
    table = csv.DictReader(io.StringIO(layers_csv(exported_report)))
    assert {row["node"]: [row[name] for name in _ONNX] for row in table} == {
        "features.0/aten.conv2d#0": ["Conv", "in float32", "1e-06", "1e-06"],
        "features.1/aten.batch_norm#0": ["Mul Add", "", "2e-07", "3e-06"],
        "classifier/aten.linear#0": ["Gemm", "in float32", "0.004", "0.005"],
        # One that became no ONNX node, and two that were not compared.
        "/aten.exp#0": ["", "", "0.0", "0.006"],
        "/aten.frobnicate#0": ["", "", "", ""],
        "/aten.argmax#0": ["", "", "", ""],
    }


def test_without_onnx_its_cells_are_empty(trained_report: RunReport) -> None:
    table = csv.DictReader(io.StringIO(layers_csv(trained_report)))
    assert {row[name] for row in table for name in _ONNX} == {""}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_a_cell_that_a_spreadsheet_would_run_is_quoted(start: str) -> None:
    text = csv_text(["a", "b"], [[f"{start}cmd()", -1.5]])
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[1] == [f"'{printable(start)}cmd()", "-1.5"]


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_is_one_cell(cells: list[str]) -> None:
    text = csv_text(["h"] * len(cells), [cells])
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len(rows) == 2
    for written, cell in zip(rows[1], cells, strict=True):
        assert written in (printable(cell), "'" + printable(cell))
        assert not written.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


def test_floats_keep_every_digit() -> None:
    assert csv_text(["x"], [[0.1 + 0.2], [float("nan")], [7]]) == (
        "x\n0.30000000000000004\nnan\n7\n"
    )
